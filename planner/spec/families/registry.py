"""Which `model_type`s are known in closed form, and who reads them.

A model_type that is not here is refused with what would work; nothing is approximated by a
neighbour.
"""

from __future__ import annotations

from typing import Any

from outlay.planner.spec.families import alibi, bert, gemma, gpt, llama, moe, seq2seq
from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import Family
from outlay.planner.spec.files import line_of
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError

FAMILIES: dict[str, Family] = {
    **alibi.FAMILIES,
    **bert.FAMILIES,
    **gemma.FAMILIES,
    **gpt.FAMILIES,
    **llama.FAMILIES,
    **moe.FAMILIES,
    **seq2seq.FAMILIES,
}
"""transformers' `model_type` → how it is read."""


def spec_from_config(config: dict[str, Any], *, name: str, source: str) -> ModelSpec:
    """The sizes of the model that transformers would build from this config.

    `source` is the file's path, or a word for where the config comes from. Raises FileError.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise _unknown_family(config, source)
    return family.read(Reader(config, source=source, aliases=family.aliases), name)


def _unknown_family(config: dict[str, Any], source: str) -> FileError:
    known = ", ".join(sorted(FAMILIES))
    family = config.get("model_type")
    where = line_of(source, ("model_type",))
    if family is None:
        return FileError(
            "model_type: is missing",
            where=source,
            do=f"pass a transformers config.json; families that work: {known}",
        )
    nested = config.get("text_config")
    if isinstance(nested, dict):
        return FileError(
            f"model_type: {family!r} wraps a text model and others, and is not known as a whole",
            where=where,
            do="save its text_config as a config.json of its own and pass that, if its model_type "
            f"({nested.get('model_type', 'not given')}) is one of: {known}",
        )
    return FileError(
        f"model_type: {family!r} is not known in closed form",
        where=where,
        why="its sizes would have to be guessed; tracing any module is not available yet",
        do=f"families that work: {known}",
    )

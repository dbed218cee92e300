"""Rules about keys: removed, misspelt, unknown, of the wrong type, or twice there."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from outlay.planner.read.document import KeyPath
from outlay.planner.read.edits import Edit
from outlay.planner.read.known import known, names, parse_version
from outlay.planner.read.meaning import MAIN, DocEdit
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.setup import Setup
from outlay.planner.rules.value_kinds import wrong

_COMMENTS = ("_", "//", "#", "comment", "$schema", "description")
_BLOCKS = (
    "zero_optimization",
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "data_types",
    "activation_checkpointing",
    "aio",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comms_logger",
)


def _top_level(s: Setup) -> Iterable[str]:
    """Keys that a person wrote; those that start like a comment are none."""
    if s.meaning.section is None or s.meaning.section.document is None:
        return []
    return [key for key in s.raw if not key.lower().startswith(_COMMENTS)]


def near(key: str, among: Iterable[str]) -> str | None:
    """The one key that is probably meant."""
    plain = {k.replace("_", "").replace("-", "").lower(): k for k in among}
    folded = key.replace("_", "").replace("-", "").lower()
    if folded in plain:
        return plain[folded]
    found = difflib.get_close_matches(folded, plain, n=1, cutoff=0.82)
    return plain[found[0]] if found else None


@config_rule(
    "key_twice", "illegal", "runtime/config_utils.py:205: dict_raise_error_on_duplicate_keys"
)
def key_twice(s: Setup) -> Iterable[Found]:
    """A key that stands twice in a DeepSpeed JSON."""
    section = s.meaning.section
    assert section is not None
    if section.document is None:
        return
    document = s.meaning.documents[section.document]
    if document.syntax != "json":
        return
    for twice in document.twice:
        dotted = ".".join(map(str, twice.path))
        start = twice.earlier.key_start or twice.earlier.start
        after = document.text[twice.earlier.end :]
        end = twice.earlier.end + (len(after) - len(after.lstrip(" \t\n,")))
        yield Found(
            what=f"{dotted} stands twice: in line {document.text.count(chr(10), 0, start) + 1} and here",
            where=f"{document.name}:{twice.line}: {dotted}",
            do="keep one of them; the mend keeps the later, which other readers would take",
            edits=(DocEdit(document=section.document, edit=Edit(op="cut", span=(start, end))),),
        )


@config_rule(
    "yaml_key_twice",
    "ignored",
    "PyYAML keeps the last of two equal keys without a word",
    deepspeed=False,
)
def yaml_key_twice(s: Setup) -> Iterable[Found]:
    """A key that stands twice in a YAML: the earlier one has no effect."""
    document = s.meaning.documents[MAIN]
    if document.syntax != "yaml":
        return
    for twice in document.twice:
        dotted = ".".join(map(str, twice.path))
        line = document.text.rfind("\n", 0, twice.earlier.key_start or 0) + 1
        end = document.text.find("\n", max(twice.earlier.end - 1, 0)) + 1 or len(document.text)
        yield Found(
            what=f"{dotted} stands twice: line {twice.earlier.key_line} is overridden by line {twice.line}",
            where=f"{document.name}:{twice.earlier.key_line}: {dotted}",
            do=f"remove one of them; the mend removes line {twice.earlier.key_line}",
            edits=(DocEdit(document=MAIN, edit=Edit(op="cut", span=(line, end))),),
        )


@config_rule(
    "json_only_deepspeed_reads", "illegal",
    "transformers and accelerate read it with json.load (accelerate 1.15, utils/deepspeed.py); DeepSpeed with hjson",
)  # fmt: skip
def json_only_deepspeed_reads(s: Setup) -> Iterable[Found]:
    """Comments or trailing commas in a JSON that a strict reader will load."""
    section = s.meaning.section
    assert section is not None
    document = s.meaning.documents.get(section.document or "")
    if not s.meaning.trainer or document is None or not document.relaxed:
        return
    start, _, what = document.relaxed[0]
    line = document.text.count("\n", 0, start) + 1
    more = len(document.relaxed) - 1
    yield Found(
        what=f"{what} in a JSON file" + (f", and {more} more of the kind" if more else "")
        + ": DeepSpeed itself would read it, the Trainer's strict reader does not",
        where=f"{document.name}:{line}",
        do="remove comments and trailing commas",
        edits=tuple(
            DocEdit(document=str(section.document), edit=Edit(op="cut", span=(a, b)))
            for a, b, _ in document.relaxed
        ),
    )  # fmt: skip


@config_rule(
    "removed_key",
    "illegal",
    "runtime/config.py:80-141: DeepSpeedConfigError",
    versions=">=0.19.7,<0.20",
)
def removed_key(s: Setup) -> Iterable[Found]:
    """A feature that DeepSpeed no longer has."""
    lists = known("deepspeed")
    rows: list[tuple[tuple[str, ...], str]] = [
        ((key,), since) for key, since in lists["removed"].items()
    ]
    rows += [(("zero_optimization", key), since) for key, since in lists["removed_zero"].items()]
    for path, since in rows:
        if s.written(*path) is None or s.version < parse_version(since):
            continue
        instead = lists["instead"].get(path[-1])
        yield Found(
            what=f"{'.'.join(path)} was removed in DeepSpeed {since}: with it nothing starts",
            where=s.where(*path),
            do="remove it" + (f"; {instead}" if instead else ""),
            edits=tuple(s.meaning.remove_deepspeed(path)),
        )


@config_rule(
    "top_level_typo",
    "ignored",
    "tried: `zero_optimisation` trained with no ZeRO; runtime/config.py reads keys by name only",
)
def top_level_typo(s: Setup) -> Iterable[Found]:
    """A misspelt key at the top level: DeepSpeed does not see it."""
    known_keys = names("deepspeed", "top_level")
    gone = set(known("deepspeed")["removed"])
    for key in _top_level(s):
        if key in known_keys or key in gone:
            continue
        meant = near(key, known_keys)
        if meant is None or meant in s.raw:
            continue
        yield Found(
            what=f"{key} is no key of DeepSpeed's: it is ignored, and there is no {meant}",
            where=s.where(key),
            do=f"write {meant}",
            edits=tuple(s.meaning.rename_deepspeed((key,), meant)),
        )


_MEANT_BELOW = dict.fromkeys(known("deepspeed")["blocks"]["zero_optimization"], "zero_optimization")


@config_rule(
    "top_level_unknown",
    "ignored",
    "runtime/config.py reads keys by name only; others have no effect",
)
def top_level_unknown(s: Setup) -> Iterable[Found]:
    """A key at the top level that DeepSpeed does not read."""
    known_keys = names("deepspeed", "top_level")
    gone = set(known("deepspeed")["removed"])
    for key in _top_level(s):
        if key in known_keys or key in gone or (near(key, known_keys) or key) not in {key, *s.raw}:
            continue
        parent = _MEANT_BELOW.get(key)
        if parent is not None:
            edits = s.meaning.remove_deepspeed((key,)) + s.meaning.set_deepspeed(
                (parent, key), s.raw[key]
            )
            yield Found(
                what=f"{key} has no effect here: it belongs into {parent}",
                where=s.where(key), do=f"move it into {parent}", edits=tuple(edits),
            )  # fmt: skip
        else:
            yield Found(
                what=f"{key} is no key of DeepSpeed's: it is ignored", where=s.where(key),
                do="remove it", edits=tuple(s.meaning.remove_deepspeed((key,))),
            )  # fmt: skip


def _blocks(s: Setup) -> Iterable[tuple[KeyPath, dict[str, Any], dict[str, str]]]:
    """(path, what is written, its keys and types) of each block that refuses unknown keys."""
    for dotted, types in known("deepspeed")["blocks"].items():
        path = tuple(dotted.split("."))
        value = s.written(*path)
        if isinstance(value, dict):
            yield path, value, types


@config_rule(
    "block_unknown_key",
    "illegal",
    'runtime/config_utils.py:110: extra="forbid" in every nested block',
    versions=">=0.9.5,<0.20",
)
def block_unknown_key(s: Setup) -> Iterable[Found]:
    """A key in a block that does not have it: DeepSpeed refuses the file."""
    removed = known("deepspeed")["removed_zero"]
    absent = known("deepspeed")["absent_until"]
    for path, value, types in _blocks(s):
        for key in value:
            where = s.where(*path, key)  # type: ignore[arg-type]
            if key in types:
                last = absent.get(key)
                if last is not None and s.version <= parse_version(last[0]):
                    yield Found(
                        what=f"DeepSpeed {'.'.join(map(str, s.version))} has no {'.'.join((*path, key))}: "  # type: ignore[arg-type]
                        f"it came between {last[0]} and {last[1]}",
                        where=where, do=f"use DeepSpeed ≥ {last[1]}, or remove it",
                        edits=tuple(s.meaning.remove_deepspeed((*path, key))),
                    )  # fmt: skip
                continue
            if key in removed:
                continue
            yield _unknown(s, path, key, value[key], types, where)


def _unknown(
    s: Setup, path: KeyPath, key: str, value: Any, types: dict[str, str], where: str
) -> Found:
    dotted = ".".join(map(str, path))
    if key in names("deepspeed", "top_level"):
        edits = s.meaning.remove_deepspeed((*path, key)) + s.meaning.set_deepspeed((key,), value)
        return Found(
            what=f"{dotted} has no {key}: that is a key of the top level",
            where=where, do="move it to the top level", edits=tuple(edits),
        )  # fmt: skip
    meant = near(key, types) or near(f"stage3_{key}", types)
    if meant is not None and meant not in s.written(*path):  # type: ignore[arg-type]
        return Found(
            what=f"{dotted} has no {key}", where=where, do=f"write {meant}",
            edits=tuple(s.meaning.rename_deepspeed((*path, key), meant)),
        )  # fmt: skip
    return Found(
        what=f"{dotted} has no {key}", where=where, do="remove it",
        edits=tuple(s.meaning.remove_deepspeed((*path, key))),
    )  # fmt: skip


@config_rule(
    "wrong_type",
    "illegal",
    "pydantic models of runtime/zero/config.py, offload_config.py, precision_config.py",
)
def wrong_type(s: Setup) -> Iterable[Found]:
    """A value of a type or range that a block refuses."""
    for path, value, types in _blocks(s):
        for key, kind in types.items():
            full = (*path, key)
            if key not in value or (problem := wrong(value[key], kind)) is None:
                continue
            what, better = problem
            yield Found(
                what=f"{'.'.join(map(str, full))} is {value[key]!r}: {what}",
                where=s.where(*full),  # type: ignore[arg-type]
                do=f"write {better!r}".replace("'", '"') if better is not None else "correct it, or remove it",
                edits=tuple(
                    s.meaning.set_deepspeed(full, better) if better is not None else s.meaning.remove_deepspeed(full)
                ),
            )  # fmt: skip
    for key in _BLOCKS:
        written = s.raw.get(key)
        old_format = key == "zero_optimization" and isinstance(written, bool)
        if key == "zero_optimization" and key in s.raw and written is None:
            yield Found(
                what="zero_optimization is null: DeepSpeed unpacks it as a block, and stops with a TypeError",
                where=s.where(key), do='write {"stage": 0}, or the stage that is meant',
                edits=tuple(s.meaning.set_deepspeed((key,), {"stage": 0})),
            )  # fmt: skip
        if written is None or isinstance(written, dict) or old_format:
            continue
        block = _meant_block(key, written)
        yield Found(
            what=f"{key} is {written!r}: a block in braces is expected", where=s.where(key),
            do=f"write {json.dumps(block)}" if block else "write a block, or remove it",
            edits=tuple(
                s.meaning.set_deepspeed((key,), block) if block else s.meaning.remove_deepspeed((key,))
            ),
        )  # fmt: skip


@config_rule(
    "optimizer_without_type", "ignored", "runtime/config.py:288-299 (tried, DeepSpeed 0.19.8)"
)
def optimizer_without_type(s: Setup) -> Iterable[Found]:
    """An optimizer block without its type: DeepSpeed reads nothing of it."""
    written = s.raw.get("optimizer")
    if isinstance(written, dict) and written.get("type") is None:
        yield Found(
            what="optimizer has no type: DeepSpeed reads nothing of the block, and takes no optimizer from it",
            where=s.where("optimizer"), do='write its type, "AdamW" for instance, or remove the block',
        )  # fmt: skip


def _meant_block(key: str, written: Any) -> dict[str, Any] | None:
    """The block that a bare value stands for; null where that is not clear."""
    if key == "zero_optimization":
        return {"stage": written} if written in (0, 1, 2, 3) else None
    if key in ("optimizer", "scheduler"):
        return {"type": written} if isinstance(written, str) else None
    return {"enabled": written} if isinstance(written, bool) else None

"""Rules about the values of a framework's own arguments: numbers, switches and words that cannot be read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from outlay.planner.read.deepspeed import MOST_WHOLE
from outlay.planner.read.edits import set_to
from outlay.planner.read.known import known
from outlay.planner.read.meaning import MAIN
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_keys import near
from outlay.planner.rules.places import arguments, at, here, is_of, main_edits
from outlay.planner.rules.setup import Setup

_EXPONENT = re.compile(r"[+-]?\d+[eE][+-]?\d+")


def _number(value: Any, *, quoted: bool) -> float | None:
    if isinstance(value, bool) or (isinstance(value, str) and not quoted):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def expected(value: Any, kind: str | list[Any], *, quoted: bool) -> str | None:
    """What was expected instead of a value; null where it is right. `quoted`: numbers in quotes are read."""
    if value is None:
        return None
    if isinstance(kind, list):
        words = [str(word).lower() for word in kind]
        said = (
            "no" if value is False and "no" in words else str(value).lower()
        )  # YAML reads no as false
        return None if said in words else "one of " + ", ".join(words)
    if kind in ("text", "block", "file"):
        fine = {"text": isinstance(value, str), "block": isinstance(value, dict)}
        fine["file"] = isinstance(value, str | dict) or value is False
        name = {"text": "a text", "block": "a mapping of keys", "file": "a path"}[kind]
        return None if fine[kind] else name
    if kind == "switch":
        fine_switch = isinstance(value, bool) or (
            quoted and str(value).lower() in ("true", "false")
        )
        return None if fine_switch else "true or false"
    number = _number(value, quoted=quoted)
    if kind == "number":
        return None if number is not None else "a number"
    least = 1 if kind == "positive" else -1
    fine_whole = number is not None and least <= number <= MOST_WHOLE and number == int(number)
    return None if fine_whole else f"a whole number from {least} to {MOST_WHOLE:,}"


@config_rule(
    "argument_wrong_type",
    "illegal",
    "transformers 5.23, training_args.py; LLaMA-Factory at ff6d4d1, hparams; axolotl at 067b021, utils/schemas; "
    "accelerate 1.15, config_args.py",
    deepspeed=False,
)
def argument_wrong_type(s: Setup) -> Iterable[Found]:
    """An argument whose value is of another kind than its framework reads."""
    if is_of(s, "deepspeed") or (is_of(s, "launch") and not s.meaning.trainer):
        return
    kinds = known("arguments")["trainer" if is_of(s, "launch") else s.meaning.framework]
    given = s.meaning.documents[MAIN].value if is_of(s, "accelerate") else arguments(s)
    # pydantic and a command line take numbers in quotes; dataclasses keep them as they stand.
    quoted = is_of(s, "axolotl", "accelerate", "launch")
    for key, kind in kinds.items():
        # LLaMA-Factory reads its file with OmegaConf, to which 1e-5 is a number; to PyYAML it is a text.
        exponent = is_of(s, "llamafactory") and _EXPONENT.fullmatch(str(given.get(key))) is not None
        wanted = expected(given.get(key), kind, quoted=quoted or exponent)
        if wanted is None or (is_of(s, "launch") and "$" in str(given.get(key))):
            continue  # what the shell works out is not known here
        value = given[key]
        meant = near(str(value), map(str, kind)) if isinstance(kind, list) else None
        if meant is None and isinstance(value, str) and expected(value, kind, quoted=True) is None:
            yield Found(
                what=f"{key} is the text {value!r}: {wanted} is expected", where=here(s, *at(s, key)),
                do="write it without quotes",
                edits=main_edits(set_to(*at(s, key), value=_plain(value))),
            )  # fmt: skip
            continue
        yield Found(
            what=f"{key} is {value!r}: {wanted} is expected", where=here(s, *at(s, key)),
            do=f"write {meant}" if meant else f"write {wanted}",
            edits=main_edits(set_to(*at(s, key), value=meant)) if meant else (),
        )  # fmt: skip


def _plain(text: str) -> bool | float | int:
    """The value that a text in quotes means."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = float(text)
    return int(number) if number == int(number) and "e" not in text.lower() else number

"""What pydantic takes for the kinds of `lists/deepspeed.yaml` (tried on the models of DeepSpeed 0.19.8)."""

from __future__ import annotations

import math
import re
from typing import Any

from outlay.planner.read.deepspeed import AUTO

_BOOLS = {"true", "false", "1", "0", "yes", "no", "on", "off", "t", "f", "y", "n"}
_WHOLE_TEXT = re.compile(r"\s*[+-]?\d+(_\d+)*(\.0+)?\s*")
_LARGEST = 2.0**63
"""A number with a point or an exponent must lie below; one that is written out may be larger."""
STAGES = (0, 1, 2, 3)


def number_of(value: Any) -> float | None:
    """The number that a value is read as; true is 1."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def stage_of(value: Any) -> int | None:
    """The ZeRO stage that `stage` is read as: "2" is 2, true is 1."""
    if isinstance(value, str) and not _WHOLE_TEXT.fullmatch(value):
        return None
    number = number_of(value)
    return int(number) if number in STAGES else None


def wrong(value: Any, kind: str) -> tuple[str, Any] | None:
    """(what is wrong, the nearest right value or null) by pydantic's rules; null where it is right."""
    if value == AUTO or kind == "any" or (value is None and kind in ("block", "text")):
        return None
    if kind == "bool":
        fine = (
            isinstance(value, bool)
            or (isinstance(value, int | float) and value in (0, 1))
            or str(value).lower() in _BOOLS
        )
        return None if fine else ("true or false is expected", None)
    if kind == "device":
        return _wrong_device(value)
    if kind == "text":
        return None if isinstance(value, str) else ("a text is expected", None)
    if kind == "block":
        return None if isinstance(value, dict) else ("a block in braces is expected", None)
    number = number_of(value)
    if number is None or not math.isfinite(number) or (kind == "scale" and isinstance(value, bool)):
        return ("a number is expected", None)
    if kind in ("fraction", "scale"):
        most = 1.0 if kind == "fraction" else math.inf
        fine = 0 <= number <= most
        return None if fine else (f"it must lie in [0, {most:g}]", min(max(number, 0.0), most))
    return _wrong_integer(value, number, kind)


def _wrong_device(value: Any) -> tuple[str, Any] | None:
    if value in ("none", "cpu", "nvme"):
        return None
    meant = "none" if value in (None, False, "null", "") else None
    return "the device is none, cpu or nvme", "cpu" if value in (True, "gpu") else meant


def _wrong_integer(value: Any, number: float, kind: str) -> tuple[str, Any] | None:
    if kind == "stage":
        if stage_of(value) is not None:
            return None
        nearest = int(number) if number in STAGES else 3 if number > max(STAGES) else 0
        return "ZeRO has stages 0, 1, 2 and 3", nearest
    if number != int(number):
        return ("a whole number is expected", round(number))
    if isinstance(value, str) and not _WHOLE_TEXT.fullmatch(value):
        return ("a text is read as a whole number only if it is written out", int(number))
    if isinstance(value, float) and abs(value) >= _LARGEST:
        return ("it is too large for a whole number with an exponent", 10**12)
    least = {"positive": 1, "count": 0}.get(kind)
    if least is not None and number < least:
        return (f"it must be at least {least}", least)
    return None

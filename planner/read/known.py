"""What each format knows: lists read from the frameworks' sources (`lists/*.yaml`, each with its source)."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from outlay.profiles.errors import UsageError

Version = tuple[int, ...]
LATEST = "0.19.8"
"""The version whose source was read line by line."""
OLDEST = "0.12.6"


@cache
def known(name: str) -> dict[str, Any]:
    """One list file."""
    text = (files("outlay.planner.read") / "lists" / f"{name}.yaml").read_text(encoding="utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value


@cache
def names(file: str, *path: str) -> frozenset[str]:
    """The names listed under a key."""
    value: Any = known(file)
    for key in path:
        value = value[key]
    return frozenset(str(value).split())


@cache
def trainer_names() -> frozenset[str]:
    """Keywords of TrainingArguments, of 4.x or of 5.x."""
    return names("trainer", "keys") | names("trainer", "only_4x")


def parse_version(text: str, where: str = "--deepspeed") -> Version:
    """`0.19.8` → (0, 19, 8)."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[.+-].*)?", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no version", where=where, do=f"write it as {LATEST}")
    return tuple(int(part or 0) for part in match.groups())


def holds(versions: str, version: Version) -> bool:
    """Whether `>=0.19.4,<0.20` takes a version."""
    for part in versions.split(","):
        sign, text = re.fullmatch(r"(>=|<)(.+)", part.strip()).groups()  # type: ignore[union-attr]
        bound = parse_version(text)
        if (version >= bound) is not (sign == ">="):
            return False
    return True

"""Where rules of the frameworks look, and how they edit the main document."""

from __future__ import annotations

from typing import Any

from outlay.planner.read.edits import Edit
from outlay.planner.read.meaning import MAIN, DocEdit
from outlay.planner.rules.setup import Setup


def main_edits(*edits: Edit) -> tuple[DocEdit, ...]:
    return tuple(DocEdit(document=MAIN, edit=edit) for edit in edits)


def here(s: Setup, *path: str) -> str:
    return s.meaning.documents[MAIN].where(path)


def arguments(s: Setup) -> dict[str, Any]:
    found: dict[str, Any] = s.meaning.flags.get("arguments", {})
    return found


def is_of(s: Setup, *frameworks: str) -> bool:
    return s.meaning.framework in frameworks


def at(s: Setup, key: str) -> tuple[str, ...]:
    return ("args", key) if is_of(s, "launch") else (key,)

"""The DeepSpeed file that another configuration names: beside it, in the working folder, or known by name."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

from outlay.planner.read.document import Document, parse_document, read_document
from outlay.planner.read.known import known

_HERE = re.compile(r"^(?:`pwd`|\$\(pwd\)|\$\{?PWD\}?)/")
_UP = 4
"""Scripts lie some folders below the one that they are started from."""


def _candidates(given: Path, beside: Path) -> list[Path]:
    """Where a named file may lie: beside the one that names it, in the working folder, or further up."""
    if given.is_absolute():
        return [given]
    above = [Path(os.path.normpath(beside / ("../" * up) / given)) for up in range(1, _UP + 1)]
    return [beside / given, given, *above]


def beside(reference: str, of: Document) -> Document | None:
    """A file that a document names; null where it is nowhere to be found. Raises FileError for rubbish."""
    if reference in of.beside:
        return of.beside[reference]
    given = Path(_HERE.sub("", reference)).expanduser()
    for candidate in _candidates(given, of.path.parent):
        if candidate.is_file():
            return read_document(candidate, str(candidate))
    return None


def companion(reference: str, of: Document) -> Document | None:
    """The DeepSpeed file that a document names; also one that comes with a framework and is known by name."""
    found = beside(reference, of)
    if found is not None:
        return found
    given = Path(reference)
    for name in known("bundled")["files"]:
        if reference.endswith(name) or (given.parent.name == "" and name.endswith("/" + reference)):
            text = json.dumps(bundled(name), indent=2) + "\n"
            return parse_document(text, Path(given.name), reference, on_disk=False)
    return None


def bundled(name: str) -> dict[str, Any]:
    """A framework's own file: what of it matters here."""
    lists = known("bundled")
    facts: dict[str, Any] = copy.deepcopy(lists["files"][name])
    precision = facts.pop("precision")
    blocks = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    return {
        **facts, **(blocks if precision == "auto" else {precision: {"enabled": True}}), **lists["common"],
    }  # fmt: skip

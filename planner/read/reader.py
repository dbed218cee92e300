"""A file → what it means."""

from __future__ import annotations

from pathlib import Path

from outlay.planner.read.accelerate import read_accelerate
from outlay.planner.read.axolotl import read_axolotl
from outlay.planner.read.deepspeed import read_deepspeed
from outlay.planner.read.document import Document, read_document
from outlay.planner.read.kinds import kind_of
from outlay.planner.read.launch import read_launch
from outlay.planner.read.llamafactory import read_llamafactory
from outlay.planner.read.meaning import Meaning
from outlay.planner.read.trainer import read_trainer

_READERS = {
    "deepspeed": read_deepspeed,
    "accelerate": read_accelerate,
    "axolotl": read_axolotl,
    "llamafactory": read_llamafactory,
    "trainer": read_trainer,
    "launch": read_launch,
}


def read_meaning(document: Document, kind: str | None = None) -> Meaning:
    """What a document means; `kind` where the person says whose format it is."""
    return _READERS[kind or kind_of(document)](document)


def read_configuration(path: str | Path, kind: str | None = None) -> Meaning:
    """Any configuration that `outlay check` knows. Raises FileError."""
    return read_meaning(read_document(Path(path).expanduser(), str(path)), kind)

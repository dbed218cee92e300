"""What a configuration means, whoever wrote it: model, batch, context, adapters, sharding, and where it says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from outlay.planner.read.document import Document, KeyPath
from outlay.planner.read.edits import Edit, remove, rename, set_to

MAIN, DEEPSPEED, ACCELERATE = "main", "deepspeed", "accelerate"
ARGUMENTS, LOOP, MODEL = "arguments", "loop", "model"
FIXED = {ARGUMENTS: "training_args.json", LOOP: "loop.json", MODEL: "model.json"}
"""Files that the program of `outlay emit` reads by their names: no other file says where they are."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A value with its place, or with the default that stands for it."""

    value: Any
    where: str = ""
    default: str = ""
    """Why it is taken where the file does not say; empty where it does."""
    place: tuple[str, KeyPath] | None = None
    """(document, path) that an edit would change."""


@dataclass(frozen=True, kw_only=True)
class DocEdit:
    """An edit and the document that it changes."""

    document: str
    edit: Edit


@dataclass(frozen=True, kw_only=True)
class Section:
    """The DeepSpeed configuration: a file of its own, a mapping inside another, or made from other keys."""

    config: dict[str, Any]
    """As DeepSpeed would get it before `auto` is filled."""
    document: str | None
    """Which document holds it; null where it is made from other keys."""
    prefix: KeyPath = ()
    translated: dict[KeyPath, KeyPath] = field(default_factory=dict)
    """DeepSpeed's path → the path in the holder, where it is made from other keys."""
    holder: str = MAIN
    """Which document those other keys are in."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """One configuration, read."""

    framework: str
    """deepspeed | accelerate | axolotl | llamafactory | trainer | launch."""
    documents: dict[str, Document]
    section: Section | None
    """Null where the configuration does not use DeepSpeed."""
    values: dict[str, Said]
    trainer: bool
    """transformers' Trainer or accelerate fills `auto`."""
    missing_file: str | None = None
    """A DeepSpeed file that is named and cannot be found."""
    flags: dict[str, Any] = field(default_factory=dict)
    """What only this framework's rules look at."""
    notes: tuple[str, ...] = ()

    def said(self, name: str) -> Any:
        """A value, or null."""
        found = self.values.get(name)
        return None if found is None else found.value

    def explicit(self, name: str) -> bool:
        """Whether the file itself says it."""
        found = self.values.get(name)
        return found is not None and not found.default

    def where(self, path: KeyPath) -> str:
        """Place of a DeepSpeed key: `file:line: key`."""
        document, real = self._real(path)
        return self.documents[document].where(real)

    def _real(self, path: KeyPath) -> tuple[str, KeyPath]:
        section = self.section
        if section is None:
            return MAIN, ()
        if section.document is None:
            for length in range(len(path), 0, -1):
                if path[:length] in section.translated:
                    return section.holder, section.translated[path[:length]]
            return section.holder, ()
        return section.document, (*section.prefix, *path)

    def set_deepspeed(self, path: KeyPath, value: Any) -> list[DocEdit]:
        """The edit that gives a DeepSpeed key a value; none where the files cannot say it."""
        section = self.section
        if section is None:
            return []
        if section.document is not None:
            edit = set_to(*section.prefix, *path, value=value)
            return [DocEdit(document=section.document, edit=edit)]
        if path in section.translated:
            edit = set_to(*section.translated[path], value=value)
            return [DocEdit(document=section.holder, edit=edit)]
        return []

    def remove_deepspeed(self, path: KeyPath) -> list[DocEdit]:
        """The edit that takes a DeepSpeed key away."""
        document, real = self._real(path)
        section = self.section
        if section is None or (section.document is None and path not in section.translated):
            return []
        return [DocEdit(document=document, edit=remove(*real))]

    def rename_deepspeed(self, path: KeyPath, key: str) -> list[DocEdit]:
        section = self.section
        if section is None or section.document is None:
            return []
        return [DocEdit(document=section.document, edit=rename(*section.prefix, *path, key=key))]

    def set_value(self, name: str, value: Any) -> list[DocEdit]:
        """The edit that changes one of the `values`; none where it has no place in the files."""
        said = self.values.get(name)
        if said is None or said.place is None:
            return []
        document, path = said.place
        return [DocEdit(document=document, edit=set_to(*path, value=value))]


def merged(weaker: dict[str, Said], arguments: dict[str, Said]) -> dict[str, Said]:
    """The script's arguments win, a default of theirs only where nothing else is said."""
    kept = {
        k: v for k, v in arguments.items() if not v.default or k not in weaker or weaker[k].default
    }
    return weaker | kept

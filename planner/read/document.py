"""A configuration file as text, values and places: every key knows its line, every value its span.

Places are what an error names (`file:line: key`) and what an edit replaces, so that a mended file keeps
its comments and its order. JSON and YAML become the same tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlay.profiles.errors import FileError

KeyPath = tuple[str | int, ...]
MOST_BYTES = 2_000_000
"""A configuration is kilobytes; what is larger is data, and reading it would only take long."""
MOST_NODES = 200_000
MOST_DEPTH = 60
_DATA = (".yaml", ".yml", ".json", ".hjson", ".jsonc")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One value with where it stands; offsets are into the text, lines count from 1."""

    value: Any
    """Plain Python: dict, list or scalar."""
    start: int
    end: int
    line: int
    key_start: int | None = None
    """Where its key begins; null for items of a list and the root."""
    key_end: int | None = None
    key_line: int | None = None
    flow: bool = False
    """Written in braces or brackets."""
    children: dict[str | int, Node] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Twice:
    """A key that stands twice in one mapping; the later one counts."""

    path: KeyPath
    line: int
    """Of the later one."""
    earlier: Node


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file that was read."""

    path: Path
    name: str
    """As the person typed it; what messages say."""
    text: str
    root: Node
    syntax: str
    """json | yaml | command."""
    twice: tuple[Twice, ...] = ()
    relaxed: tuple[tuple[int, int, str], ...] = ()
    """JSON only: (start, end, what) of comments and trailing commas, which strict readers refuse."""
    on_disk: bool = True
    """False for a file that comes with a framework and is known without being here."""
    beside: dict[str, Document] = field(default_factory=dict)
    """Files that it names, as already read: looked at before the disk."""

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = self.root.value
        return value

    def node(self, path: KeyPath) -> Node | None:
        """The node at a path, or null."""
        node: Node | None = self.root
        for key in path:
            node = None if node is None else node.children.get(key)
        return node

    def get(self, *path: str | int, default: Any = None) -> Any:
        """The value at a path; the default where there is none, and where it is null."""
        node = self.node(path)
        return default if node is None or node.value is None else node.value

    def line(self, path: KeyPath) -> int:
        """Line of a key, or of the nearest parent that is there."""
        for length in range(len(path), 0, -1):
            node = self.node(path[:length])
            if node is not None:
                return node.key_line or node.line
        return self.root.line

    def where(self, path: KeyPath) -> str:
        """`file:line: a.b.c`; without a line where the file is not here."""
        dotted = ".".join(map(str, path))
        name = f"{self.name}:{self.line(path)}" if self.on_disk else f"{self.name} (not here)"
        return name + (f": {dotted}" if dotted else "")

    def leaves(self) -> Iterator[tuple[KeyPath, Node]]:
        """Every node below the root with its path, parents first."""

        def walk(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Node]]:
            for key, child in node.children.items():
                yield (*path, key), child
                yield from walk(child, (*path, key))

        return walk(self.root, ())


def read_text(path: Path, name: str) -> str:
    """The text of a file. Raises FileError for what is no configuration."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise FileError("this is a folder, a file was expected", where=name)
        if size > MOST_BYTES:
            raise FileError(
                f"{size / 1e6:,.1f} MB is too large for a configuration", where=name,
                why=f"at most {MOST_BYTES / 1e6:g} MB are read",
                do="pass the configuration file itself, not the data or the weights",
            )  # fmt: skip
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FileError("no such file", where=name) from None
    except OSError as error:
        raise FileError("cannot be read", where=name, why=error.strerror or str(error)) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise FileError(
            "not a text file", where=f"{name}:{line}",
            why=f"byte {error.start} is {raw[error.start]:#04x}, which is not UTF-8",
            do="pass a JSON, YAML or shell file",
        ) from None  # fmt: skip
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise FileError("not a text file", where=f"{name}:{line}", why="it holds a zero byte")
    if not text.strip():
        raise FileError("the file is empty", where=name)
    return text


def read_document(path: Path, name: str | None = None) -> Document:
    """A JSON or YAML file. Raises FileError with the line of what is wrong."""
    name = name or str(path)
    return parse_document(read_text(path, name), path, name)


def parse_document(text: str, path: Path, name: str, *, on_disk: bool = True) -> Document:
    """By its suffix; else a launch command where there is one, JSON by its first brace, or YAML."""
    from outlay.planner.read.command_text import SUFFIXES, looks_like_command, parse_command
    from outlay.planner.read.json_text import parse_json
    from outlay.planner.read.yaml_text import parse_yaml

    suffix = path.suffix.lower()
    if suffix in SUFFIXES or (suffix not in _DATA and looks_like_command(text)):
        root = parse_command(text, name)
        return Document(path=path, name=name, text=text, root=root, syntax="command")
    is_json = suffix in _DATA[2:] or (suffix not in _DATA and text.lstrip()[:1] == "{")
    parse = parse_json if is_json else parse_yaml
    root, twice, relaxed = parse(text, name)
    if not isinstance(root.value, dict):
        kind = {list: "a list", str: "a text", type(None): "nothing"}.get(
            type(root.value), type(root.value).__name__
        )
        raise FileError(
            f"a mapping of keys was expected, found {kind}", where=f"{name}:{root.line}",
            do="outlay check reads DeepSpeed JSON, Accelerate, axolotl and LLaMA-Factory YAML, "
            "Trainer arguments, and shell files with a launch command",
        )  # fmt: skip
    return Document(
        path=path, name=name, text=text, root=root, syntax="json" if is_json else "yaml",
        twice=tuple(twice), relaxed=tuple(relaxed), on_disk=on_disk,
    )  # fmt: skip

"""Which files make a corpus, and their text: found, sorted, checked, read in pieces."""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlay.profiles.errors import FileError

PIECE_BYTES = 4 * 2**20
"""Files are read and tokenized in pieces of about this size, cut at a line end."""

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_NOT_STANDARD = frozenset({"site-packages", "dist-packages", "__pycache__", "ensurepip"})
"""Installed packages and bundled wheels are no part of the standard library's own source."""

Verdict = Literal["text", "empty", "binary", "undecodable", "unreadable"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of a corpus. `name` is its path below the folder that all files share."""

    path: Path
    name: str
    size_bytes: int


def standard_library_files() -> list[Path]:
    """The .py files of Python's own standard library, without its tests; sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in _walk(root, _TEST_FOLDERS | _NOT_STANDARD) if p.suffix == ".py"]


def text_files(path: str | Path) -> list[Path]:
    """The file itself, or all files below a folder; sorted; hidden ones and links left out."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileError("no such file or folder", where=str(path), do="pass --data FILE or FOLDER")
    found = _walk(path, frozenset())
    if not found:
        raise FileError("the folder holds no files", where=str(path))
    return found


def _walk(root: Path, skip: frozenset[str]) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if d not in skip and not d.startswith(".")]
        here = Path(folder)
        found += [here / f for f in files if not f.startswith(".")]
    return sorted(p for p in found if p.is_file() and not p.is_symlink())


def name_sources(files: list[Path]) -> list[Source]:
    """Names that do not depend on where the corpus lies: relative to the nearest shared folder."""
    unique = sorted({Path(f).absolute() for f in files})
    if not unique:
        raise FileError("no files were given, so there is no corpus")
    shared = os.path.commonpath([str(f.parent) for f in unique])
    try:
        return [
            Source(path=f, name=f.relative_to(shared).as_posix(), size_bytes=f.stat().st_size)
            for f in unique
        ]
    except OSError as error:
        raise FileError("cannot be read", where=str(error.filename), why=str(error)) from None


def examine(path: Path) -> Verdict:
    """Whether a file is UTF-8 text with something in it; the whole file is looked at, in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    blank = True
    try:
        with path.open("rb") as handle:
            while piece := handle.read(PIECE_BYTES):
                if b"\0" in piece:
                    return "binary"
                blank = not decoder.decode(piece).strip() and blank
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "undecodable"
    except OSError:
        return "unreadable"
    return "empty" if blank else "text"


def pieces(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The text between two byte positions, in pieces that end at a line end where there is one."""
    with path.open("rb") as handle:
        handle.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        rest = b""
        while left > 0 and (read := handle.read(min(PIECE_BYTES, left))):
            left -= len(read)
            rest += read
            cut = len(rest) if left <= 0 else rest.rfind(b"\n") + 1
            if cut:
                yield rest[:cut].decode("utf-8")
                rest = rest[cut:]
        if rest:
            yield rest.decode("utf-8")


def line_start_at(path: Path, position: int) -> int:
    """The first line start at or after a byte position; the file's size where there is none."""
    with path.open("rb") as handle:
        handle.seek(max(0, position - 1))
        handle.readline()
        return handle.tell()

"""What control groups allow this process: CPU time and memory, versions 1 and 2.

A limit may sit anywhere between the process's own group and the root, so every level counts.
https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as the largest page-aligned 63-bit number."""


@dataclass(frozen=True, kw_only=True)
class CgroupLimits:
    """Null where no group sets a limit."""

    cores: float | None = None
    """CPU seconds a second."""
    memory_bytes: int | None = None
    memory_left_bytes: int | None = None
    """Of the tightest group: limit less use, where page cache that can be dropped is not use."""


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """The tightest limits on this process. `root` is where `proc` and the group mounts hang."""
    cores = [*_each(root, "cpu", 2, _cores_v2), *_each(root, "cpu", 1, _cores_v1)]
    memory = [*_each(root, "memory", 2, _memory_v2), *_each(root, "memory", 1, _memory_v1)]
    return CgroupLimits(
        cores=min(cores, default=None),
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_left_bytes=min((max(0, left) for _, left in memory), default=None),
    )


def _each(
    root: Path, controller: str, version: int, read: Callable[[Path], T | None]
) -> Iterator[T]:
    for folder in _folders(root, controller, version):
        value = read(folder)
        if value is not None:
            yield value


def _folders(root: Path, controller: str, version: int) -> list[Path]:
    """The process's group of one controller and its parents, innermost first."""
    group, mount = _group(root, controller, version), _mount(root, controller, version)
    if group is None or mount is None:
        return []
    mounted, point = mount
    top = root / point.lstrip("/")
    # In a container the mount shows a subtree: the part above it is not in the path. A group
    # outside that subtree ("/..") is seen only as the top of the mount.
    inside = group.removeprefix(mounted.rstrip("/")) if group.startswith(mounted) else "/"
    folder = top / inside.lstrip("/")
    if ".." in folder.parts or not folder.is_dir():
        folder = top
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


def _group(root: Path, controller: str, version: int) -> str | None:
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        found = controllers.split(",")
        if (version == 2 and number == "0" and found == [""]) or (
            version == 1 and controller in found
        ):
            return path
    return None


def _mount(root: Path, controller: str, version: int) -> tuple[str, str] | None:
    """(which group is mounted, where), from mountinfo; see proc(5)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(" ", 2)
        if (version == 2 and kind == "cgroup2") or (
            version == 1 and kind == "cgroup" and controller in options.split(",")
        ):
            return fields[3], fields[4]
    return None


def _cores_v2(folder: Path) -> float | None:
    words = " ".join(_lines(folder / "cpu.max")).split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _cores_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _memory_v2(folder: Path) -> tuple[int, int] | None:
    return _memory(folder, "memory.max", "memory.current", "inactive_file")


def _memory_v1(folder: Path) -> tuple[int, int] | None:
    return _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory(folder: Path, limit: str, used: str, cache: str) -> tuple[int, int] | None:
    """(limit, what is left of it) in bytes."""
    limit_bytes = _number(folder / limit)
    if limit_bytes is None or limit_bytes >= UNLIMITED_BYTES:
        return None
    droppable = 0
    for line in _lines(folder / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == cache:
            droppable = int(value)
    return limit_bytes, limit_bytes - max(0, (_number(folder / used) or 0) - droppable)


def _number(path: Path) -> int | None:
    """A count in a file of its own; null where there is none, or it says "max" or -1."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

"""Efficiency figures: how much of a datasheet is reached, with an interval and a source each.

They live in `profiles/efficiency/*.yaml`. Layers, later over earlier: `common.yaml`, the kind of
accelerator (`gpu.yaml`, `cpu.yaml`), its architecture (`ampere.yaml`), the accelerator itself;
the last two where a file of that name exists. Then the same files of this user, which `outlay calibrate`
writes: OUTLAY_EFFICIENCY, else $XDG_CONFIG_HOME/outlay/efficiency (`off` = not read).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from outlay.profiles.errors import FileError, UnknownName
from outlay.profiles.loader import Accelerator, read_yaml

SCHEMA_EFFICIENCY = "outlay/efficiency@1"
KINDS = ("measured", "fitted", "published", "derived", "guess")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number with its 90 % interval."""

    value: float
    low: float
    high: float
    kind: str
    """measured | fitted | published | derived | guess."""
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FileError(f"kind is {self.kind!r}, one of {', '.join(KINDS)} was expected")


class Efficiency(Mapping[str, float]):
    """Name → expected value; `figure(name)` has the interval and the source. Remembers what was read."""

    def __init__(self, figures: Mapping[str, Figure]) -> None:
        self._figures = dict(figures)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> float:
        return self.figure(name).value

    def __iter__(self) -> Any:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def figure(self, name: str) -> Figure:
        """The whole figure; UnknownName where no layer has it."""
        if name not in self._figures:
            raise UnknownName("efficiency figure", name, self._figures)
        self.used.add(name)
        return self._figures[name]

    def guesses(self) -> list[tuple[str, Figure]]:
        """The figures used so far that nobody measured, for an estimate's `assumptions`."""
        return [(n, f) for n in sorted(self.used) if (f := self._figures[n]).kind == "guess"]


@cache
def _layer(name: str) -> dict[str, Figure]:
    try:
        raw = read_yaml(f"efficiency/{name}.yaml")
    except FileNotFoundError:
        return {}
    if raw.get("schema") != SCHEMA_EFFICIENCY:
        raise FileError(f"schema is {raw.get('schema')!r}", where=f"efficiency/{name}.yaml")
    return {key: Figure(**value) for key, value in raw["figures"].items()}


def own_folder() -> Path | None:
    """Where this user's own figures lie; None where they are switched off."""
    given = os.environ.get("OUTLAY_EFFICIENCY", "")
    if given.lower() == "off":
        return None
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(given).expanduser() if given else Path(base) / "outlay" / "efficiency"


def _own_layer(path: Path) -> dict[str, Figure]:
    try:
        return _own_figures(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@cache
def _own_figures(path: Path, changed_ns: int) -> dict[str, Figure]:
    from outlay.planner.spec.files import read_mapping

    raw = read_mapping(path)
    if raw.get("schema") != SCHEMA_EFFICIENCY:
        raise FileError(f"schema is {raw.get('schema')!r}", where=str(path))
    try:
        return {key: Figure(**value) for key, value in raw["figures"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise FileError(
            "is not a file of efficiency figures", where=str(path), why=str(error),
            do="write it anew with `outlay calibrate`, or move it away",
        ) from None  # fmt: skip


def architecture_of(accelerator: Accelerator) -> str:
    """The architecture as the files are named: `blackwell-ultra`; empty where it is unknown."""
    return (accelerator.architecture or "").lower().replace(" ", "-")


def layers_of(accelerator: Accelerator) -> tuple[str, ...]:
    """Names of the files that may hold figures for this accelerator, the most general first."""
    kind = "cpu" if accelerator.kind == "cpu" else "gpu"
    architecture = architecture_of(accelerator)
    return tuple(dict.fromkeys(("common", kind, *filter(None, [architecture]), accelerator.name)))


def efficiency_for(accelerator: Accelerator) -> Efficiency:
    """All figures that hold for this accelerator."""
    figures: dict[str, Figure] = {}
    for name in layers_of(accelerator):
        figures |= _layer(name)
    if (own := own_folder()) is not None:
        for name in layers_of(accelerator):
            figures |= _own_layer(own / f"{name}.yaml")
    return Efficiency(figures)

"""What totals take for granted: profiles/assumptions.yaml, and what a person sets of it (`--assume`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from outlay.planner.spec.job import Assume
from outlay.profiles.errors import FileError, UnknownName, UsageError
from outlay.profiles.loader import read_yaml

SCHEMA_ASSUMPTIONS = "outlay/assumptions@1"
END = ("low", "expected", "high")
WHERE = "--assume"


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One figure that nobody measured for this run, ordered from cheap to dear: its 5 % end, its expected
    value and its 95 % end."""

    low: float
    expected: float
    high: float
    source: str

    def __post_init__(self) -> None:
        if not all(math.isfinite(getattr(self, end)) for end in END):
            raise UsageError("an assumption has to be a finite number", why=self.source)


def as_asked(value: float, source: str) -> Assumption:
    """A figure that a person set: low = expected = high."""
    return Assumption(low=value, expected=value, high=value, source=source)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An assumption with what it means and what it may be set to."""

    assumption: Assumption
    within: tuple[float, float]
    says: str


@cache
def figures() -> dict[str, Figure]:
    """Those of profiles/assumptions.yaml, by name."""
    raw = read_yaml("assumptions.yaml")
    if raw.get("schema") != SCHEMA_ASSUMPTIONS:
        raise FileError(f"schema is {raw.get('schema')!r}", where="assumptions.yaml")
    return {
        name: Figure(
            within=tuple(value.pop("within")),
            says=value.pop("says"),
            assumption=Assumption(**value),
        )
        for name, value in raw["figures"].items()
    }


def with_set(rows: Iterable[Assume]) -> dict[str, Assumption]:
    """All of them, with what the person set in its place."""
    found = {name: f.assumption for name, f in figures().items()}
    for row in rows:
        found[row.name] = Assumption(
            low=row.low, expected=row.expected, high=row.high, source=WHERE
        )
    return found


def parse_assumed(texts: Iterable[str] | str | Mapping[str, Any] | None) -> tuple[Assume, ...]:
    """`["pue=1.2", "life_years=6/5/3"]`: one number, or the cheap end / expected / the dear end."""
    if isinstance(texts, Mapping):
        texts = [f"{k}={v}" for k, v in texts.items()]
    rows = {}
    for text in (texts,) if isinstance(texts, str) else texts or ():
        name, sign, value = (part.strip() for part in text.partition("="))
        name = name.lower().replace("-", "_")
        if not sign:
            raise UsageError(f"{text!r} sets nothing", where=WHERE, do="give NAME=VALUE: pue=1.2")
        if name not in figures():
            raise UnknownName("assumption", name, figures(), where=WHERE)
        if name in rows:
            raise UsageError(f"{name} is set twice", where=WHERE)
        rows[name] = _assume(name, value)
    return tuple(rows.values())


def _assume(name: str, text: str) -> Assume:
    figure, parts = figures()[name], text.split("/")
    try:
        values = [float(p) for p in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise UsageError(
            f"{name}={text}: neither one number nor three", where=WHERE,
            do=f"give {name}=VALUE, or {name}=CHEAP/EXPECTED/DEAR",
        )  # fmt: skip
    low, middle, high = values * 3 if len(values) == 1 else values
    least, most = figure.within
    outside = [v for v in values if not least <= v <= most]
    if outside:
        raise UsageError(
            f"{name} of {outside[0]:g} makes no sense", where=WHERE,
            why=f"{figure.says}: between {least:g} and {most:g}",
        )  # fmt: skip
    if not min(low, high) <= middle <= max(low, high):
        raise UsageError(f"{name}={text}: the expected value lies outside its ends", where=WHERE)
    ours = figure.assumption
    if (high - low) * (ours.high - ours.low) < 0:
        raise UsageError(
            f"{name}={text} has its ends the wrong way round", where=WHERE,
            why=f"the cheap end comes first, the dear end last: ours is "
            f"{ours.low:g}/{ours.expected:g}/{ours.high:g}",
            do=f"give {name}={high:g}/{middle:g}/{low:g}",
        )  # fmt: skip
    return Assume(name=name, low=low, expected=middle, high=high)

"""Wall time, money, energy and CO2e of a project under terms of rent. Every number may be an array.

Young 1974 / Daly 2006 (doi 10.1016/j.future.2004.11.016): with a mean time M between interruptions
and d for a save, saving every √(2·d·M) loses √(2·d/M) of the time, and each interruption its restart.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from outlay.planner.cost import Range
from outlay.profiles.errors import FileError, UsageError
from outlay.profiles.loader import read_yaml

Numbers = Any
"""A float, or an array with one entry an option."""

TermsKind = Literal["on_demand", "spot", "reserved", "owned", "buy"]
END = ("low", "expected", "high")
SCHEMA_ASSUMPTIONS = "outlay/assumptions@1"
STALE_DAYS = 90


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One figure that nobody measured for this run, ordered from cheap to dear."""

    low: float
    expected: float
    high: float
    source: str

    def __post_init__(self) -> None:
        if not all(np.isfinite(getattr(self, end)) for end in END):
            raise UsageError("an assumption has to be a finite number", why=self.source)


def as_asked(value: float, source: str) -> Assumption:
    """A figure that a person set: low = expected = high."""
    return Assumption(low=value, expected=value, high=value, source=source)


@dataclass(frozen=True, kw_only=True)
class CostAssumptions:
    """What a total takes for granted."""

    setup_h: Assumption
    evaluation_fraction: Assumption
    save_s: Assumption
    restart_h: Assumption
    spot_preemptions_node_day: Assumption
    mtbf_accelerator_h: Assumption
    tdp_fraction: Assumption
    pue: Assumption
    minimum_h: Assumption
    """Billed at least, each time the hardware is taken."""
    attempts: Assumption
    pilot_fraction: Assumption


@cache
def usual() -> CostAssumptions:
    """Those of profiles/assumptions.yaml, for one attempt without a pilot."""
    raw = read_yaml("assumptions.yaml")
    if raw.get("schema") != SCHEMA_ASSUMPTIONS:
        raise FileError(f"schema is {raw.get('schema')!r}", where="assumptions.yaml")
    return CostAssumptions(
        **{name: Assumption(**value) for name, value in raw["figures"].items()},
        attempts=as_asked(1.0, "one run (--attempts)"),
        pilot_fraction=as_asked(0.0, "none (--pilot)"),
    )


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How the whole cluster is paid for."""

    kind: TermsKind
    price_usd_per_h: Range | None
    kgco2e_per_kwh: float | None = None
    """Null = no figure is known for the region, so neither is the CO2e."""


@dataclass(frozen=True, kw_only=True)
class ProjectCost:
    """Null = not known, never zero."""

    wall_s: Range
    gpu_hours: Range
    cost_usd: Range | None
    energy_kwh: Range | None
    co2e_kg: Range | None
    included: tuple[dict[str, object], ...]


def lost_fraction(
    terms: Terms, nodes: Numbers, accelerators: Numbers, values: dict[str, float]
) -> Any:
    """Part of the time that failures and preemptions take (Young/Daly), 1 where nothing is left."""
    per_h = np.asarray(accelerators) / values["mtbf_accelerator_h"]
    if terms.kind == "spot":
        per_h = per_h + np.asarray(nodes) * values["spot_preemptions_node_day"] / 24.0
    lost = np.sqrt(2.0 * values["save_s"] / 3600.0 * per_h) + values["restart_h"] * per_h
    return np.minimum(lost, 1.0)


def _scaled(a: Range, factors: dict[str, Any]) -> Range:
    return Range(**{end: getattr(a, end) * factors[end] for end in END})


def project_cost(
    terms: Terms, training_s: Range, *, accelerators: Numbers, nodes: Numbers, tdp_w: Numbers | None,
    assumptions: CostAssumptions | None = None,
) -> ProjectCost:  # fmt: skip
    """All attempts and the pilot, each set up and billed apart; infinite where interruptions leave no time
    for work."""
    taken = vars(assumptions or usual())
    at = {end: {name: getattr(a, end) for name, a in taken.items()} for end in END}
    hours: dict[str, Any] = {}
    starts: dict[str, float] = {}
    for end, v in at.items():
        starts[end] = v["attempts"] + (v["pilot_fraction"] > 0)
        one = np.asarray(getattr(training_s, end)) / 3600.0 * (1.0 + v["evaluation_fraction"])
        work = one * (v["attempts"] + v["pilot_fraction"])
        with np.errstate(divide="ignore"):
            hours[end] = v["setup_h"] * starts[end] + work / (
                1.0 - lost_fraction(terms, nodes, accelerators, v)
            )
    wall = Range(**{end: h * 3600.0 for end, h in hours.items()})
    gpu_hours = Range(**{end: h * accelerators for end, h in hours.items()})
    price = terms.price_usd_per_h
    cost = energy = co2e = None
    if price is not None:
        billed = {e: np.maximum(h, at[e]["minimum_h"] * starts[e]) for e, h in hours.items()}
        cost = _scaled(price, billed)
    if tdp_w is not None:
        watts = {end: tdp_w * v["tdp_fraction"] * v["pue"] / 1e3 for end, v in at.items()}
        energy = _scaled(gpu_hours, watts)
        if terms.kgco2e_per_kwh is not None:
            co2e = _scaled(energy, dict.fromkeys(END, terms.kgco2e_per_kwh))
    included = tuple({"what": n, "value": a.expected, "source": a.source} for n, a in taken.items())
    return ProjectCost(
        wall_s=wall, gpu_hours=gpu_hours, cost_usd=cost, energy_kwh=energy, co2e_kg=co2e,
        included=included,
    )  # fmt: skip


def price_age_mark(date: datetime.date | None, today: datetime.date) -> str:
    """What stands beside a price: nothing, `undated !` or `96 days !`."""
    if date is None:
        return "undated !"
    days = (today - date).days
    return f"{days} days !" if days > STALE_DAYS else ""

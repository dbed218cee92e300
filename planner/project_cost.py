"""Wall time, money, energy and CO2e of a project under terms of rent. Every number may be an array.

Young 1974 / Daly 2006 (doi 10.1016/j.future.2004.11.016): with a mean time M between interruptions
and d for a save, saving every √(2·d·M) loses √(2·d/M) of the time, and each interruption its restart.

Intervals are 90 %: each assumption is moved alone to its two ends, and the logarithms of what that does to
the total are added in quadrature. Right to first order where the figures are independent and their ends
are 5 and 95 %; ends that are guesses make the interval one too.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from outlay.planner.assumed import END as END
from outlay.planner.assumed import Assumption as Assumption
from outlay.planner.assumed import as_asked as as_asked
from outlay.planner.assumed import figures
from outlay.planner.cost import Range

Numbers = Any
"""A float, or an array with one entry an option."""

TermsKind = Literal["on_demand", "spot", "reserved", "owned", "unpriced", "buy"]
STALE_DAYS = 90
YEAR_H = 8760.0
"""What a reservation of a year is billed for, used or not."""


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
    server_power_factor: Assumption
    pue: Assumption
    minimum_h: Assumption
    """Billed at least, each time the hardware is taken."""
    attempts: Assumption
    pilot_fraction: Assumption


OF_TOTALS = tuple(CostAssumptions.__dataclass_fields__)


@cache
def usual() -> CostAssumptions:
    """Those of profiles/assumptions.yaml, for one attempt without a pilot."""
    return CostAssumptions(
        **{name: f.assumption for name, f in figures().items() if name in OF_TOTALS},
        attempts=as_asked(1.0, "one run (--attempts)"),
        pilot_fraction=as_asked(0.0, "none (--pilot)"),
    )


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How the whole cluster is paid for."""

    kind: TermsKind
    price_usd_per_h: Range | None
    fixed_usd_a_year: Range | None = None
    """Paid at any use, for a year at least: of a machine that is bought for the project alone."""
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
    terms: Terms, nodes: Numbers, accelerators: Numbers, values: dict[str, Any]
) -> Any:
    """Part of the time that failures and preemptions take (Young/Daly), 1 where nothing is left."""
    per_h = np.asarray(accelerators) / values["mtbf_accelerator_h"]
    if terms.kind == "spot":
        per_h = per_h + np.asarray(nodes) * values["spot_preemptions_node_day"] / 24.0
    lost = np.sqrt(2.0 * values["save_s"] / 3600.0 * per_h) + values["restart_h"] * per_h
    return np.minimum(lost, 1.0)


def billed_h(kind: TermsKind, hours: Numbers, least_h: Numbers) -> Any:
    """Hours on the bill: at least the minimum; of a reservation, whole years."""
    if kind == "reserved":
        return np.ceil(np.asarray(hours) / YEAR_H - 1e-9) * YEAR_H
    return np.maximum(hours, least_h)


def years_owned(hours: Numbers) -> Any:
    """Of a machine that is bought for one project: as long as that takes, and a year at least."""
    return np.maximum(1.0, np.asarray(hours) / YEAR_H)


def one_at_a_time(rows: Sequence[Any]) -> list[Any]:
    """Each figure (anything with low, expected, high) along an axis of 1 + 2·k: all as expected, then one
    after the other at its low and at its high end."""
    found = []
    for i, row in enumerate(rows):
        values = np.full(1 + 2 * len(rows), row.expected)
        values[1 + 2 * i], values[2 + 2 * i] = row.low, row.high
        found.append(values)
    return found


def in_quadrature(values: Any) -> Range:
    """The 90 % interval of a total from its values along the axis of `one_at_a_time`."""
    middle = values[0]
    if len(values) == 1:
        return Range(low=middle, expected=middle, high=middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.log(values[1:] / middle).reshape(-1, 2, *np.shape(middle))
        moved = np.nan_to_num(moved, nan=0.0, posinf=np.inf, neginf=-np.inf)
        up = np.sqrt(np.sum(np.maximum(moved.max(axis=1), 0.0) ** 2, axis=0))
        down = np.sqrt(np.sum(np.minimum(moved.min(axis=1), 0.0) ** 2, axis=0))
        return Range(low=middle * np.exp(-down), expected=middle, high=middle * np.exp(up))


def may_never_end(
    terms: Terms, nodes: int, accelerators: int, assumptions: CostAssumptions
) -> bool:
    """Interruptions may leave no time for work: already with one assumption at its dear end."""
    taken = vars(assumptions)
    names = ("mtbf_accelerator_h", "spot_preemptions_node_day", "save_s", "restart_h")
    v = dict(zip(names, one_at_a_time([taken[n] for n in names]), strict=True))
    return bool(np.any(lost_fraction(terms, nodes, accelerators, v) >= 1.0))


def project_cost(
    terms: Terms, training_s: Range, *, accelerators: Numbers, nodes: Numbers, tdp_w: Numbers | None,
    assumptions: CostAssumptions | None = None, interval: bool = True,
) -> ProjectCost:  # fmt: skip
    """All attempts and the pilot, each set up and billed apart; infinite where interruptions leave no time
    for work. `accelerators`, `nodes` and `tdp_w` may be arrays. Without `interval`, low = expected = high."""
    taken = vars(assumptions or usual())
    price = terms.price_usd_per_h or as_asked(0.0, "unknown")
    fixed = terms.fixed_usd_a_year or as_asked(0.0, "none")
    rows = [training_s, price, fixed, *taken.values()]
    columns = one_at_a_time(rows) if interval else [np.array([r.expected]) for r in rows]
    if np.ndim(accelerators):
        columns = [c[:, None] for c in columns]
    training, usd_per_h, usd_a_year = columns[:3]
    v = dict(zip(taken, columns[3:], strict=True))
    starts = v["attempts"] + (v["pilot_fraction"] > 0)
    work = (
        training / 3600.0 * (1.0 + v["evaluation_fraction"]) * (v["attempts"] + v["pilot_fraction"])
    )
    with np.errstate(divide="ignore"):
        hours = v["setup_h"] * starts + work / (1.0 - lost_fraction(terms, nodes, accelerators, v))
    cost = energy = co2e = None
    if terms.price_usd_per_h is not None:
        billed = billed_h(terms.kind, hours, v["minimum_h"] * starts)
        owned = usd_a_year * years_owned(hours) if terms.fixed_usd_a_year is not None else 0.0
        cost = in_quadrature(usd_per_h * billed + owned)
    if tdp_w is not None:
        energy = in_quadrature(hours * accelerators * kw_an_accelerator(tdp_w, v) * v["pue"])
        if terms.kgco2e_per_kwh is not None:
            co2e = Range(**{end: getattr(energy, end) * terms.kgco2e_per_kwh for end in END})
    included = tuple({"what": n, "value": a.expected, "source": a.source} for n, a in taken.items())
    return ProjectCost(
        wall_s=in_quadrature(hours * 3600.0), gpu_hours=in_quadrature(hours * accelerators),
        cost_usd=cost, energy_kwh=energy, co2e_kg=co2e, included=included,
    )  # fmt: skip


def kw_an_accelerator(tdp_w: Numbers, values: dict[str, Any]) -> Any:
    """Kilowatts that one accelerator and its share of the server draw on average, cooling apart."""
    return tdp_w / 1e3 * values["tdp_fraction"] * values["server_power_factor"]


def price_age_mark(date: datetime.date | None, today: datetime.date) -> str:
    """What stands beside a price: nothing, `undated !` or `96 days !`."""
    if date is None:
        return "undated !"
    days = (today - date).days
    return f"{days} days !" if days > STALE_DAYS else ""

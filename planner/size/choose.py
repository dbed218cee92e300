"""Which of the points are worth a line: the front of time and money, and the best by the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from outlay.planner.size.engine import Point, Sizer, Timed, TooSmall
from outlay.planner.size.money import Total, least_hours, totals
from outlay.planner.size.offers import Offer

OBJECTIVES = ("balanced", "cheapest", "fastest", "energy", "carbon")
STEADY = ("on_demand", "reserved", "owned")
"""Prices under which nobody takes the machine away."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One piece of hardware, its best strategy, its price."""

    offer: Offer
    nodes: int
    timed: Timed
    total: Total

    @property
    def hours(self) -> float:
        return self.total.hours.expected

    @property
    def usd(self) -> float | None:
        return None if self.total.usd is None else self.total.usd.expected

    @property
    def steady(self) -> bool:
        return self.total.terms in STEADY


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the answer must keep; null = no limit."""

    hours: float | None = None
    usd: float | None = None
    gpu_hours: float | None = None
    energy_kwh: float | None = None
    co2e_kg: float | None = None

    def broken(self, o: Option) -> list[str]:
        """Which are exceeded, at the expected figures."""
        t = o.total
        pairs = (
            ("deadline", t.hours.expected, self.hours),
            ("budget", None if t.usd is None else t.usd.expected, self.usd),
            ("gpu_hours", t.accelerator_hours, self.gpu_hours),
            ("energy", t.energy_kwh, self.energy_kwh),
            ("carbon", t.co2e_kg, self.co2e_kg),
        )
        return [n for n, v, limit in pairs if limit is not None and (v is None or v > limit)]


@dataclass(kw_only=True)
class Found:
    """What the search saw."""

    options: list[Option] = field(default_factory=list)
    """All that keep the limits."""
    over: list[Option] = field(default_factory=list)
    """Timed, but beyond a limit."""
    small: list[tuple[Point, TooSmall]] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    points: int = 0
    timed: int = 0
    considered: int = 0
    fitting: int = 0


_WEIGHT: dict[str, Callable[[Option], float | None]] = {
    "balanced": lambda o: None if o.usd is None else o.usd * o.hours,
    "cheapest": lambda o: o.usd,
    "fastest": lambda o: o.hours,
    "energy": lambda o: o.total.energy_kwh,
    "carbon": lambda o: o.total.co2e_kg,
}


def weight(objective: str, o: Option) -> float:
    """What is to be small; infinite where it is unknown."""
    value = _WEIGHT[objective](o)
    return float("inf") if value is None else value


def _bounds(p: Point) -> list[tuple[bool, float, float | None]]:
    """(steady, least hours, least money) of each price of each seller."""
    rows = []
    for offer in p.offers:
        for terms, usd in offer.usd_per_h.items() or [("owned", None)]:
            hours, billed = least_hours(p.bound_s / 3600, terms, p.nodes, p.cluster.ranks)
            rows.append((terms in STEADY, hours, None if usd is None else usd * p.nodes * billed))
    return rows


def explore(sizer: Sizer, points: list[Point], limits: Limits, *, prune: bool = True) -> Found:
    """Time what can still be on the front of its kind of price, or best by an objective."""
    found = Found(points=len(points))
    fronts: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    def least(p: Point) -> float:
        return min((h * (m if m is not None else h) for _, h, m in _bounds(p)), default=0.0)

    for p in sorted(points, key=least):
        if prune and not _can_matter(p, fronts, limits):
            continue
        best = sizer.best(p.cluster, p.job)
        if best is None:
            found.unknown[p.cluster.accelerator.name] = f"no {p.job.precision} rate is known"
            continue
        found.considered += best.considered
        if isinstance(best, TooSmall):
            found.small.append((p, best))
            continue
        found.timed += 1
        found.fitting += best.fitting
        for offer in p.offers:
            for total in totals(best, offer, p.nodes):
                option = Option(offer=offer, nodes=p.nodes, timed=best, total=total)
                kept = not limits.broken(option)
                (found.options if kept else found.over).append(option)
                if kept and option.usd is not None:
                    fronts[option.steady].append((option.hours, option.usd))
    return found


def _can_matter(p: Point, fronts: dict[bool, list[tuple[float, float]]], limits: Limits) -> bool:
    """False where every price of every seller is beaten in both, or breaks a limit, already at its bound."""
    for steady, hours, usd in _bounds(p):
        if limits.hours is not None and hours > limits.hours:
            continue
        if limits.usd is not None and usd is not None and usd > limits.usd:
            continue
        if usd is None or not any(h < hours and m < usd for h, m in fronts[steady]):
            return True
    return False


def front(options: list[Option]) -> list[Option]:
    """Those that nothing beats in both time and money, fastest first; unpriced ones have no place here."""
    priced = sorted((o for o in options if o.usd is not None), key=lambda o: (o.hours, o.usd))
    kept: list[Option] = []
    for o in priced:
        if not kept or (o.usd or 0.0) < (kept[-1].usd or 0.0):
            kept.append(o)
    return kept

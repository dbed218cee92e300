"""Which of the points are worth a line: the front of time and money, and the best by the objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from outlay.planner.size.engine import Point, Sizer, Timed, TooSmall
from outlay.planner.size.money import Total, least_hours, least_usd, purchase_usd, totals
from outlay.planner.size.offers import Offer

OBJECTIVES = ("balanced", "cheapest", "fastest", "energy", "carbon")
STEADY = ("on_demand", "reserved", "owned", "unpriced")
"""Rent under which nobody takes the machine away."""


def market(terms: str) -> str:
    """steady | spot | buy: what is compared with its own kind only."""
    return "steady" if terms in STEADY else terms


@dataclass(frozen=True, kw_only=True)
class Option:
    """One piece of hardware, its best strategy, its price."""

    offer: Offer
    nodes: int
    timed: Timed
    total: Total

    def with_interval(self) -> Option:
        """The same, its totals with their 90 %: the search goes by expected figures alone."""
        (total,) = totals(self.timed, self.offer, self.nodes, interval=True, only=self.total.terms)
        return dataclasses.replace(self, total=total)

    @property
    def hours(self) -> float:
        return self.total.hours.expected

    @property
    def usd(self) -> float | None:
        return None if self.total.usd is None else self.total.usd.expected

    @property
    def paid_usd(self) -> float | None:
        """What a budget must hold: the total, or the purchase where that is more."""
        bought = purchase_usd(self.offer, self.total.terms, self.nodes)
        return None if self.usd is None else max(self.usd, bought)

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
            ("budget", o.paid_usd, self.usd),
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


def bounds(p: Point) -> list[tuple[str, float, float | None]]:
    """(market, least hours, least money) of each price of each seller."""
    rows = []
    for offer in p.offers:
        for terms in offer.terms:
            hours, billed = least_hours(p.bound_s / 3600, terms, p.nodes, p.cluster.ranks, p.job)
            rows.append((market(terms), hours, least_usd(offer, terms, p.nodes, hours, billed)))
    return rows


def explore(sizer: Sizer, points: list[Point], limits: Limits, *, prune: bool = True) -> Found:
    """Time what can still be on the front of its kind of price, or best by an objective."""
    found = Found(points=len(points))
    fronts: dict[str, list[tuple[float, float]]] = {"steady": [], "spot": [], "buy": []}

    def least(p: Point) -> float:
        return min((h * (m if m is not None else h) for _, h, m in bounds(p)), default=0.0)

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
                    fronts[market(total.terms)].append((option.hours, option.usd))
    return found


def _can_matter(p: Point, fronts: dict[str, list[tuple[float, float]]], limits: Limits) -> bool:
    """False where every price of every seller is beaten in both, or breaks a limit, already at its bound."""
    for kind, hours, usd in bounds(p):
        if limits.hours is not None and hours > limits.hours:
            continue
        if limits.usd is not None and usd is not None and usd > limits.usd:
            continue
        if usd is None or not any(h < hours and m < usd for h, m in fronts[kind]):
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

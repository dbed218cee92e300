"""Buy or rent: what the bought options of an answer cost, and from how many hours a year on they pay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outlay.planner.cost import Range
from outlay.planner.ownership import Owned, break_even_h, owned
from outlay.planner.project_cost import YEAR_H
from outlay.planner.size.choose import Option
from outlay.planner.size.engine import Point, Sizer, Timed
from outlay.planner.size.money import least_hours, owning, purchase_usd
from outlay.planner.size.offers import Offer
from outlay.planner.spec.files import plain
from outlay.profiles.units import format_seconds, format_usd

RENTS = ("on_demand", "reserved", "spot")


@dataclass(frozen=True, kw_only=True)
class Rent:
    """The cheapest rent of the same hardware under one kind of price."""

    offer: str
    terms: str
    usd_per_h: float
    """Of all of it."""
    price_date: str | None
    break_even_h_a_year: Range | None
    """Null = owning is never cheaper; of reserved too, where the whole year is billed at any use."""


@dataclass(frozen=True, kw_only=True)
class Bought:
    """One bought option beside rent."""

    accelerator: str
    accelerators: int
    owned: Owned
    network: bool
    rents: tuple[Rent, ...]
    project_h: float
    """Of work in a year: the project's, at most a year."""
    pays: bool | None
    """A year of owning, used for this project alone, costs less than its rent; null = nobody rents it out."""
    alone_usd: float
    """A year of owning with the project's hours of work in it."""
    says: str


def bought(o: Option, offers: Sequence[Offer]) -> Bought:
    """The option, which is a bought one, beside all rent of as many of the same accelerators."""
    assert o.offer.purchase is not None
    a, ranks = o.timed.cluster.accelerator, o.timed.cluster.ranks
    network = o.offer.gbps is not None
    own = owned(
        o.offer.purchase, ranks, tdp_w=a.tdp_w or 0.0, network=network, taken=owning(o.timed.job)
    )
    rents = tuple(r for kind in RENTS if (r := _cheapest(kind, a.name, ranks, offers, own)))
    hours = min(o.hours, YEAR_H)
    steady = [
        r.usd_per_h * (YEAR_H if r.terms == "reserved" else hours)
        for r in rents
        if r.terms != "spot"
    ]
    alone = own.fixed_usd_a_year.expected + own.electricity_usd_per_h.expected * hours
    pays = alone < min(steady) if steady else None
    return Bought(
        accelerator=a.name, accelerators=ranks, owned=own, network=network, rents=rents,
        project_h=hours, pays=pays, alone_usd=alone, says=_says(own, rents, hours, pays),
    )  # fmt: skip


def cheapest_purchase(sizer: Sizer, points: Sequence[Point]) -> str | None:
    """The least that has to be paid to own what runs it, where no bought option keeps the limits."""
    rows = sorted(
        ((purchase_usd(o, "buy", p.nodes), i, o) for i, p in enumerate(points) for o in p.offers if o.bought),
        key=lambda row: row[:2],
    )  # fmt: skip
    for usd, i, offer in rows:
        found = sizer.best(points[i].cluster, points[i].job)
        if isinstance(found, Timed):
            hours = least_hours(found.step_s * found.job.steps / 3600, "buy", points[i].nodes,
                                found.cluster.ranks, found.job)[0]  # fmt: skip
            return (
                f"Nothing that is bought keeps the limits: the least that runs it, {found.cluster.ranks:,} x "
                f"{offer.accelerator.name}, costs {format_usd(usd)} and takes {format_seconds(hours * 3600)}."
            )
    return None


def _cheapest(
    kind: str, accelerator: str, ranks: int, offers: Sequence[Offer], own: Owned
) -> Rent | None:
    """Null where nobody rents out so many of them at such a price."""
    found = [
        (x.usd_per_h[kind] * (ranks // x.per_node), x) for x in offers
        if x.accelerator.name == accelerator and kind in x.usd_per_h and ranks % x.per_node == 0
        and (x.gbps or ranks == x.per_node)
    ]  # fmt: skip
    if not found:
        return None
    usd, offer = min(found, key=lambda row: row[0])
    return Rent(
        offer=offer.name, terms=kind, usd_per_h=usd, price_date=offer.dates.get(kind),
        break_even_h_a_year=None if kind == "reserved" else break_even_h(own, usd),
    )  # fmt: skip


def _says(own: Owned, rents: Sequence[Rent], hours: float, pays: bool | None) -> str:
    fixed, hour = own.fixed_usd_a_year.expected, own.electricity_usd_per_h.expected
    year = format_usd(fixed + hour * YEAR_H)
    texts = []
    for r in rents:
        price = f"{r.offer} {r.terms.replace('_', ' ')}, {format_usd(r.usd_per_h)} an hour"
        even = r.break_even_h_a_year
        if r.terms == "reserved":
            texts.append(
                f"{price}: {format_usd(r.usd_per_h * YEAR_H)} a year, owning and working all of it {year}"
            )
        elif even is None:
            texts.append(f"{price}: rent is always cheaper")
        else:
            texts.append(f"{price}: buying pays from {_hours(even)} of work a year")
    end = {
        None: "Nobody in the catalog rents it out.",
        True: f"This project alone works {hours:,.0f} in a year: buy.",
        False: f"This project works {hours:,.0f} in a year: rent, unless other work fills the rest.",
    }[pays]
    return f"{'; '.join(texts)}. {end}" if texts else end


def _hours(even: Range) -> str:
    high = "never" if math.isinf(even.high) or even.high > YEAR_H else f"{even.high:,.0f}"
    return f"{even.expected:,.0f} h ({even.low:,.0f} to {high})"


def bought_dict(b: Bought, letter: str) -> dict[str, Any]:
    own = {k: v for k, v in vars(b.owned).items() if k != "moved"}
    rents = [vars(r) | {"break_even_h_a_year": _finite(r.break_even_h_a_year)} for r in b.rents]
    value: dict[str, Any] = plain({"option": letter} | vars(b) | {"owned": own, "rents": rents})
    return value


def _finite(value: Range | None) -> dict[str, float | None] | None:
    """JSON has no infinity: an end that is never reached is null."""
    if value is None:
        return None
    return {k: v if math.isfinite(v) else None for k, v in vars(value).items()}

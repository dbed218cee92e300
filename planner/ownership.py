"""What a machine costs that is bought: purchase, capital, place, upkeep, electricity, resale; and from how
many hours a year on that is less than rent.

A year of owning costs F = P·[a(r, n) − R·s(r, n)] + place + upkeep, where P is what is paid, R the part that
resale brings after n years, a = r/(1 − (1+r)^−n) the annuity of 1 and s = r/((1+r)^n − 1) the yearly saving
that grows to 1 (any textbook of engineering economics). An hour of work adds v of electricity. At U hours a
year an hour costs F/U + v; rent of p is dearer from F/(p − v) hours on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlay.planner.assumed import Assumption, as_asked
from outlay.planner.cost import Range
from outlay.planner.project_cost import YEAR_H, in_quadrature, kw_an_accelerator, one_at_a_time
from outlay.profiles.offers import electricity_in
from outlay.profiles.purchase import Purchase

FIGURES = (
    "use_h_a_year", "purchase_factor", "server_factor", "network_factor", "capital_fraction_a_year",
    "life_years", "resale_fraction", "upkeep_fraction_a_year", "electricity_usd_per_kwh",
    "colocation_usd_per_kw_month", "tdp_fraction", "server_power_factor", "pue",
)  # fmt: skip
"""Of profiles/assumptions.yaml."""


@dataclass(frozen=True, kw_only=True)
class Owned:
    """So many accelerators, bought; USD, each with its 90 % interval."""

    purchase_usd: Range
    capital_usd_a_year: Range
    """What is lost between purchase and resale, with what the money costs."""
    place_usd_a_year: Range
    upkeep_usd_a_year: Range
    fixed_usd_a_year: Range
    """The three together: what a year costs before any work."""
    electricity_usd_per_h: Range
    """While it works, cooling included."""
    usd_per_h: Range
    """Of an hour of work: electricity, and its share of the year where others use it too."""
    own_usd_a_year: Range | None
    """What the project pays of a year besides: all of it where it is alone, nothing where others use it."""
    use_h_a_year: float
    """0 = bought for one project alone."""
    moved: tuple[Any, Any]
    """(fixed, electricity) along the axis of `one_at_a_time`, for what is derived from both."""


def with_region(taken: dict[str, Assumption], region: str | None) -> dict[str, Assumption]:
    """Industry's price of electricity in the region, where one is known and none was set."""
    found = electricity_in(region) if region else None
    if found is None or taken["electricity_usd_per_kwh"].source == "--assume":
        return taken
    price = as_asked(
        found.industrial_usd_per_kwh, f"{found.region}, industry, {found.year}: {found.source}"
    )
    return taken | {"electricity_usd_per_kwh": price}


def owned(
    purchase: Purchase, count: int, *, tdp_w: float, network: bool, taken: dict[str, Assumption]
) -> Owned:
    """`count` accelerators with their servers, and with a network between them where `network`."""
    rows = {name: taken[name] for name in FIGURES}
    if purchase.date is None:
        rows["purchase_factor"] = as_asked(1.0, purchase.source)
    if not network:
        rows["network_factor"] = as_asked(1.0, "one server needs no network")
    if purchase.includes == "server":
        rows["server_factor"] = as_asked(1.0, f"the price includes it: {purchase.source}")
    v = dict(zip(rows, one_at_a_time(list(rows.values())), strict=True))
    paid = purchase.usd * count * v["purchase_factor"] * v["server_factor"] * v["network_factor"]
    capital = paid * _capital_a_year(
        v["capital_fraction_a_year"], v["life_years"], v["resale_fraction"]
    )
    place = tdp_w / 1e3 * v["server_power_factor"] * count * v["colocation_usd_per_kw_month"] * 12
    upkeep = paid * v["upkeep_fraction_a_year"]
    hour = kw_an_accelerator(tdp_w, v) * count * v["pue"] * v["electricity_usd_per_kwh"]
    fixed, use = capital + place + upkeep, v["use_h_a_year"]
    alone = float(use[0]) == 0.0
    return Owned(
        purchase_usd=_range(paid), capital_usd_a_year=_range(capital), place_usd_a_year=_range(place),
        upkeep_usd_a_year=_range(upkeep), fixed_usd_a_year=_range(fixed),
        electricity_usd_per_h=_range(hour), usd_per_h=_range(hour if alone else fixed / np.maximum(use, 1.0) + hour),
        own_usd_a_year=_range(fixed) if alone else None, use_h_a_year=float(use[0]), moved=(fixed, hour),
    )  # fmt: skip


def _capital_a_year(rate: Any, years: Any, resale: Any) -> Any:
    """Of 1 paid now: the annuity, less the saving that resale makes good."""
    rate = np.maximum(rate, 1e-9)
    grown = (1.0 + rate) ** years
    return rate * grown / (grown - 1.0) - resale * rate / (grown - 1.0)


def times(value: Range, count: float) -> Range:
    return Range(low=value.low * count, expected=value.expected * count, high=value.high * count)


def _range(values: Any) -> Range:
    return Range(**{k: float(v) for k, v in dataclasses.asdict(in_quadrature(values)).items()})


def break_even_h(o: Owned, rent_usd_per_h: float) -> Range | None:
    """Hours a year from which owning is cheaper than rent by the hour; null where it never is: rent is not
    above the electricity, or it would take more hours than a year has. Its high end may be infinite."""
    fixed, hour = o.moved
    with np.errstate(divide="ignore", invalid="ignore"):
        hours = np.where(rent_usd_per_h > hour, fixed / (rent_usd_per_h - hour), np.inf)
    return _range(hours) if hours[0] <= YEAR_H else None

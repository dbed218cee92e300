"""Totals of a project: monotone in price, exact in a case by hand, unknown stays unknown."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.cost import Range
from outlay.planner.project_cost import (
    Assumption,
    Terms,
    as_asked,
    price_age_mark,
    project_cost,
    usual,
)
from outlay.profiles.errors import UsageError

STEPS = Range(low=3.0e4, expected=3.6e4, high=5.0e4)


def flat(usd: float) -> Range:
    return Range(low=usd, expected=usd, high=usd)


def test_by_hand() -> None:
    zero = Assumption(low=0, expected=0, high=0, source="test")
    one = Assumption(low=1, expected=1, high=1, source="test")
    a = dataclasses.replace(
        usual(),
        setup_h=one,
        evaluation_fraction=zero,
        save_s=zero,
        restart_h=zero,
        pue=one,
        tdp_fraction=one,
        server_power_factor=one,
        minimum_h=zero,
    )
    terms = Terms(kind="on_demand", price_usd_per_h=flat(20), kgco2e_per_kwh=0.5)
    got = project_cost(terms, flat(3.6e4), accelerators=8, nodes=1, tdp_w=700, assumptions=a)
    assert got.cost_usd is not None and got.energy_kwh is not None and got.co2e_kg is not None
    assert got.cost_usd.expected == pytest.approx(220)
    assert got.energy_kwh.expected == pytest.approx(61.6)
    assert got.co2e_kg.expected == pytest.approx(30.8)


@given(st.floats(0.1, 100), st.floats(1, 5))
def test_a_higher_price_is_never_cheaper_and_ends_are_ordered(usd: float, factor: float) -> None:
    costs = [
        project_cost(
            Terms(kind="spot", price_usd_per_h=flat(p)), STEPS, accelerators=8, nodes=1, tdp_w=None
        ).cost_usd
        for p in (usd, usd * factor)
    ]
    a, b = costs
    assert a is not None and b is not None
    assert a.low <= a.expected <= a.high
    assert a.expected <= b.expected


def test_spot_that_is_never_taken_costs_its_ratio_of_the_price() -> None:
    never = Assumption(low=0, expected=0, high=0, source="test")
    a = dataclasses.replace(usual(), spot_preemptions_node_day=never)
    spot, demand = (
        project_cost(
            Terms(kind=k, price_usd_per_h=flat(p)), STEPS, accelerators=8, nodes=1, tdp_w=None, assumptions=a
        ).cost_usd
        for k, p in (("spot", 10.0), ("on_demand", 20.0))
    )  # fmt: skip
    assert spot is not None and demand is not None
    assert spot.expected == pytest.approx(demand.expected / 2)


def test_arrays_minimum_and_unknown() -> None:
    terms = Terms(kind="on_demand", price_usd_per_h=flat(2))
    long = dataclasses.replace(usual(), minimum_h=as_asked(1000, "test"))
    got = project_cost(
        terms, STEPS, accelerators=np.array([8, 16]), nodes=np.array([1, 2]), tdp_w=None, assumptions=long
    )  # fmt: skip
    assert got.cost_usd is not None
    assert np.allclose(got.cost_usd.expected, [2000, 2000])
    assert got.energy_kwh is None and got.co2e_kg is None


def test_age_and_nonsense() -> None:
    today = datetime.date(2026, 11, 24)
    assert price_age_mark(None, today) == "undated !"
    assert price_age_mark(datetime.date(2026, 8, 26), today) == ""
    assert price_age_mark(datetime.date(2026, 8, 25), today) == "91 days !"
    with pytest.raises(UsageError):
        Assumption(low=0, expected=float("nan"), high=1, source="test")

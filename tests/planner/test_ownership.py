"""Buying: by hand where every figure is set, break-even where both cost the same, reserved by the year."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.assumed import END, Assumption, as_asked, figures, parse_assumed, with_set
from outlay.planner.cost import Range
from outlay.planner.ownership import FIGURES, break_even_h, owned, with_region
from outlay.planner.project_cost import (
    YEAR_H,
    Terms,
    billed_h,
    in_quadrature,
    one_at_a_time,
    project_cost,
    usual,
)
from outlay.profiles.errors import UsageError
from outlay.profiles.loader import accelerators
from outlay.profiles.purchase import Purchase, shipped_purchases, stated_purchases
from outlay.runner.cli import cli

BY_HAND = {
    "use_h_a_year": 0.0, "purchase_factor": 1.0, "server_factor": 1.5, "network_factor": 1.2,
    "capital_fraction_a_year": 0.1, "life_years": 2.0, "resale_fraction": 0.21,
    "upkeep_fraction_a_year": 0.05, "electricity_usd_per_kwh": 0.1, "colocation_usd_per_kw_month": 100.0,
    "tdp_fraction": 0.5, "server_power_factor": 2.0, "pue": 1.25,
}  # fmt: skip
CARD = Purchase(
    accelerator="x", usd=10_000.0, includes="accelerator", date="2026-01-01", source="t"
)


def figures_of(values: dict[str, float]) -> dict[str, Assumption]:
    return {k: as_asked(v, "test") for k, v in values.items()}


def test_by_hand() -> None:
    """8 cards of 10,000 in servers of 1.5 times that: 120,000. Two years at 10 %: annuity 0.5761905, and a
    resale of 0.21 saves 0.1 a year. 8 x 1 kW rated."""
    got = owned(CARD, 8, tdp_w=500.0, network=False, taken=figures_of(BY_HAND))
    assert got.purchase_usd.expected == pytest.approx(120_000)
    assert got.capital_usd_a_year.expected == pytest.approx(120_000 * (1.21 * 0.1 / 0.21 - 0.1))
    assert got.place_usd_a_year.expected == pytest.approx(8 * 100 * 12)
    assert got.upkeep_usd_a_year.expected == pytest.approx(6_000)
    assert got.electricity_usd_per_h.expected == pytest.approx(8 * 0.5 * 1.25 * 0.1)
    with_network = owned(CARD, 8, tdp_w=500.0, network=True, taken=figures_of(BY_HAND))
    assert with_network.purchase_usd.expected == pytest.approx(144_000)


def test_one_project_pays_for_a_year_and_shared_hours_for_themselves() -> None:
    alone = owned(CARD, 1, tdp_w=500.0, network=False, taken=figures_of(BY_HAND))
    shared = owned(
        CARD, 1, tdp_w=500.0, network=False, taken=figures_of(BY_HAND | {"use_h_a_year": 4000.0})
    )
    fixed = alone.fixed_usd_a_year.expected
    assert alone.own_usd_a_year is not None
    assert alone.own_usd_a_year.expected == pytest.approx(fixed)
    assert shared.own_usd_a_year is None
    hour = alone.electricity_usd_per_h.expected
    assert shared.usd_per_h.expected == pytest.approx(fixed / 4000 + hour)
    terms = Terms(
        kind="buy", price_usd_per_h=alone.usd_per_h, fixed_usd_a_year=alone.own_usd_a_year
    )
    got = project_cost(terms, flat(36e3), accelerators=1, nodes=1, tdp_w=None)
    assert got.cost_usd is not None
    assert got.cost_usd.expected == pytest.approx(fixed + hour * got.wall_s.expected / 3600)


def flat(value: float) -> Range:
    return Range(low=value, expected=value, high=value)


@given(st.floats(0.5, 50.0))
def test_at_the_break_even_both_cost_the_same(rent: float) -> None:
    own = owned(CARD, 1, tdp_w=500.0, network=False, taken=with_set(()))
    even = break_even_h(own, rent)
    fixed, hour = own.fixed_usd_a_year.expected, own.electricity_usd_per_h.expected
    if even is None:
        assert fixed + hour * YEAR_H >= rent * YEAR_H * (1 - 1e-9)
        return
    assert even.low <= even.expected <= even.high
    assert rent * even.expected == pytest.approx(fixed + hour * even.expected)


def test_rent_below_the_electricity_is_never_beaten() -> None:
    own = owned(CARD, 1, tdp_w=500.0, network=False, taken=with_set(()))
    assert break_even_h(own, own.electricity_usd_per_h.expected * 0.9) is None


def test_a_reservation_is_billed_by_the_year() -> None:
    assert [float(billed_h("reserved", h, 1.0)) for h in (1, 8760, 8761)] == [8760, 8760, 17520]
    assert float(billed_h("on_demand", 0.2, 1.0)) == 1.0
    terms = Terms(kind="reserved", price_usd_per_h=flat(2.0))
    got = project_cost(terms, flat(3600.0), accelerators=1, nodes=1, tdp_w=None)
    assert got.cost_usd is not None
    assert got.cost_usd.expected == pytest.approx(2 * 8760)


@given(st.lists(st.floats(1.01, 3.0), min_size=1, max_size=5))
def test_independent_factors_add_in_quadrature(widths: list[float]) -> None:
    """A product of factors, each 1/w to w: the logarithm's half width is the root of the sum of squares."""
    rows = [Range(low=1 / w, expected=1.0, high=w) for w in widths]
    product: Any = 1.0
    for column in one_at_a_time(rows):
        product = product * column
    got = in_quadrature(product)
    half = math.sqrt(sum(math.log(w) ** 2 for w in widths))
    assert float(got.high) == pytest.approx(math.exp(half))
    assert float(got.low) == pytest.approx(math.exp(-half))


def test_an_interval_is_within_all_ends_at_once() -> None:
    """Narrower than every assumption at its end together, wider than the step time alone."""
    steps = Range(low=3e4, expected=3.6e4, high=5e4)
    terms = Terms(kind="on_demand", price_usd_per_h=flat(1.0))
    got = project_cost(terms, steps, accelerators=8, nodes=1, tdp_w=None).cost_usd
    assert got is not None
    taken = vars(usual())
    ends = []
    for end in END:
        at = {k: as_asked(getattr(a, end), "test") for k, a in taken.items()}
        one = flat(getattr(steps, end))
        whole = project_cost(
            terms, one, accelerators=8, nodes=1, tdp_w=None, assumptions=type(usual())(**at)
        ).cost_usd
        assert whole is not None
        ends.append(float(whole.expected))
    assert ends[0] < got.low < got.expected < got.high < ends[2]
    assert got.high / got.expected > 1.3


def test_every_purchase_is_sourced_and_every_figure_in_its_range() -> None:
    for name, p in shipped_purchases().items():
        assert name in accelerators()
        assert 500 < p.usd < 100_000 and p.source and p.date
    for f in figures().values():
        for end in END:
            assert f.within[0] <= getattr(f.assumption, end) <= f.within[1]
    assert set(FIGURES) <= set(figures())


def test_electricity_by_region_unless_it_was_set() -> None:
    for name in ("US-Texas", "TX"):
        assert with_region(with_set(()), name)["electricity_usd_per_kwh"].expected == 0.066
    stated = with_set(parse_assumed(["electricity_usd_per_kwh=0.3"]))
    assert with_region(stated, "US-Texas")["electricity_usd_per_kwh"].expected == 0.3
    assert with_region(with_set(()), "FRA") == with_set(())


def test_three_ends_and_a_stated_purchase() -> None:
    (row,) = parse_assumed({"life_years": "6/5/3"})
    assert (row.low, row.expected, row.high) == (6, 5, 3)
    with pytest.raises(UsageError, match="outside its ends"):
        parse_assumed(["life_years=6/8/3"])
    for reversed_ends in ("life_years=3/5/6", "pue=1.4/1.2/1.1"):
        with pytest.raises(UsageError, match="the wrong way round"):
            parse_assumed([reversed_ends])
    (row,) = parse_assumed(["use_h_a_year=9/8/7"])  # ours has no direction
    assert (row.low, row.high) == (9, 7)
    stated = stated_purchases(["h100-sxm=31,000"])["h100-sxm"]
    got = owned(stated, 8, tdp_w=700.0, network=False, taken=with_set(()))
    assert got.purchase_usd == flat(248_000)


def size(folder: Path, *args: str) -> dict[str, Any]:
    with contextlib.chdir(folder):
        result = CliRunner().invoke(cli, ["size", *args, "--format", "json", "--dry-run"])
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_buy_or_rent(tmp_path: Path) -> None:
    """For hours it is never worth it; the purchase, not its share, is held against a budget; all is listed."""
    common = ["--model", "llama-3-8b", "--seq-len", "4096", "--hardware", "a100-sxm-80gb", "--most", "32"]  # fmt: skip
    short = size(tmp_path, *common, "--tokens", "1B", "--buy")
    (row, *_) = short["buy"]
    assert row["pays"] is False
    assert short["options"][0]["terms"] != "buy"
    option = next(o for o in short["options"] if o["option"] == row["option"])
    assert option["usd"]["expected"] == pytest.approx(row["alone_usd"], rel=1e-6)
    assert option["purchase_usd"]["expected"] > option["usd"]["expected"]
    assert {"life_years", "colocation_usd_per_kw_month"} <= {p["what"] for p in short["project"]}
    limited = size(tmp_path, *common, "--tokens", "1B", "--buy", "--budget", "20000usd")
    assert not any(o["terms"] == "buy" for o in limited["options"])
    assert "the least that runs it" in limited["buy_refused"]
    long = size(tmp_path, *common, "--tokens", "800B", "--buy")
    assert any(b["pays"] for b in long["buy"])
    shared = size(
        tmp_path, *common, "--tokens", "1B", "--buy", "--assume", "use_h_a_year=8000"
    )  # fmt: skip
    assert min(o["usd"]["expected"] for o in shared["options"] if o["terms"] == "buy") < 1000

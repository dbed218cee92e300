"""The budget is kept whatever the prices and however steps vary."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.runner.budget import (
    SHUTDOWN_S,
    Meter,
    Spent,
    UpperBound,
    measure_write_rate,
    process_started_s,
)
from outlay.runner.refusal import require_start


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def meter(*budgets: Budget, price: float | None = 3.6, clock: Clock | None = None, **more) -> Meter:
    clock = clock or Clock()
    return Meter(
        budgets, price_usd_per_h=price, accelerators=8, started_s=1000.0, clock=clock, **more
    )


def test_each_kind_becomes_seconds() -> None:
    assert meter(Budget(kind="money", amount=1.8)).limit_s == pytest.approx(1800)
    assert meter(Budget(kind="hours", amount=0.25)).limit_s == pytest.approx(900)
    assert meter(Budget(kind="gpu_hours", amount=4.0)).limit_s == pytest.approx(1800)


def test_of_several_budgets_the_first_to_end_counts() -> None:
    hours = Budget(kind="hours", amount=0.1)
    m = meter(Budget(kind="money", amount=100.0), hours)
    assert m.binding == hours
    assert m.remaining_s() == pytest.approx(360)


def test_without_a_budget_there_is_no_limit_but_a_bill() -> None:
    clock = Clock()
    m = meter(clock=clock)
    clock.now_s += 3600
    assert m.remaining_s() is None
    assert not m.decide(1e9, 1e9)
    assert m.spent().cost_usd == pytest.approx(3.6)
    assert m.spent().gpu_hours == pytest.approx(8.0)


def test_earlier_attempts_count() -> None:
    clock = Clock()
    m = meter(Budget(kind="hours", amount=1.0), clock=clock, earlier_s=3000.0)
    clock.now_s += 500
    assert m.remaining_s() == pytest.approx(100)
    assert m.elapsed_s() == pytest.approx(500)
    assert m.spent().wall_s == pytest.approx(3500)


def test_money_without_a_price_is_refused() -> None:
    with pytest.raises(UsageError, match="--price-usd-per-h"):
        meter(Budget(kind="money", amount=1.0), price=None)


@pytest.mark.parametrize("kind", ["energy", "carbon"])
def test_what_is_not_metered_is_refused(kind) -> None:
    with pytest.raises(UsageError, match="needs a meter of energy"):
        meter(Budget(kind=kind, amount=1.0))


class SteadyPower:
    source = "test"

    def __init__(self, clock: Clock, kw: float) -> None:
        self.clock, self.kw = clock, kw

    def kwh(self) -> float:
        return self.kw * (self.clock() - 1000.0) / 3600

    def upper_kw(self) -> float:
        return 2 * self.kw

    def expected_kw(self) -> float:
        return self.kw


def test_energy_and_carbon_are_metered_and_what_is_left_counts_at_the_upper_power() -> None:
    clock = Clock()
    power = SteadyPower(clock, 10.0)
    both = (Budget(kind="energy", amount=30.0), Budget(kind="carbon", amount=8.0))
    m = meter(*both, clock=clock, energy=power, kgco2e_per_kwh=0.4)
    clock.now_s += 3600
    assert m.spent().energy_kwh == pytest.approx(10)
    assert m.spent().co2e_kg == pytest.approx(4)
    assert m.spent().fraction == pytest.approx(0.5)
    assert m.binding == both[1]
    # 4 kg are 10 kWh, at most 20 kW
    assert m.remaining_s() == pytest.approx(1800)
    assert m.remaining_expected_s() == pytest.approx(3600)
    assert m.limit_text() == "8 kg CO2e"
    with pytest.raises(UsageError, match="--kgco2e-per-kwh"):
        meter(both[1], energy=power)


def test_what_earlier_attempts_were_billed_stays_at_their_price() -> None:
    clock = Clock()
    earlier = Spent(wall_s=3600.0, cost_usd=10.0, gpu_hours=4.0, fraction=None)
    m = meter(Budget(kind="money", amount=13.6), clock=clock, earlier=earlier)
    assert m.remaining_s() == pytest.approx(3600)
    clock.now_s += 1800
    assert m.spent().cost_usd == pytest.approx(11.8)
    assert m.spent().gpu_hours == pytest.approx(8.0)
    assert m.in_words(7200) == "13.60 USD"


def test_the_shortest_time_that_is_billed_counts_from_the_start() -> None:
    clock = Clock()
    m = meter(Budget(kind="money", amount=7.2), clock=clock, minimum_s=3600.0)
    assert m.spent().cost_usd == pytest.approx(3.6)
    assert m.remaining_s() == pytest.approx(7200)
    too_small = meter(Budget(kind="money", amount=3.0), minimum_s=3600.0)
    with pytest.raises(NotFeasible):
        require_start(too_small, 1.0, source="test")


def test_a_budget_below_the_start_is_refused_with_the_numbers() -> None:
    m = meter(Budget(kind="money", amount=0.005))
    message = r"(?s)5\.00 s of it are left.*10\.8 s.*raise it above 0\.0108"
    with pytest.raises(NotFeasible, match=message):
        require_start(m, 10.0, source="assumed")
    require_start(meter(Budget(kind="money", amount=0.012)), 10.0, source="assumed")


def test_an_upper_bound_covers_what_was_seen_and_forgets_old_steps() -> None:
    bound = UpperBound(7.0, factor=1.5, slack_s=0.0, window=3)
    assert bound.upper_s() == 7.0
    assert not bound.measured
    for seconds in (9.0, 1.0, 2.0, 1.0):
        bound.add(seconds)
    assert bound.measured
    assert bound.upper_s() == pytest.approx(2 * (1 + 0.5 * 3**-0.25))
    bound.forget_first(1)
    assert bound.upper_s() == pytest.approx(2 * (1 + 0.5 * 2**-0.25))
    bound.forget_first(9)
    assert bound.upper_s() == 7.0


@settings(max_examples=300, deadline=None)
@given(
    price=st.floats(0.01, 1000),
    limit_s=st.floats(30, 500),
    startup_s=st.floats(0.5, 25),
    step_s=st.floats(0.05, 5),
    spread=st.floats(0.0, 0.2),
    save_s=st.floats(0.01, 8),
    earlier=st.floats(0.0, 0.5),
    seed=st.integers(0, 2**32),
)
def test_never_above_the_budget(
    price, limit_s, startup_s, step_s, spread, save_s, earlier, seed
) -> None:
    """A run as train.py does it: steps vary by `spread`, well within the bounds' 25 %."""
    draws = random.Random(seed)
    clock = Clock()
    budget = Budget(kind="money", amount=price * limit_s / 3600)
    m = meter(budget, price=price, clock=clock, earlier_s=earlier * limit_s)
    step_bound, save_bound = UpperBound(2 * step_s), UpperBound(2 * save_s)
    finish_s = save_s + SHUTDOWN_S
    clock.now_s += startup_s
    steps = 0
    while not m.decide(step_bound.upper_s(), save_bound.upper_s() + SHUTDOWN_S):
        took_s = step_s * (1 + draws.uniform(0, spread))
        clock.now_s += took_s
        step_bound.add(took_s)
        steps += 1
        if steps == 3 and m.affords(2 * save_bound.upper_s() + SHUTDOWN_S):
            clock.now_s += save_s
            save_bound.add(save_s)
    if steps:
        clock.now_s += finish_s
        spent = m.spent()
        assert spent.cost_usd is not None
        assert spent.cost_usd <= budget.amount * (1 + 1e-9)
        # what is left is less than one step and the room that the bounds keep
        left_s = limit_s - spent.wall_s
        assert left_s <= 2.3 * step_s + 1.1 * save_s + 0.2


def test_the_process_began_before_now(tmp_path) -> None:
    began_s = process_started_s()
    assert time.monotonic() - 86400 < began_s <= time.monotonic()


def test_the_write_rate_is_measured_and_leaves_nothing(tmp_path) -> None:
    assert measure_write_rate(tmp_path, size_bytes=2**20) > 0
    assert list(tmp_path.iterdir()) == []

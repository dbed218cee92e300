"""Budgets on a simulated clock: never above, hardly below, whatever the machine does."""

from __future__ import annotations

import itertools
import statistics

import pytest
from simulated import Clock, Simulated

from outlay.planner.spec.job import Budget
from outlay.runner.budget import Bounds, Meter
from outlay.runner.control import Controller
from outlay.runner.forecast import Speed


def test_300_budgets_are_kept_and_used() -> None:
    """Random amounts, kinds and prices; speeds that change, restarts, slow saves."""
    results = [Simulated(seed).run() for seed in range(300)]
    assert max(r.used for r in results) <= 1.0
    short = [r for r in results if r.work_left]
    assert len(short) > 150
    assert sum(r.attempts > 1 for r in results) > 50
    assert not any(r.cut for r in results)
    assert min(r.used for r in short) >= 0.97
    assert statistics.median(r.used for r in short) >= 0.98
    # and the learning rate, whose end is zero, came down in all of them
    assert sum(r.last_rate < 0.02 for r in short) >= 0.98 * len(short)


def controller(
    limit_s: float, steps: int, *, policy: str = "anneal", walltime_s: float | None = None
) -> tuple[Controller, Clock]:
    clock = Clock()
    meter = Meter(
        (Budget(kind="hours", amount=limit_s / 3600),),
        price_usd_per_h=1.0,
        accelerators=1,
        started_s=clock(),
        clock=clock,
    )
    bounds = Bounds(step_guess_s=2.0, parameters=1, write_bytes_per_s=1e9)
    control = Controller(meter, bounds, steps=steps, policy=policy, walltime_s=walltime_s)  # type: ignore[arg-type]
    return control, clock


def drive(control: Controller, clock: Clock, steps: int, step_s: float = 1.0) -> list[str]:
    said: list[str] = []
    for step in range(steps):
        said += control.decide(step).warnings
        clock.now_s += step_s
        control.bounds.step.add(step_s)
    return said


def test_a_run_that_fits_keeps_its_schedule() -> None:
    control, clock = controller(1000.0, 200)
    said = drive(control, clock, 150)
    assert control.decide(150).total_steps == 200
    assert said == []


def test_each_warning_comes_once_and_says_the_forecast() -> None:
    control, clock = controller(100.0, 1000)
    said = drive(control, clock, 97)
    told = [text[:3] for text in said if "of the budget is used" in text]
    assert told == ["50%", "80%", "95%"]
    half = next(text for text in said if text.startswith("50%"))
    assert "all 1,000 steps would end at 16.7 min" in half
    assert "the budget is 100.0 s" in half


def test_a_speed_that_jumps_about_is_not_told_again_and_again() -> None:
    control, clock = controller(1000.0, 10_000)
    said: list[str] = []
    for part in range(40):
        said += drive(control, clock, 25, 0.2 if part % 2 else 1.5)
    ends = [text for text in said if "the learning rate now ends within it" in text]
    assert 3 <= len(ends) <= 20  # in 5 % of the budget once; before, with each turn of the speed


def test_a_forecast_holds_the_truth_and_narrows() -> None:
    control, clock = controller(1e6, 1000)
    drive(control, clock, 100)
    early = control.forecast(100)
    assert early is not None
    assert early.low_s < 1000 < early.high_s
    assert early.expected_s == pytest.approx(1000, rel=0.02)
    clock.now_s += 700.0
    control.speed.mark(800, 800.0)
    later = control.forecast(800)
    assert later is not None
    assert later.high_s - later.low_s < early.high_s - early.low_s


def test_the_wall_time_of_a_queue_ends_an_attempt_that_the_budget_does_not() -> None:
    control, clock = controller(1e6, 1000, walltime_s=60.0)
    drive(control, clock, 40)
    assert control.decide(40).stop is None
    clock.now_s += 18
    assert control.decide(58).stop == "walltime"
    assert not control.affords(10.0)


def test_speed_is_the_recent_one() -> None:
    speed = Speed(skip=0)
    now_s = 0.0
    for step in range(200):
        speed.mark(step, now_s)
        now_s += 1.0 if step < 150 else 2.0
    assert speed.step_s() == pytest.approx(2.0)
    left = speed.left(100)
    assert left.low_s < 150 < left.expected_s < left.high_s


def test_a_run_that_will_not_fit_asks_once_and_anneals_until_it_is_answered() -> None:
    control, clock = controller(100.0, 1000, policy="ask")
    asked: list[str | None] = []
    for step in range(60):
        asked.append(control.decide(step).question)
        clock.now_s += 1.0
        control.bounds.step.add(1.0)
    (question,) = [text for text in asked if text is not None]
    assert "all 1,000 steps would end at 16.7 min" in question
    assert control.asking and 90 <= control.total_steps < 100
    control.answer("ask")  # no answer
    assert control.asking
    control.answer("cut")
    decision = control.decide(60)
    assert (decision.total_steps, decision.stop, decision.question) == (1000, None, None)
    assert "ends with the schedule again" in decision.warnings[0]


def test_the_answer_stop_stops_at_once_and_a_run_that_fits_does_not_ask() -> None:
    control, clock = controller(100.0, 1000, policy="ask")
    drive(control, clock, 30)
    control.answer("stop")
    assert control.decide(30).stop == "forecast"
    fits, clock = controller(1000.0, 200, policy="ask")
    drive(fits, clock, 190)
    assert not fits.asking and fits.total_steps == 200


def test_unanswered_the_budget_is_kept() -> None:
    results = [Simulated(seed, policy="ask").run() for seed in range(12)]
    short = [r for r in results if r.work_left]
    assert len(short) > 5
    assert all(0.97 <= r.used <= 1.0 and r.last_rate < 0.02 for r in short)


def test_an_end_that_moves_by_more_than_a_tenth_is_told_again() -> None:
    control, clock = controller(400.0, 1000)
    said = drive(control, clock, 100)
    for step in range(100, 200):
        said += control.decide(step).warnings
        clock.now_s += 2.0
        control.bounds.step.add(2.0)
    told = [int(text.rpartition("about step ")[2]) for text in said if "about step" in text]
    assert told[0] == pytest.approx(395, abs=10)
    assert len(told) > 1
    assert all(abs(b - a) > 0.1 * a for a, b in itertools.pairwise(told))

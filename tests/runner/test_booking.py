"""A run in the ledger: what it draws on its project, and what it does where there is no ledger."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import ranks

from outlay.planner.spec.job import Budget
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.runner.booking import book
from outlay.runner.budget import Spent, spent_at
from outlay.runner.ledger import Ledger
from outlay.runner.limits import Limits

NOTHING = spent_at(0.0, 3.6, 2)


def plan_of(*budget: Budget) -> Plan:
    plan = ranks.tiny_plan(steps=100, job={"budget": budget})
    cluster = dataclasses.replace(plan.cluster, price_usd_per_h=3.6)
    estimate = {"step": {"low_s": 0.5, "time_s": 1.0, "high_s": 2.0}}
    return dataclasses.replace(plan, cluster=cluster, estimate=estimate)


@pytest.fixture
def limits(tmp_path: Path) -> Limits:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_budget("p", Budget(kind="money", amount=10.0))
    ledger.close()
    return Limits(project="p", ledger=str(tmp_path / "ledger.sqlite"), tags=("a", "b"))


def test_a_run_draws_its_own_budget_and_the_next_what_is_left(limits, tmp_path) -> None:
    first = book(plan_of(Budget(kind="money", amount=6.0)), limits, tmp_path / "one", NOTHING)
    assert first.drawn(NOTHING) == (Budget(kind="money", amount=6.0),)
    second = book(plan_of(), limits, tmp_path / "two", NOTHING)
    assert second.drawn(NOTHING) == (Budget(kind="money", amount=4.0),)
    with pytest.raises(NotFeasible):
        book(plan_of(), limits, tmp_path / "three", NOTHING)
    assert first.beat(spent_at(1000, 3.6, 2), 10)
    first.close(spent_at(2000, 3.6, 2), state="done", reason="", steps=20)
    first.close(spent_at(9000, 3.6, 2), state="failed", reason="", steps=20)
    (total,) = Ledger(Path(limits.ledger)).totals("p")
    assert total.spent == pytest.approx(2.0)
    assert total.left == pytest.approx(4.0)


def test_what_earlier_attempts_spent_is_part_of_what_a_run_may_spend(limits, tmp_path) -> None:
    earlier = Spent(wall_s=3600.0, cost_usd=3.0, gpu_hours=2.0, fraction=None)
    booking = book(plan_of(Budget(kind="money", amount=5.0)), limits, tmp_path / "r", earlier)
    assert booking.drawn(earlier) == (Budget(kind="money", amount=5.0),)
    (total,) = Ledger(Path(limits.ledger)).totals("p")
    assert total.charged == pytest.approx(2.0)


def test_what_was_predicted_is_booked(limits, tmp_path) -> None:
    book(plan_of(), limits, tmp_path / "r", NOTHING)
    (row,) = Ledger(Path(limits.ledger)).rows("SELECT * FROM runs")
    assert (row["predicted_low_s"], row["predicted_s"], row["predicted_high_s"]) == (50, 100, 200)
    assert row["predicted_usd"] == pytest.approx(0.1)


def test_a_project_needs_a_budget_and_a_ledger(limits, tmp_path) -> None:
    with pytest.raises(UsageError, match="outlay ledger budget q"):
        book(plan_of(), dataclasses.replace(limits, project="q"), tmp_path, NOTHING)
    with pytest.raises(UsageError, match="which is off"):
        book(plan_of(), dataclasses.replace(limits, ledger="off"), tmp_path, NOTHING)


def test_a_run_without_a_project_goes_on_without_a_ledger(tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("this is no database at all" * 100)
    booking = book(plan_of(), Limits(ledger=str(broken)), tmp_path, NOTHING)
    assert "not in the ledger" in booking.warning
    assert booking.beat(NOTHING, 1)
    assert booking.drawn(NOTHING) == ()
    assert book(plan_of(), Limits(ledger="off"), tmp_path, NOTHING).warning == ""


def test_a_run_that_dies_at_once_is_charged_its_start_and_its_minimum(limits, tmp_path) -> None:
    limits = dataclasses.replace(limits, minimum_s=600.0)
    book(plan_of(), limits, tmp_path / "r", NOTHING, elapsed_s=5.0)
    (row,) = Ledger(Path(limits.ledger)).rows("SELECT * FROM attempts")
    assert (row["wall_s"], row["cost_usd"]) == (5.0, pytest.approx(0.6))
    assert row["gpu_hours"] == pytest.approx(2 * 5.0 / 3600)


def test_a_resume_brings_a_killed_attempt_to_what_its_folder_noted(limits, tmp_path) -> None:
    book(plan_of(), limits, tmp_path / "r", NOTHING)
    ledger = Ledger(Path(limits.ledger))
    with ledger.change() as db:  # as if killed, a minute ago
        db.execute("UPDATE attempts SET ticks = ticks + 1, beat_s = beat_s - 1000")
    earlier = spent_at(20.0, 3.6, 2)
    book(plan_of(), limits, tmp_path / "r", earlier)
    spent = ledger.spent(str((tmp_path / "r").absolute()))
    assert (spent.wall_s, spent.cost_usd) == (20.0, pytest.approx(0.02))


def test_a_run_that_is_refused_after_all_leaves_nothing(limits, tmp_path) -> None:
    booking = book(plan_of(), limits, tmp_path / "r", NOTHING)
    booking.close(NOTHING, state="refused", reason="ended early", steps=0)
    ledger = Ledger(Path(limits.ledger))
    assert ledger.rows("SELECT * FROM runs") == ledger.rows("SELECT * FROM attempts") == []
    assert ledger.totals("p")[0].left == 10.0


def test_a_ledger_without_a_name_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="no file is named"):
        Limits(ledger=" ")

"""Starts that are refused: by whose limit, in true words, and at no cost."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import ranks
from click.testing import CliRunner

from outlay.planner.spec.files import to_yaml
from outlay.planner.spec.job import Budget, Data
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible, OutlayError
from outlay.runner import fit, launch
from outlay.runner.before import require_affordable, summary
from outlay.runner.booking import allowed
from outlay.runner.budget import Meter, spent_at
from outlay.runner.folder import Attempt, Attempts, RunFolder
from outlay.runner.ledger import Ledger
from outlay.runner.limits import Limits
from outlay.runner.refusal import require_start

PRICE = 3.6
NOTHING = spent_at(0.0, PRICE, 2)


def usd(amount: float) -> Budget:
    return Budget(kind="money", amount=amount)


def plan_of(*budget: Budget, steps: int = 100) -> Plan:
    plan = ranks.tiny_plan(steps=steps, job={"budget": budget, "data": Data(path="nowhere")})
    cluster = dataclasses.replace(plan.cluster, price_usd_per_h=PRICE)
    estimate = {"step": {"low_s": 0.8, "time_s": 1.0, "high_s": 1.25}}
    return dataclasses.replace(plan, cluster=cluster, estimate=estimate)


def meter_of(*own: Budget, price: float = PRICE, **more) -> Meter:
    return Meter(
        own, price_usd_per_h=price, accelerators=2, started_s=0.0, clock=lambda: 0.0, **more
    )


@pytest.fixture
def limits(tmp_path: Path) -> Limits:
    set_budget(tmp_path, 1.0)
    return Limits(project="proj", ledger=str(tmp_path / "ledger.sqlite"))


def set_budget(tmp_path: Path, amount: float) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_budget("proj", usd(amount))
    ledger.close()


def refused(call, *args, **more) -> str:
    with pytest.raises(NotFeasible) as caught:
        call(*args, **more)
    return caught.value.message()


def test_below_the_minimum_bill_the_budget_itself_is_named() -> None:
    said = refused(require_start, meter_of(usd(1), price=1.8, minimum_s=86400.0), 4.0, source="x")
    assert "the budget of 1.00 USD is below the minimum bill of 43.20 USD" in said
    assert "raise it to 43.20 USD or more" in said
    again = meter_of(usd(3), earlier=spent_at(2000, PRICE, 2), minimum_s=3600.0)
    said = refused(require_affordable, plan_of(), again, 4.0)
    assert "the 1.00 USD left of the budget of 3.00 USD are below" in said
    assert "raise it to 5.60 USD" in said
    project = meter_of(drawn=(usd(1),), project="proj", minimum_s=3600.0)
    said = refused(require_start, project, 4.0, source="x")
    assert (
        "the 1.00 USD that project 'proj' has left are below the minimum bill of 3.60 USD" in said
    )
    assert "raise its budget by 2.60 USD or more: outlay ledger budget proj" in said


def test_a_refusal_by_the_project_names_it_and_what_it_has_left() -> None:
    meter = meter_of(usd(5), drawn=(usd(0.001),), project="proj")
    said = refused(require_start, meter, 4.0, source="assumed")
    assert "what project 'proj' has left, 0.0010 USD, is too small to train" in said
    assert "raise its budget by more than 0.0038 USD: outlay ledger budget proj" in said
    said = refused(require_affordable, plan_of(), meter, 4.0)
    assert "what project 'proj' has left" in said
    assert "outlay ledger budget proj" in said
    own = meter_of(usd(0.001), drawn=(usd(0.001),), project="proj")
    assert "the budget of 0.0010 USD is too" in refused(require_start, own, 4.0, source="x")


def test_the_summary_names_the_project_where_it_binds() -> None:
    meter = meter_of(drawn=(usd(0.5),), project="proj")
    assert "budget 0.5usd (what project 'proj' has left)" in summary(plan_of(), meter, Limits())
    meter = meter_of(usd(0.4), drawn=(usd(0.5),), project="proj")
    assert "proj" not in summary(plan_of(usd(0.4)), meter, Limits())


def test_a_wall_time_that_holds_no_start_is_refused() -> None:
    said = refused(require_start, meter_of(), 4.0, source="assumed", walltime_s=3.0)
    assert "a wall time of 3.00 s is too short" in said
    assert "give more than 4.80 s" in said
    require_start(meter_of(), 4.0, source="assumed", walltime_s=5.0)


def test_a_kill_scales_what_is_priced_by_time_and_not_the_minimum_bill() -> None:
    killed = Attempt(started_at="", elapsed_s=10.0, cost_usd=1.8)
    assert Attempts(attempts=(killed,)).spent(1.8, 2).cost_usd == pytest.approx(1.8)
    priced = Attempt(started_at="", elapsed_s=1000.0, cost_usd=1.0, price_usd_per_h=3.6)
    assert Attempts(attempts=(priced,)).spent(99.0, 2).cost_usd == pytest.approx(1.002)
    early = Attempt(started_at="", elapsed_s=0.5, price_usd_per_h=3.6, minimum_s=1800.0)
    spent = Attempts(attempts=(early,)).spent(3.6, 2)
    assert spent.cost_usd == pytest.approx(1.8)
    meter = meter_of(usd(3.6), earlier=spent, minimum_s=1800.0)
    require_start(meter, 4.0, source="x")


def test_what_a_project_allows_is_looked_at_and_not_entered(limits, tmp_path) -> None:
    assert allowed(plan_of(), limits, NOTHING) == (usd(1.0),)
    assert allowed(plan_of(usd(0.5)), limits, NOTHING) == (usd(0.5),)
    assert Ledger(Path(limits.ledger)).rows("SELECT * FROM attempts") == []


def old_run(tmp_path: Path, limits: Limits, seconds: float) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_plan(plan_of())
    old = Attempt(started_at="", elapsed_s=seconds, cost_usd=PRICE * seconds / 3600, ended=True)
    folder.write_attempts(Attempts(attempts=(old,)))
    folder.write_limits(dataclasses.replace(limits, drawn=(usd(1.0),), walltime_s=1.0))
    from outlay.runner.booking import book

    booking = book(plan_of(), limits, folder.root, NOTHING)
    booking.close(spent_at(seconds, PRICE, 2), state="budget", reason="", steps=9)
    return folder


def test_a_run_goes_on_once_its_project_is_raised(limits, tmp_path, monkeypatch) -> None:
    """Not by what it had drawn before, nor by the wall time of its last start."""
    folder = old_run(tmp_path, limits, 999.5)

    def resume() -> None:
        launch.run_plan(folder.read_plan(), folder.root, resume=True, started_s=time.monotonic())

    class Passed(Exception):
        """All limits were looked at."""

    def newest(*_) -> None:
        raise Passed

    monkeypatch.setattr(launch, "_newest", newest)
    assert "project 'proj'" in refused(resume)
    set_budget(tmp_path, 2.0)
    with pytest.raises(Passed):
        resume()


def test_a_refused_start_costs_nothing(limits, tmp_path, monkeypatch) -> None:
    for name in ("_prepare_data", "rank_environment"):
        monkeypatch.setattr(launch, name, lambda *_: {})
    began_s = time.monotonic() - 995.5
    limits = dataclasses.replace(limits, minimum_s=900.0)

    def run(name: str) -> str:
        return refused(
            launch.run_plan, plan_of(), tmp_path / name, limits=limits, started_s=began_s
        )

    assert "project 'proj'" in run("one")
    assert Ledger(Path(limits.ledger)).rows("SELECT * FROM attempts") == []
    # another run draws between the look and the reservation
    monkeypatch.setattr(launch, "_affordable", lambda *_, **__: None)
    run("two")
    assert Ledger(Path(limits.ledger)).rows("SELECT * FROM attempts") == []
    (total,) = Ledger(Path(limits.ledger)).totals("proj")
    assert total.left == 1.0


@pytest.mark.parametrize(
    ("amount", "more", "code", "says"),
    [
        (0.001, [], 3, "project 'proj'"),
        (0.001, ["--when-over", "anneal"], 3, "project 'proj'"),
        (1.0, ["--project", "no"], 2, "project 'no' has no budget"),
        (1.0, ["--ledger", "off"], 2, "a project needs the ledger"),
        (1.0, ["--walltime", "3s"], 3, "too short"),
        (1.0, [], 0, "budget 1usd (what project 'proj' has left)"),
    ],
)
def test_a_dry_run_asks_the_project(tmp_path, monkeypatch, amount, more, code, says) -> None:
    from outlay.runner.cli import cli

    monkeypatch.setattr(fit, "check_machine", lambda *_: None)
    monkeypatch.setattr("outlay.runner.budget.process_started_s", time.monotonic)
    set_budget(tmp_path, amount)
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(plan_of()))
    ledger = ["--project", "proj", "--ledger", str(tmp_path / "ledger.sqlite")]
    result = CliRunner().invoke(cli, ["run", str(path), "--dry-run", *ledger, *more])
    error = result.exception
    seen = error.message() if isinstance(error, OutlayError) else result.output
    assert (error.exit_code if isinstance(error, OutlayError) else result.exit_code) == code, seen
    assert says in seen

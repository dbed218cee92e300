"""What is refused, shown and asked before anything is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import ranks
from click.testing import CliRunner

from outlay.planner.spec.files import to_yaml
from outlay.planner.spec.job import Budget, Data
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.runner import fit
from outlay.runner.before import limits_from, require_affordable, summary
from outlay.runner.budget import Meter
from outlay.runner.limits import Limits

FLAGS = {
    "when_over": None,
    "walltime": None,
    "minimum_billing": None,
    "power_w": None,
    "pue": None,
    "region": None,
    "kgco2e_per_kwh": None,
    "project": None,
    "tag": (),
    "ledger": None,
}


def plan_of(steps: int = 1000, *budget: Budget, data: Path | None = None) -> Plan:
    plan = ranks.tiny_plan(
        steps=steps, job={"budget": budget, "data": Data(path=str(data or "nowhere"))}
    )
    cluster = dataclasses.replace(plan.cluster, price_usd_per_h=3.6)
    estimate = {"step": {"low_s": 0.8, "time_s": 1.0, "high_s": 1.25}}
    return dataclasses.replace(plan, cluster=cluster, estimate=estimate)


def meter_of(plan: Plan) -> Meter:
    return Meter(
        plan.job.budget, price_usd_per_h=3.6, accelerators=2, started_s=0.0, clock=lambda: 0.0
    )


def test_a_budget_below_the_optimistic_end_is_refused_and_what_fits_is_named() -> None:
    plan = plan_of(1000, Budget(kind="money", amount=0.5))
    with pytest.raises(NotFeasible) as caught:
        require_affordable(plan, meter_of(plan), 4.0)
    message = caught.value.message()
    assert caught.value.exit_code == 3
    assert "too small for 1,000 steps" in message
    assert "raise it to 1.00 USD" in message
    assert "plan --steps 396" in message
    assert "--when-over anneal" in message


def test_a_budget_that_may_do_is_not_refused() -> None:
    plan = plan_of(1000, Budget(kind="money", amount=0.9))
    require_affordable(plan, meter_of(plan), 4.0)


def test_the_summary_says_what_it_costs_and_what_happens_at_the_end() -> None:
    plan = plan_of(1000, Budget(kind="money", amount=0.9), Budget(kind="hours", amount=1))
    text = summary(plan, meter_of(plan), Limits())
    assert "1.00 USD (0.8000 USD to 1.25 USD)" in text
    assert "budget 0.9usd and 1h; when it is too small for all steps: anneal" in text


def test_flags_replace_what_a_run_has_and_nothing_else() -> None:
    before = Limits(project="a", power_w=100.0)
    after = limits_from(before, {**FLAGS, "walltime": "2h", "region": "us-central1"})
    assert (after.project, after.power_w, after.walltime_s) == ("a", 100.0, 7200.0)
    assert after.kgco2e_per_kwh is not None
    assert limits_from(after, FLAGS) == dataclasses.replace(after, walltime_s=None)
    with pytest.raises(UsageError, match="say the same thing"):
        limits_from(before, {**FLAGS, "region": "us-central1", "kgco2e_per_kwh": 0.1})


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ([], 3, "too small for 1,000 steps"),
        (["--when-over", "anneal"], 0, "fits this machine"),
        (["--budget", "5kWh"], 2, "--power-w"),
        (["--budget", "5kgCO2e", "--power-w", "100"], 2, "--region"),
        (["--budget", "5kWh", "--power-w", "100"], 0, "not measured"),
        (["--walltime", "never"], 2, "--walltime"),
    ],
)
def test_a_dry_run_says_what_a_run_would(tmp_path, monkeypatch, more, code, says) -> None:
    from outlay.profiles.errors import OutlayError
    from outlay.runner import energy
    from outlay.runner.cli import cli

    monkeypatch.setattr(fit, "check_machine", lambda *_: None)
    monkeypatch.setattr(energy, "_rapl", lambda _root: None)
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(plan_of(1000, Budget(kind="money", amount=0.5))))
    result = CliRunner().invoke(cli, ["run", str(path), "--dry-run", *more])
    error = result.exception
    seen = error.message() if isinstance(error, OutlayError) else result.output
    assert (error.exit_code if isinstance(error, OutlayError) else result.exit_code) == code, seen
    assert says in seen


def test_a_budget_in_another_currency_is_kept_in_usd(tmp_path, monkeypatch) -> None:
    from outlay.profiles.money import shown
    from outlay.runner.cli import cli

    monkeypatch.setattr(fit, "check_machine", lambda *_: None)
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(plan_of(1000)))
    command = ["run", str(path), "--dry-run", "--budget", "2eur"]
    done = CliRunner().invoke(cli, [*command, "--rate", "eur=1.25", "--when-over", "ask"])
    assert done.exit_code == 0, done.output
    assert "budget 2eur; when it is too small for all steps: ask" in done.output
    assert "0.8000 EUR" in done.output  # 1000 steps are 1 USD
    assert "no terminal, but with `outlay answer run" in done.output
    assert shown().code == "usd"  # of this command alone
    refused = CliRunner().invoke(cli, command)
    assert isinstance(refused.exception, UsageError)
    assert "no rate for EUR is known" in refused.exception.message()

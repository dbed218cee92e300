"""`outlay plan --measure N`: strategies are really run, and the fastest of them is the plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import TINY

from outlay.planner.planning import make_plan
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError, UsageError
from outlay.runner import measure_plan
from outlay.runner.cli import cli
from outlay.runner.measure import TimedStrategy
from outlay.runner.measure_plan import verified
from outlay.runner.pool import RankPool


@pytest.fixture
def plan(tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> Plan:
    return make_plan(tiny_spec, TINY, tiny_job, cpu_cluster)


@pytest.mark.ranks
def test_the_best_really_run(plan: Plan, ranks: RankPool) -> None:
    found = verified(plan, 3, keep=False, pool=ranks)
    tried = {plan.strategy, *(a.strategy for a in plan.alternatives[:2])}
    assert {found.strategy, *(a.strategy for a in found.alternatives[:2])} == tried
    assert all(a.why.startswith("measured ") for a in found.alternatives[:2])
    assert found.deepspeed["zero_optimization"]["stage"] == found.strategy.zero
    assert "fastest of 3" in found.estimate["assumptions"][0]["source"]
    assert found.estimate["strategy"]["micro_batch"] == found.strategy.micro_batch


def timed(monkeypatch: pytest.MonkeyPatch, results: list[TimedStrategy | OutlayError]) -> None:
    def instead(plans: list[Plan], **_: Any) -> list[TimedStrategy | OutlayError]:
        assert len(plans) == len(results)
        return results

    monkeypatch.setattr(measure_plan, "time_strategies", instead)


def test_what_is_faster_when_run_is_planned(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, failed, fast = (
        TimedStrategy(repeats_s=(2.0,)),
        OutlayError("out of memory"),
        TimedStrategy(repeats_s=(1.0,)),
    )
    timed(monkeypatch, [slow, failed, fast])
    found = verified(plan, 3, keep=False, pool=RankPool(2))
    assert found.strategy == plan.alternatives[1].strategy
    assert [a.why for a in found.alternatives[:2]] == [
        "measured 2.00 s, 100.0% slower", "failed when it was run: out of memory",
    ]  # fmt: skip
    assert len(found.alternatives) == len(plan.alternatives)
    assert "failed: out of memory" in capsys.readouterr().err


def test_nothing_that_runs_and_other_trainers_are_refused(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, [OutlayError("no")])
    with pytest.raises(UsageError, match="none of the 1"):
        verified(plan, 1, keep=False, pool=RankPool(2))
    with pytest.raises(UsageError, match="deepspeed"):
        verified(dataclasses.replace(plan, target="deepspeed"), 1, keep=False)


def test_hardware_that_is_not_here_cannot_be_measured(tmp_path: Any) -> None:
    args = [
        "plan",
        "--model",
        "gpt2",
        "--hardware",
        "h100-sxm:8",
        "--steps",
        "10",
        "--measure",
        "2",
        "--dry-run",
    ]
    error = CliRunner().invoke(cli, args).exception
    assert isinstance(error, OutlayError)
    assert "this machine has" in error.message()

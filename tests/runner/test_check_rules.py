"""A plan edited by hand is checked before anything starts; a run that is done is not resumed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outlay.planner.planning import make_plan
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import to_json
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.cli import cli
from outlay.runner.fit import check_rules
from outlay.runner.folder import Attempts, RunFolder


@pytest.fixture
def plan(tiny_config: Path, tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> Plan:
    return make_plan(tiny_spec, json.loads(tiny_config.read_text()), tiny_job, cpu_cluster)


def test_what_the_planner_made_is_fine(plan: Plan) -> None:
    check_rules(plan)


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ({"zero": 9}, "ZeRO-9 does not exist"),
        ({"micro_batch": 3}, "not the global batch"),
        ({"dp": 1}, "2 ranks"),
    ],
)
def test_edited_strategies_are_refused(plan: Plan, strategy: dict[str, Any], says: str) -> None:
    edited = dataclasses.replace(plan, strategy=dataclasses.replace(plan.strategy, **strategy))
    with pytest.raises(UsageError, match=says):
        check_rules(edited)


def test_a_configuration_that_contradicts_the_strategy_is_refused(plan: Plan) -> None:
    other = {**plan.deepspeed, "zero_optimization": {"stage": 7}}
    with pytest.raises(UsageError, match="stage is 7"):
        check_rules(dataclasses.replace(plan, deepspeed=other))


def test_a_sequence_longer_than_the_model_is_refused(plan: Plan) -> None:
    long = dataclasses.replace(plan.job, seq_len=100_000)
    with pytest.raises(UsageError, match="128 positions"):
        check_rules(dataclasses.replace(plan, job=long))


def test_a_broken_model_config_is_refused(plan: Plan) -> None:
    model = dataclasses.replace(plan.model, config={**plan.model.config, "hidden_size": -64})
    with pytest.raises(UsageError):
        check_rules(dataclasses.replace(plan, model=model))


def test_a_run_that_is_done_is_not_resumed(plan: Plan, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.write_plan(plan)
    folder.write_attempts(Attempts())
    folder.outcome.write_text(to_json({"state": "done", "steps": plan.job.steps}))
    result = CliRunner().invoke(cli, ["resume", str(folder.root)])
    assert result.exit_code == 0
    assert "already done" in result.output
    assert folder.read_attempts().attempts == ()


def test_the_planner_recommends_the_pipelines_that_the_runner_knows() -> None:
    from outlay.planner.rules import PIPELINE_FAMILIES
    from outlay.runner.layouts import LAYOUTS

    assert sorted(LAYOUTS) == list(PIPELINE_FAMILIES)

"""Optimizer states and weights kept on the host train as one process does, and resume bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ranks as r

from outlay.planner.spec.job import Optimizer
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.host import build_ops, ops_needed, prepare_environment
from outlay.runner.pool import RankPool
from outlay.runner.refuse import refuse

STEPS = 20
OFFLOADED = [
    {"zero": 1, "offload_optimizer": "cpu"},
    {"zero": 2, "offload_optimizer": "cpu"},
    {"zero": 3, "offload_optimizer": "cpu"},
    {"zero": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
]


@pytest.fixture(scope="module")
def with_cpu_adam(ranks: RankPool) -> RankPool:
    """The ranks, once DeepSpeed's Adam for the host is compiled (a minute, the first time)."""
    names = ops_needed(r.tiny_plan(**OFFLOADED[0]).deepspeed)
    assert names == ("CPUAdamBuilder",)
    build_ops(names, prepare_environment(2, 1, "cpu", ranks.extensions_dir))
    return ranks


@pytest.mark.ranks
def test_two_ranks_with_offload_are_one_process(with_cpu_adam: RankPool) -> None:
    expected = with_cpu_adam.call("ranks:reference", r.tiny_plan(), STEPS)[0]
    for strategy in OFFLOADED:
        first, second = with_cpu_adam.call("ranks:train", r.tiny_plan(**strategy), STEPS)
        r.compare(first, expected)
        assert second["losses"] == first["losses"], strategy


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", [OFFLOADED[1], OFFLOADED[3]], ids=["optimizer", "all"])
def test_a_resume_with_offload_repeats_the_losses_to_the_last_bit(
    with_cpu_adam: RankPool, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    plan = r.tiny_plan(**strategy)
    went_on = with_cpu_adam.call("ranks_saved:train_save_train", plan, str(tmp_path), 3, 3)
    resumed = with_cpu_adam.call("ranks_saved:resume_train", plan, went_on[0]["folder"], 3)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in went_on]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": 2, "offload_optimizer": "nvme"}, "NVMe is not run with ZeRO-2"),
        (
            {"zero": 3, "offload_optimizer": "cpu", "offload_param": "nvme"},
            "offload_param nvme is not run with offload_optimizer cpu",
        ),
        ({"zero": 0, "offload_optimizer": "cpu"}, "not run with ZeRO-0"),
        ({"zero": 1, "dp": 1, "pp": 2, "offload_optimizer": "cpu"}, "not run with ZeRO-1 and pp 2"),
        ({"zero": 2, "offload_optimizer": "cpu", "offload_param": "cpu"}, "at ZeRO-3 together"),
        ({"zero": 3, "offload_param": "cpu"}, "with offload_optimizer none"),
    ],
)
def test_what_is_not_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refuse(r.tiny_plan(**changes), 2, "cpu")


def test_another_optimizer_is_not_offloaded() -> None:
    job = {"optimizer": Optimizer(name="sgd", lr=0.1)}
    with pytest.raises(UsageError, match="not run with optimizer sgd"):
        refuse(_with_job(r.tiny_plan(zero=2, offload_optimizer="cpu"), **job), 2, "cpu")


def _with_job(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, job=dataclasses.replace(plan.job, **changes))

"""Flags of optimizer and schedule over a job file; what is not said stays as it was."""

from __future__ import annotations

import pytest

from outlay.planner.jobs import JobFile, merge, resolve_job
from outlay.planner.method_flags import take_method_flags
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Finetune, Job, Optimizer, Schedule
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import UsageError


def test_numbers_change_the_file_s_optimizer_and_a_name_replaces_it() -> None:
    said = Optimizer(name="sgd", lr=0.1, momentum=0.9)
    flags = {"optimizer_lr": 0.2, "steps": 3}
    assert take_method_flags(flags, said, None) == {
        "optimizer": Optimizer(name="sgd", lr=0.2, momentum=0.9)
    }
    assert flags == {"steps": 3}
    named = take_method_flags({"optimizer": "muon", "optimizer_adam_lr": 1e-3}, said, None)
    assert named == {"optimizer": Optimizer(name="muon", adam_lr=1e-3)}
    assert take_method_flags({"optimizer_momentum": 0.5}, "rmsprop", None) == {
        "optimizer": Optimizer(name="rmsprop", momentum=0.5)
    }
    assert take_method_flags({}, said, Schedule()) == {}


def test_a_schedule_keeps_what_the_flags_do_not_say() -> None:
    said = Schedule(name="linear", final_fraction=0.0)
    found = take_method_flags({"schedule": "wsd", "schedule_warmup_steps": 7}, None, said)
    assert found == {"schedule": Schedule(name="wsd", warmup_steps=7, final_fraction=0.0)}


def test_a_job_of_flags_alone(tiny_spec: ModelSpec, cpu_cluster: Cluster) -> None:
    flags = {"optimizer": "lion", "optimizer_lr": 1e-4, "schedule": "wsd", "compile": True}
    made = resolve_job(merge(JobFile(), flags), tiny_spec, cpu_cluster)
    assert made.job.optimizer == Optimizer(name="lion", lr=1e-4)
    assert made.job.schedule == Schedule(name="wsd")
    assert made.job.compile
    assert "compile" in [note["what"] for note in made.assumptions]


def test_capped_scores_are_planned_eager(cpu_cluster: Cluster) -> None:
    spec = resolve_model("gemma-2-2b")[0]
    made = resolve_job(JobFile(), spec, cpu_cluster)
    assert made.job.attention == "eager"
    assert "attention" in [note["what"] for note in made.assumptions]


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"adam_lr": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}]
)
def test_numbers_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Optimizer(**bad)  # type: ignore[arg-type]


def test_more_nonsense() -> None:
    with pytest.raises(UsageError, match="gradient_clipping"):
        Job(model="m", seq_len=8, global_batch=1, steps=1, precision="fp32", gradient_clipping=-1.0)
    with pytest.raises(UsageError, match=r"finetune\.alpha"):
        Finetune(alpha=0.0)
    assert (Finetune(rank=4).scale_alpha, Finetune(rank=4, alpha=4).scale_alpha) == (8.0, 4)

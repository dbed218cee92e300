"""What a plan says of itself: what limits it, for whom it is, whether it keeps a deadline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outlay.planner.hardware import resolve_hardware
from outlay.planner.planning import make_plan
from outlay.planner.reasons import by_search, gains, limited_by
from outlay.planner.rules import Context, allowed
from outlay.planner.search import search
from outlay.planner.space import TARGETS
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import NotFeasible, OutlayError
from outlay.runner.cli import cli

EIGHT_B = Job(model="llama-3-8b", seq_len=4096, global_batch=128, steps=100, precision="bf16")


def test_gains_are_searches_of_their_own() -> None:
    """Each row is what a search on the changed hardware finds; the first is the largest."""
    spec, _ = resolve_model("llama-3-8b")
    cluster = resolve_hardware("a100-sxm-80gb:16", inter_node_gbps=100)
    target = TARGETS["deepspeed"]
    rows = gains(cluster, by_search(spec, EIGHT_B, {}, target))
    assert {g.what for g in rows} == {
        "compute", "memory speed", "memory", "links", "network", "accelerators",
    }  # fmt: skip
    assert [g.faster for g in rows] == sorted((g.faster for g in rows), reverse=True)
    now = search(spec, EIGHT_B, cluster, target=target)
    assert cluster.inter is not None
    wider = dataclasses.replace(
        cluster,
        inter=dataclasses.replace(cluster.inter, bytes_per_s=2 * cluster.inter.bytes_per_s),
    )
    then = search(spec, EIGHT_B, wider, target=target)
    network = next(g for g in rows if g.what == "network")
    assert now.estimates.step is not None
    assert then.estimates.step is not None
    assert network.step_s == float(then.estimates.step.time_s[then.best_index])
    assert network.faster == pytest.approx(
        float(now.estimates.step.time_s[now.best_index]) / network.step_s - 1
    )
    assert limited_by(rows) == next(g.what for g in rows if g.what != "accelerators")


def test_gains_on_a_measured_machine(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster
) -> None:
    rows = gains(cpu_cluster, by_search(tiny_spec, tiny_job, {}, TARGETS["runner"]))
    assert {g.what for g in rows} == {"compute", "memory speed", "memory", "links"}
    assert all(g.faster >= -0.006 for g in rows)


def test_nothing_helps() -> None:
    assert limited_by(()) == "the trainer's own work"


def test_the_runner_is_never_given_what_it_does_not_run() -> None:
    """Each target's best keeps its rules; the wider ones are never slower."""
    spec, _ = resolve_model("llama-3-8b")
    cluster = resolve_hardware("a100-sxm-40gb:8")
    times = {}
    for name in ("runner", "deepspeed"):
        found = search(spec, EIGHT_B, cluster, target=TARGETS[name])
        assert found.estimates.step is not None
        times[name] = float(found.estimates.step.time_s[found.best_index])
        if name == "runner":
            c = found.estimates.candidates
            assert allowed(c, Context(spec=spec, job=EIGHT_B, cluster=cluster)).all()
    assert times["deepspeed"] <= times["runner"] * 1.005


def test_a_deadline(tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> None:
    config: dict[str, Any] = {"model_type": "llama"}
    plan = make_plan(tiny_spec, config, tiny_job, cpu_cluster, deadline_s=1e6)
    took = plan.estimate["run"]["time_s"]
    with pytest.raises(NotFeasible, match="cannot be kept") as caught:
        make_plan(tiny_spec, config, tiny_job, cpu_cluster, deadline_s=took / 2)
    assert "2.0 times the hardware" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("runner", "Next: outlay run"),
        ("deepspeed", "outlay emit deepspeed"),
        ("megatron", "Neither DeepSpeed nor"),
    ],
)
def test_the_next_step_follows_the_target(
    target: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["plan", "--model", "llama-3.2-1b", "--hardware", "h100-sxm:8", "--for", target]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    assert says in " ".join(result.output.split())
    dry = CliRunner().invoke(cli, [*args, "--format", "json", "--dry-run"])
    plan = json.loads(dry.stdout)
    assert plan["target"] == target
    assert plan["gains"]


def test_an_option_without_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["plan", "A"])
    assert isinstance(result.exception, OutlayError)
    assert "no size.json here" in str(result.exception)

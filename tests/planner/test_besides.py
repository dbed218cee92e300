"""What a run takes besides its steps."""

from __future__ import annotations

import dataclasses

import pytest

from outlay.planner.estimate.besides import SAVE_AFTER_S, besides_steps, evaluation_s
from outlay.planner.estimate.disk import checkpoint_bytes, export_bytes
from outlay.planner.hardware import resolve_hardware
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.planner.spec.strategy import Strategy
from outlay.runner.train import SAVE_AFTER_S as RUNNER_SAVES_AFTER_S

SPEC = resolve_model("gpt2")[0]
JOB = Job(model="gpt2", seq_len=1024, global_batch=64, steps=1000, precision="bf16")
PARTS = {"forward": 8.0, "tensor_parallel": 2.0, "sequence_parallel": 0.0, "expert_parallel": 0.0}
FIGURES = {"storage.checkpoint_bytes_per_s": 1e9, "storage.read_bytes_per_s": 1e8}


def test_an_evaluation_is_its_forward_passes() -> None:
    strategy = Strategy(dp=4, micro_batch=4, grad_accum=4)
    # 64 sequences in 4 passes of 16; each a quarter of the step's forward and half its collectives.
    assert evaluation_s(JOB, strategy, PARTS) == pytest.approx(4 * (8.0 + 1.0) / 4)
    piped = dataclasses.replace(strategy, pp=3)
    assert evaluation_s(JOB, piped, PARTS) == pytest.approx((4 + 2) * (8.0 + 1.0) / 4)


def test_saves_are_due_as_the_runner_has_them() -> None:
    strategy, nodes = Strategy(zero=1, dp=16, micro_batch=4), 2
    cluster = resolve_hardware("h100-sxm:16/8", inter_node_gbps=400)
    assert SAVE_AFTER_S == RUNNER_SAVES_AFTER_S

    def of(job: Job, step_s: float) -> tuple[int, float]:
        b = besides_steps(SPEC, job, cluster, strategy, parts=PARTS, step_s=step_s, figures=FIGURES)
        return b.checkpoints, b.checkpoint_s

    count, one = of(JOB, 1.0)
    assert one == pytest.approx(checkpoint_bytes(SPEC, JOB, strategy) / (nodes * 1e9))
    assert count == -(-1000 // round(SAVE_AFTER_S + 0.5))
    assert of(dataclasses.replace(JOB, save_every=10), 1.0)[0] == 100
    often = dataclasses.replace(JOB, eval_every=300)
    b = besides_steps(SPEC, often, cluster, strategy, parts=PARTS, step_s=1.0, figures=FIGURES)
    assert (b.evaluations, b.export_s) == (4, pytest.approx(export_bytes(SPEC, JOB) / 1e9))
    assert b.data_s == pytest.approx(2 * JOB.tokens / 1e8)
    assert b.total_s == pytest.approx(
        b.evaluations * b.evaluation_s + b.checkpoints * b.checkpoint_s + b.export_s
    )

"""What a run takes besides its steps: evaluations, checkpoints, the export, reading its tokens.

As `outlay run` does it (runner/train.py): an evaluation is forward passes at the step's micro-batch; a
checkpoint's files are written by all nodes at once and hashed; the first rank alone writes the export.
Another trainer evaluates and saves as often as it likes, so none of this is in the run's time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from outlay.planner.estimate.disk import checkpoint_bytes, disk_parts, export_bytes
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

SAVE_AFTER_S, SAVE_SHARE = 60.0, 50.0
"""Where a job does not say, a checkpoint is due after a minute, or after 50 times what one takes."""


@dataclass(frozen=True, kw_only=True)
class Besides:
    """Seconds of each, and how often."""

    evaluations: int
    evaluation_s: float
    """Of one."""
    checkpoints: int
    checkpoint_s: float
    """Of one."""
    export_s: float
    data_s: float
    """Reading all tokens once from storage; a step waits only for what takes longer than itself."""

    @property
    def total_s(self) -> float:
        return (
            self.evaluations * self.evaluation_s
            + self.checkpoints * self.checkpoint_s
            + self.export_s
        )


def evaluation_s(job: Job, strategy: Strategy, parts: Mapping[str, float]) -> float:
    """One evaluation, from the parts of a step: its forward passes, with the share of the collectives in
    them (a third where the backward pass recomputes, else half), in a pipeline filled once."""
    passes = max(1, job.eval_sequences // (strategy.micro_batch * strategy.dp))
    again = 3.0 if strategy.activation_checkpointing == "full" else 2.0
    inside = sum(parts[k] for k in ("tensor_parallel", "sequence_parallel", "expert_parallel"))
    one = (parts["forward"] + inside / again) / strategy.grad_accum
    return (passes + strategy.pp - 1) * one


def besides_steps(
    spec: ModelSpec,
    job: Job,
    cluster: Cluster,
    strategy: Strategy,
    *,
    parts: Mapping[str, float],
    step_s: float,
    figures: Mapping[str, float],
) -> Besides:
    """Of the whole run; `parts`: seconds of one step by part."""
    rate = figures["storage.checkpoint_bytes_per_s"]
    saved_s = checkpoint_bytes(spec, job, strategy) / (rate * cluster.nodes)
    due_s = max(SAVE_AFTER_S, SAVE_SHARE * saved_s)
    every = job.save_every or max(1, math.ceil(due_s / step_s))
    evaluations = math.ceil(job.steps / job.eval_every) if job.eval_every else 1
    return Besides(
        evaluations=evaluations,
        evaluation_s=evaluation_s(job, strategy, parts),
        checkpoints=math.ceil(job.steps / every),
        checkpoint_s=saved_s,
        export_s=export_bytes(spec, job) / rate,
        data_s=disk_parts(spec, job, strategy)["data"] / figures["storage.read_bytes_per_s"],
    )

"""What would change a verdict: the nearest other strategies, evaluated in one array program.

In the order of what they cost in speed, roughly: a fused loss and less memory at once cost little,
recomputation a third more compute, offload a trip over PCIe every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.interval import VERDICTS
from outlay.planner.rules import Context, allowed
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy


class Evaluated(Protocol):
    """What an evaluation gives; planner/estimate/estimator.py, Estimates."""

    @property
    def verdict(self) -> Array: ...

    @property
    def memory(self) -> Any: ...


Evaluate = Callable[[Job, Candidates], Evaluated]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One variant of the strategy or the job."""

    what: str
    strategy: Strategy
    job: Job


def _halved(s: Strategy) -> Strategy | None:
    if s.micro_batch % 2:
        return None
    return replace(s, micro_batch=s.micro_batch // 2, grad_accum=2 * s.grad_accum)


def _doubled(s: Strategy) -> Strategy:
    """Twice the data-parallel ranks, the same global batch where it divides."""
    if s.grad_accum % 2 == 0:
        return replace(s, dp=2 * s.dp, grad_accum=s.grad_accum // 2)
    halved = _halved(s)
    return (
        replace(halved, dp=2 * s.dp, grad_accum=s.grad_accum) if halved else replace(s, dp=2 * s.dp)
    )


def variants(s: Strategy, job: Job) -> list[Change]:
    """Single changes that need less memory; those that make no difference are left out by the caller."""
    found: list[tuple[str, Strategy]] = []
    if s.loss == "plain":
        found.append(("a fused loss", replace(s, loss="fused")))
    if half := _halved(s):
        found.append((f"micro-batch {half.micro_batch}", half))
    if s.dp > 1:
        found += [(f"ZeRO-{z}", replace(s, zero=z)) for z in range(s.zero + 1, 4)]
    if s.activation_checkpointing != "full":
        full = replace(s, activation_checkpointing="full", recompute_layers=None)
        found.append(("full activation checkpointing", full))
    if s.offload_optimizer == "none" and s.zero >= 1:
        found.append(("optimizer states on the host", replace(s, offload_optimizer="cpu")))
    doubled = _doubled(s)
    found.append((f"twice the ranks (dp {doubled.dp})", doubled))
    changes = [Change(what=what, strategy=one, job=job) for what, one in found]
    if job.optimizer.name in ("adamw", "adam"):
        eight = replace(job, optimizer=replace(job.optimizer, name="adamw_8bit"))
        changes.insert(1, Change(what="8-bit AdamW", strategy=s, job=eight))
    return changes


def _most(s: Strategy, job: Job) -> Change:
    """All that costs no further machine: where no single change is enough."""
    one = replace(
        s, loss="fused", activation_checkpointing="full", recompute_layers=None,
        grad_accum=s.grad_accum * s.micro_batch, micro_batch=1,
        zero=s.zero if s.dp == 1 else (3 if s.pp == 1 else max(s.zero, 1)),
    )  # fmt: skip
    words = [f"ZeRO-{one.zero}", "full activation checkpointing", "micro-batch 1", "a fused loss"]
    return Change(what=" + ".join(words), strategy=one, job=job)


def changes(
    spec: ModelSpec, job: Job, cluster: Cluster, strategy: Strategy, evaluate: Evaluate
) -> list[dict[str, Any]]:
    """Each legal change of a strategy with what it saves, those that suffice first."""
    now = evaluate(job, Candidates.of([strategy]))
    device = float(now.memory.device[0])
    asked = variants(strategy, job)
    rows = _rows(spec, cluster, asked, device, evaluate)
    if not any(row["verdict"] == "ok" for row in rows):
        rows += _rows(spec, cluster, [_most(strategy, job)], device, evaluate)
    rows = [row for row in rows if row["saves_bytes"] > 0]
    return sorted(rows, key=lambda row: VERDICTS.index(row["verdict"]))


def _rows(
    spec: ModelSpec, cluster: Cluster, asked: list[Change], device: float, evaluate: Evaluate
) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for job in {id(one.job): one.job for one in asked}.values():
        of_job = [k for k, one in enumerate(asked) if one.job is job]
        c = Candidates.of([asked[k].strategy for k in of_job])
        # More ranks than there are is the point of one change: the ranks' rule is not asked.
        x = Context(spec=spec, job=job, cluster=replace(cluster, nodes=2 * cluster.nodes))
        legal, run = (
            allowed(c, x, kinds=("deepspeed",)), allowed(c, x, kinds=("deepspeed", "runner"))
        )  # fmt: skip
        found = evaluate(job, c)
        for j in np.flatnonzero(legal):
            one = asked[of_job[j]]
            after = float(found.memory.device[j])
            rows[of_job[j]] = {
                "what": one.what,
                "device_bytes": round(after),
                "saves_bytes": round(device - after),
                "verdict": VERDICTS[int(found.verdict[j])],
                "runs": bool(run[j]),
            }
    return [rows[k] for k in sorted(rows)]

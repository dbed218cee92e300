"""What data parallelism sends in a step, when, and how much of it compute hides.

DeepSpeed 0.19.8: stages 0 and 1 reduce once a step, stage 2 every micro-batch; stages 1 and 2 gather
the weights after the step; stage 3 gathers before forward and before backward and reduces after
backward, every micro-batch. Fully sharded data parallel is stage 3; DDP and Megatron's distributed
optimizer reduce along the last backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.communication import Figures, collective_s
from outlay.planner.estimate.operators import width_of
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.stages import StageLoads
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Seconds of collectives [n], by what runs beside them."""

    forward: Array
    """Along each forward pass."""
    backward: Array
    """Along each backward pass."""
    last: Array
    """Along the last backward pass of the step."""
    after: Array
    """With nothing beside it."""
    overlap: float | Array
    """Share that the software can hide."""


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Seconds of the three collectives over all weights of a rank, in pieces."""

    reduce: Array
    scatter: Array
    gather: Array
    gather_layers: Array


def _sizes(
    c: Candidates,
    loads: StageLoads,
    bucket: Array,
    cluster: Cluster,
    figures: Figures,
    *,
    weight: int,
    gradient: int,
) -> _Sizes:
    """Dense weights are reduced over dp·cp·sp ranks, experts over those that hold the same ones."""
    dense = (loads.dense_parameters / c.tp).max(axis=0)
    experts = (loads.expert_parameters / (c.tp * c.ep)).max(axis=0)
    ranks, stride = c.dp * c.cp * c.sp, c.tp
    layers = np.maximum(1.0, loads.block_counts.sum(axis=1).max(axis=0)) + 2.0
    messages = np.maximum(1.0, np.ceil(dense / np.maximum(bucket, 1)))

    def spent(kind: str, width: int, pieces: Array) -> Array:
        one = collective_s(kind, width * dense / pieces, ranks, stride, cluster, figures) * pieces
        if not experts.any():
            return np.asarray(one)
        holders = np.maximum(1, ranks // c.ep)
        two = collective_s(kind, width * experts / pieces, holders, stride * c.ep, cluster, figures)
        return np.asarray(one + two * pieces)

    return _Sizes(
        reduce=spent("all_reduce", gradient, messages),
        scatter=spent("reduce_scatter", gradient, np.where(c.zero == 3, layers, messages)),
        gather=spent("all_gather", weight, messages),
        gather_layers=spent("all_gather", weight, layers),
    )


def traffic(
    job: Job,
    c: Candidates,
    loads: StageLoads,
    bucket: Array,
    cluster: Cluster,
    figures: Figures,
    software: Software,
    trained: float = 1.0,
) -> Traffic:
    """The collectives of a step, under the software's schedule. `trained`: share of the weights that has
    gradients; stage 3 gathers the others all the same."""
    weight = width_of(job.precision)
    gradient = software.gradient_bytes or weight
    if software.accumulates_fp32:
        # Megatron adds and reduces in fp32 where the precision is bf16 (megatron/arguments.py).
        gradient = 2 if job.precision == "fp16" else gradient
    s = _sizes(c, loads, bucket, cluster, figures, weight=weight, gradient=gradient)
    s = replace(
        s, reduce=trained * s.reduce, scatter=trained * s.scatter, gather=trained * s.gather
    )
    nothing = np.zeros(len(c))
    full = c.zero == 3
    overlap = figures["communication.overlap_fraction"] * np.where(
        (c.overlap_comm > 0) | (software.overlap > 0), 1.0, 0.0
    )
    if software.family == "ddp":
        return Traffic(
            forward=nothing, backward=nothing, last=s.reduce, after=nothing, overlap=overlap
        )
    forward = np.where(full, s.gather_layers, 0.0)
    backward = np.where(full, s.gather_layers + s.scatter, 0.0)
    if software.family == "deepspeed":
        backward = np.where(c.zero == 2, s.reduce, backward)
        last = np.where(c.zero == 1, s.reduce, 0.0)
        after = np.select([c.zero == 0, c.zero <= 2], [s.reduce, s.gather], 0.0)
    else:
        last = np.select(
            [c.zero == 1, c.zero == 2], [s.scatter + s.gather, s.scatter + s.gather], 0.0
        )
        after = np.where(c.zero == 0, s.reduce, 0.0)
    return Traffic(forward=forward, backward=backward, last=last, after=after, overlap=overlap)


def exposed_s(sent: Array, beside: Array, share: float | Array, figures: Figures) -> Array:
    """What of `sent` the pass beside it does not hide, with what it slows that pass down.

    Collectives take multiprocessors and memory bandwidth from the compute that runs beside them:
    1.1–1.3 times slower on both sides (Galvatron, arXiv 2211.13878, section 4).
    """
    hidden = np.minimum(sent * share, beside)
    return np.asarray(sent - hidden * (1.0 - figures["communication.contention"]))

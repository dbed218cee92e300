"""Host memory and NVMe of one node: what processes, offloaded states and files being read take there.

Evidence for offload is DeepSpeed 0.19.8: `runtime/zero/stage_1_and_2.py` (fp32 partition, its gradient
and a 16-bit copy pinned), `runtime/zero/stage3.py` (fp32 sub-groups, their gradients and the flat
gradient shard pinned), `runtime/swap_tensor/` (pools). Page cache is not counted: the system gives it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.buckets import sub_group_size
from outlay.planner.estimate.candidates import OFFLOAD, Array, Candidates
from outlay.planner.estimate.states import (
    PAGED,
    Held,
    deepspeed_moments,
    optimizer_key,
    swap_buffers,
    width_of,
)
from outlay.planner.spec.job import Job

_CPU, _NVME = OFFLOAD.index("cpu"), OFFLOAD.index("nvme")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One node; arrays [n], bytes."""

    parts: dict[str, Array]
    """At the fullest moment; they sum to `total`."""
    nvme: Array

    @property
    def total(self) -> Array:
        whole: Array = sum(self.parts.values(), np.zeros(()))
        return whole


def pinned(size_bytes: Array) -> Array:
    """What page-locked memory of that size takes: torch's host allocator rounds up to a power of two
    (ATen/core/CachingHostAllocator.h, `PowerOf2Ceil`)."""
    grown: Array = np.exp2(np.ceil(np.log2(np.maximum(size_bytes, 1.0)))) * (size_bytes > 0)
    return grown


def _moments(held: Held, c: Candidates, job: Job) -> Array:
    root = (held.root / np.maximum(held.total, 1.0)).mean(axis=0)
    return deepspeed_moments(optimizer_key(job), c.zero, width_of(job.precision), root)


def _offloaded(
    held: Held, c: Candidates, job: Job, bucket: Array
) -> tuple[Array, Array, Array, Array]:
    """Of one rank: (optimizer and gradients in RAM, weights in RAM, pools for NVMe, on NVMe), [n]."""
    width, shard = width_of(job.precision), held.shard(c).max(axis=0)
    share = np.maximum(held.trainable * shard, 1.0)
    moments = _moments(held, c, job)
    largest = width * held.largest_tensor / c.tp
    group = np.minimum(share, sub_group_size(bucket))
    # Stages 1 and 2: master, its gradient and the 16-bit copy of the update, all pinned, a temporary of
    # the largest gradient; with accumulation the gradients of the partition once more.
    again = np.where(c.grad_accum > 1, width * share, 0.0)
    flat = 2 * pinned(4 * share) + pinned(width * share) + pinned(largest) + again
    # Stage 3: master, pinned gradients of each sub-group, the pinned flat shard.
    grouped = 4 * share + np.ceil(share / group) * pinned(4 * group) + pinned(width * share)
    states = np.where(c.zero == 3, grouped, flat) + moments * share
    on_nvme = (8 + moments) * share
    paged = PAGED.get(job.optimizer.name, 0.0) * share
    optimizer = np.where(c.offload_optimizer == _CPU, states, paged)
    weights = np.where(c.offload_param == _CPU, pinned(width * shard), 0.0)
    buffers = swap_buffers(held, c, share, width, bucket)
    pools = np.where(c.offload_optimizer == _NVME, buffers, 0.0)
    stored = np.where(c.offload_optimizer == _NVME, on_nvme, 0.0)
    stored = stored + np.where(c.offload_param == _NVME, width * shard, 0.0)
    return optimizer, weights, pools, stored


def host_memory(
    held: Held,
    c: Candidates,
    job: Job,
    *,
    parameters: int,
    bucket: Array,
    ranks_per_node: int,
    device: Array | None,
    figures: Mapping[str, float],
) -> Host:
    """Of one node with `ranks_per_node` ranks; `device`: a rank's peak where the device is the host (CPU),
    which holds the process too; null on a GPU.

    Files: on resume each rank reads its part of a checkpoint into memory, at stages 0 to 2 with all
    weights of its stage; at the end the first rank holds the whole weights for the export. Frozen
    weights are mapped from their files, not read.
    """
    ranks = np.minimum(c.dp * c.tp * c.pp * c.cp * c.sp, ranks_per_node)
    width, moments = width_of(job.precision), _moments(held, c, job)
    optimizer, weights, pools, stored = _offloaded(held, c, job, bucket)
    whole, shard = held.total.max(axis=0), held.shard(c).max(axis=0)
    own = held.trainable * (4 + moments) * np.where(c.zero >= 1, shard, whole)
    read = np.where(c.zero == 3, own, np.maximum(own, width * held.trainable * whole))
    # What is read of offloaded moments stays as them: it is in the states already.
    read = np.where(
        c.offload_optimizer == _CPU, np.maximum(read - moments * held.trainable * shard, 0.0), read
    )
    files = np.maximum(ranks * read, width * held.trainable * parameters)
    if device is None:
        process = np.full(len(c), figures["host.process_bytes"])
    else:
        process, files = device, np.zeros(len(c))
        optimizer = weights = pools = np.zeros(len(c))
    return Host(
        parts={
            "processes": ranks * process,
            "optimizer_states": ranks * optimizer,
            "parameters": ranks * weights,
            "pools": ranks * pools,
            "files": files,
        },
        nvme=ranks * stored,
    )

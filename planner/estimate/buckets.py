"""How large the buckets of ZeRO are: one rule, read by the estimate and by the configuration."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import OFFLOAD, Array, Candidates
from outlay.planner.estimate.parameters import largest_matrices, parameter_counts
from outlay.planner.spec.model import ModelSpec

_MAX_BUCKET = 200_000_000
"""Elements. 0.4 GB in bf16: at the bandwidths of the catalog's links a reduction of that size is
within a few per cent of its asymptotic rate; larger only costs memory."""
_BUCKETS_A_MODEL = 4
"""A model smaller than that is reduced in about this many messages, so that the first can start
while the backward pass still runs."""


_PIECES_ON_NVME = 16
"""The same where the states are on NVMe, for which memory is short: buckets, gathered weights and
sub-groups are that much smaller, and each is still a few large reads."""


def bucket_sizes(
    spec: ModelSpec, tp: int = 1, pp: int = 1, ep: int = 1, *, swapped: bool = False
) -> tuple[int, int]:
    """(reduce_bucket_size, allgather_bucket_size) in elements for one model-parallel rank; `swapped`: the
    optimizer's states are on NVMe.

    Never below the largest single tensor: DeepSpeed reduces a larger tensor alone, outside the
    bucket, and then holds both.
    """
    total = parameter_counts(spec).total // (tp * pp)
    dense, experts = largest_matrices(spec)
    largest = max(dense, experts // ep) // tp
    pieces = _PIECES_ON_NVME if swapped else _BUCKETS_A_MODEL
    bucket = max(min(total // pieces, _MAX_BUCKET), largest)
    return bucket, bucket


def reduce_buckets(spec: ModelSpec, c: Candidates) -> Array:
    """Reduce bucket in elements for each candidate: its own, or the size of `bucket_sizes`."""
    total, largest = parameter_counts(spec).total, largest_on_rank(spec, c)
    pieces = np.where(on_nvme(c), _PIECES_ON_NVME, _BUCKETS_A_MODEL)
    sized = np.minimum(total // (c.tp * c.pp) // pieces, _MAX_BUCKET)
    sized = np.maximum(sized, largest // c.tp)
    return np.where(c.reduce_bucket_size >= 0, c.reduce_bucket_size, sized)


_SMALLER = 16
"""A small bucket is that part of the usual one: up to 2 GB less where the largest tensor is the table of a large
vocabulary, and messages that are still hundreds of times their latency."""
_LEAST_BUCKET = 1_000_000
"""Elements: of 2 MB in bf16 a message is no longer limited by the links."""


def smaller_buckets(spec: ModelSpec, c: Candidates) -> Array:
    """The small bucket in elements for each candidate; even, as DeepSpeed wants it of all-gathers.

    It may be below the largest tensor: DeepSpeed reduces such a gradient where it lies at stages 1 and 2
    (`stage_1_and_2.py`, `extra_large_param_to_reduce`), from a copy at stage 3 (`reduce_scatter_coalesced`).
    """
    usual = reduce_buckets(spec, c)
    return np.asarray(np.minimum(usual, np.maximum(usual // _SMALLER, _LEAST_BUCKET) // 2 * 2))


def largest_on_rank(spec: ModelSpec, c: Candidates) -> Array:
    """Elements of the largest tensor of a rank before tensor parallelism divides it, [n]."""
    dense, experts = largest_matrices(spec)
    return np.asarray(np.maximum(dense, experts // c.ep))


def on_nvme(c: Candidates) -> Array:
    """Whether the optimizer's states are on NVMe."""
    return np.asarray(c.offload_optimizer == OFFLOAD.index("nvme"))


SUB_GROUP = 100_000_000
"""Elements. Stage 3 steps the optimizer sub-group by sub-group, with an fp32 copy of one's gradients:
0.4 GB, against 4 GB for DeepSpeed's default of 1e9."""


def sub_group_size(
    bucket: Array | int, shards: Array | int = 1, swapped: Array | bool = False
) -> Array:
    """Stage 3's `sub_group_size` in elements of one rank, never below the bucket; where the states are on
    NVMe a rank's part of the bucket, for four of its buffers are pinned."""
    return np.asarray(np.where(swapped, -(-bucket // shards), np.maximum(bucket, SUB_GROUP)))


_LIVE = 500_000_000


def max_live_parameters(bucket: Array | int, swapped: Array | bool = False) -> Array:
    """Stage 3's `stage3_max_live_parameters` and reuse distance in elements: gathered weights stay
    until so many are alive. Four buckets, so that a small model is gathered once for forward and
    backward; at most 5e8 (1 GB in bf16) unless one bucket is larger. One bucket where the states are on NVMe."""
    live = np.where(swapped, bucket, np.minimum(4 * np.asarray(bucket), _LIVE))
    return np.asarray(np.maximum(live, np.maximum(bucket, 1_000_000)))


PARAMETER_BUFFERS = 5
"""Pinned buffers for weights on NVMe (`runtime/zero/offload_config.py`, buffer_count)."""


def parameter_buffer_size(largest: Array | int, shards: Array | int) -> Array:
    """Elements of one: a rank's part of the largest tensor (`partitioned_param_swapper.py`)."""
    return np.asarray(-(-largest // shards))

"""How large the buckets of ZeRO are: one rule, read by the estimate and by the configuration."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

_MAX_BUCKET = 200_000_000
"""Elements. 0.4 GB in bf16: at the bandwidths of the catalog's links a reduction of that size is
within a few per cent of its asymptotic rate; larger only costs memory."""
_BUCKETS_A_MODEL = 4
"""A model smaller than that is reduced in about this many messages, so that the first can start
while the backward pass still runs."""


def bucket_sizes(spec: ModelSpec, tp: int = 1, pp: int = 1) -> tuple[int, int]:
    """(reduce_bucket_size, allgather_bucket_size) in elements for one model-parallel rank.

    Never below the largest single tensor: DeepSpeed reduces a larger tensor alone, outside the
    bucket, and then holds both.
    """
    total = parameter_counts(spec).total // (tp * pp)
    largest = largest_matrix(spec) // tp
    bucket = max(min(total // _BUCKETS_A_MODEL, _MAX_BUCKET), largest)
    return bucket, bucket


def reduce_buckets(spec: ModelSpec, c: Candidates) -> Array:
    """Reduce bucket in elements for each candidate: its own, or the size of `bucket_sizes`."""
    total, largest = parameter_counts(spec).total, largest_matrix(spec)
    sized = np.minimum(total // (c.tp * c.pp) // _BUCKETS_A_MODEL, _MAX_BUCKET)
    sized = np.maximum(sized, largest // c.tp)
    return np.where(c.reduce_bucket_size >= 0, c.reduce_bucket_size, sized)


SUB_GROUP = 100_000_000
"""Elements. Stage 3 steps the optimizer sub-group by sub-group, with an fp32 copy of one's gradients:
0.4 GB, against 4 GB for DeepSpeed's default of 1e9."""


def sub_group_size(bucket: Array | int) -> Array:
    """Stage 3's `sub_group_size` in elements, never below the bucket."""
    return np.asarray(np.maximum(bucket, SUB_GROUP))


_LIVE = 500_000_000


def max_live_parameters(bucket: Array | int) -> Array:
    """Stage 3's `stage3_max_live_parameters` and reuse distance in elements: gathered weights stay
    until so many are alive. Four buckets, so that a small model is gathered once for forward and
    backward; at most 5e8 (1 GB in bf16) unless one bucket is larger."""
    live = np.minimum(4 * np.asarray(bucket), _LIVE)
    return np.asarray(np.maximum(live, np.maximum(bucket, 1_000_000)))


_SWAP_GROUPS = 16
"""Into about how many sub-groups a rank's states on NVMe are cut: four buffers of one are pinned, so
a quarter of the states at most stays in memory, and a group is still read in few large pieces."""


def largest_share(spec: ModelSpec, c: Candidates | Strategy) -> Array | int:
    """Elements of the largest tensor that one rank holds at stage 3: what a buffer for weights on NVMe
    must hold (`partitioned_param_swapper.py`, `elements_per_buffer`)."""
    return -(-largest_matrix(spec) // (c.tp * c.dp * c.sp))


def swap_group_size(spec: ModelSpec, c: Candidates | Strategy) -> Array | int:
    """Stage 3's `sub_group_size` in elements where the states are on NVMe. A group is closed by the
    tensor that reaches this size, so it is at most that tensor larger (`stage3.py`,
    `_create_fp16_sub_groups`)."""
    share = parameter_counts(spec).total // (c.tp * c.dp * c.sp)
    sized = np.maximum(largest_share(spec, c), share // _SWAP_GROUPS)
    return np.asarray(np.minimum(sized, SUB_GROUP))

"""Weights, gradients and optimizer states of one rank, as each family of software allocates them.

DeepSpeed's evidence is its source, 0.19.8 (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`,
`stage3.py`, `bf16_optimizer.py`) and the measured grid in docs/log.md; the other families' is in
docs/explanation/memory.md. All sizes are bytes, arrays [3, n] (pipeline position × candidate).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.buckets import (
    PARAMETER_BUFFERS,
    max_live_parameters,
    on_nvme,
    parameter_buffer_size,
    sub_group_size,
)
from outlay.planner.estimate.candidates import OFFLOAD, Array, Candidates
from outlay.planner.estimate.software import Software
from outlay.planner.spec.job import Job

MOMENTS = {
    "adamw": 8, "adam": 8, "lamb": 8, "sgd": 0, "sgd_momentum": 4, "lion": 4, "muon": 4,
    "rmsprop": 4, "adafactor": 0.01, "adamw_8bit": 2.03, "paged_adamw": 0, "paged_adamw_8bit": 0,
}  # fmt: skip
"""Bytes a parameter of optimizer state beside fp32 master weights. Two fp32 moments: Adam (arXiv
1412.6980), LAMB; one: SGD with momentum, RMSprop (torch.optim), Lion (arXiv 2302.06675), Muon. 8-bit: one
byte and its blockwise scale (a 4-byte scale for 256 values, arXiv 2110.02861) each; paged: in memory that
the driver moves to the host (bitsandbytes), not counted on the device; Adafactor (arXiv 1804.04235): a row
and a column of each matrix. Under DeepSpeed see `deepspeed_moments`."""
PAGED = {"paged_adamw": 8.0, "paged_adamw_8bit": 2.03}
"""Bytes a parameter that the host must be able to take of paged states."""
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""A weight of a frozen linear layer: 4 bits with an fp32 scale for 64 of them, or that scale in 8 bits
with an fp32 one for 256 scales (QLoRA, arXiv 2305.14314, section 3); 8 bits with a scale a row."""
OPTIMIZER_BUFFERS = 4
"""Buffers of one sub-group each for states on NVMe (`offload_config.py`, buffer_count)."""
_NVME = OFFLOAD.index("nvme")
_SUB_GROUP = 1_000_000_000
"""Elements that stage 3 steps at once (DeepSpeed's default `sub_group_size`)."""
_DEFAULT_BUCKET = 500_000_000
"""Elements: DeepSpeed's own reduce and all-gather buckets where nobody sets them."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Weights on one rank before data parallelism divides them; arrays [3, n]."""

    dense: Array
    experts: Array
    """Routed experts: already divided by ep, so fewer data-parallel ranks share them."""
    block: Array
    """The heaviest block's, [n]."""
    root: Array
    """What belongs to no block: embedding, final norm, head."""
    largest_tensor: Array | float
    """Elements [n], before tensor parallelism divides it."""
    trainable: float = 1.0
    """Fraction of the weights that is trained."""
    frozen_bytes: float | None = None
    """Bytes of one frozen weight on average; null = the width."""

    @property
    def total(self) -> Array:
        return self.dense + self.experts

    def shard(self, c: Candidates) -> Array:
        """One rank's part of all of them."""
        ranks = c.dp * c.cp * c.sp
        shared = np.ceil(self.dense / ranks)
        whole: Array = shared + np.ceil(self.experts / np.maximum(1, ranks // c.ep))
        return whole


@dataclass(frozen=True, kw_only=True)
class States:
    """One rank's model states, in bytes."""

    parameters: Array
    gradients_held: Array
    """Alive between micro-batches, from the first backward to the optimizer step."""
    gradients_always: Array
    """Of these, what is a buffer that lives from the start (Megatron's main gradients)."""
    gradients_new: Array
    """What one backward adds before it is reduced into those held."""
    optimizer_states: Array
    """Master weights and moments."""
    master: Array
    """Of these, the fp32 master weights; DeepSpeed's only, 0 elsewhere."""
    step_temporary: Array
    """Alive only in the optimizer step: fp32 copies of gradients, updated weights in flight."""
    communication: Array
    """Buckets, while a backward pass runs."""
    communication_always: Array
    """Of these, what is alive in the forward pass too."""
    gathered: Array
    """Whole weights alive during forward and backward: stage 3's, FSDP's, autocast's."""
    load: Array
    """Peak of loading the weights, where it can exceed the peak of a step; else 0."""


def width_of(precision: str) -> int:
    """Bytes of a weight as the forward pass reads it."""
    return 4 if precision in ("fp32", "tf32") else 2


def optimizer_key(job: Job) -> str:
    """The job's optimizer as a key of MOMENTS."""
    if job.optimizer.name == "sgd":
        return "sgd_momentum" if job.optimizer.momentum else "sgd"
    return job.optimizer.name


def deepspeed_moments(optimizer: str, zero: Array | int, width: int, root: Array | float) -> Array:
    """Bytes a parameter of moments under DeepSpeed; `root`: share of the weights outside the blocks.

    Adafactor factors matrices only, and what ZeRO and the 16-bit wrappers give it is one flat vector.
    Muon steps the blocks' matrices with one moment and leaves the rest to Adam (`runtime/zero/muon/`).
    """
    if optimizer == "adafactor":
        flat = (np.asarray(zero) >= 1) | (width == 2)
        return np.where(flat, 4.0, MOMENTS[optimizer])
    if optimizer == "muon":
        return np.asarray(4.0 + 4.0 * np.asarray(root))
    return np.asarray(float(MOMENTS[optimizer]))


def state_bytes(
    held: Held, c: Candidates, *, software: Software, precision: str, optimizer: str, bucket: Array
) -> States:
    """States of a rank that holds `held` before ZeRO divides them; `bucket` in elements [n]."""
    width = width_of(precision)
    if software.family == "megatron":
        states = _megatron(held, c, software, precision, optimizer)
    elif software.family == "fsdp":
        states = _fsdp(held, c, software, width, optimizer)
    elif software.family in ("ddp", "single"):
        states = _replicated(held, c, software, width, optimizer)
    else:
        states = _deepspeed(held, c, software, precision, optimizer, bucket)
    shape = np.broadcast_shapes(held.dense.shape, (3, len(c)))
    states.setdefault("master", 0.0)
    return States(**{k: np.broadcast_to(v, shape).astype(float) for k, v in states.items()})


def _deepspeed(
    held: Held, c: Candidates, software: Software, precision: str, optimizer: str, bucket: Array
) -> dict[str, Array | float]:
    """DeepSpeed 0.19.8.

    Stage 0 in fp32 is plain torch. In 16 bits it is DeepSpeed's FP16/BF16 wrapper with fp32
    master weights. Stages 1 and 2 keep the fp32 partition even where the weights are fp32
    themselves (`single_partition_of_fp32_groups` is a clone). A bf16 pipeline at stage 0 gets
    BF16_Optimizer (`engine.py`, `_do_optimizer_sanity_check`): partitioned states, and a flat buffer of
    all gradients beside `.grad`. At stage 1 that needs `grad_accum_dtype: fp32`, which we never emit.
    Offload (`stage_1_and_2.py`, `stage3.py`): states, and at stages 2 and 3 the partition's gradients,
    are on the host; the device keeps one temporary of the largest gradient, or nothing at stage 3.
    """
    zero, parameters, width = c.zero, held.total, width_of(precision)
    moments = deepspeed_moments(optimizer, zero, width, held.root / np.maximum(parameters, 1.0))
    # Torch's own step is how CPU ranks are told: there the host is the device, and nothing leaves it.
    swapped = on_nvme(c)
    same_memory = (c.offload_optimizer > 0) & ~swapped & software.step_in_torch
    offloaded = c.offload_optimizer > 0
    away = (c.offload_param == _NVME) | ((c.offload_param > 0) & (not software.step_in_torch))
    bf16_pipeline = (zero == 0) & (c.pp > 1) & (precision == "bf16")
    shard = held.shard(c)
    share = held.trainable * np.where((zero >= 1) | bf16_pipeline, shard, parameters)
    on_device = np.where(zero == 3, np.where(away, 0.0, shard), parameters)
    master = np.where((zero == 0) & (width == 4), 0, 4 * share)
    kept = np.where(zero >= 2, np.where(offloaded, 0.0, shard), parameters * (1 + bf16_pipeline))
    gradients = width * held.trainable * kept
    staged = np.where(same_memory, _staged(c, share, master, moments, width), 0.0)
    if software.step_in_torch:
        staged = np.where(swapped, swap_buffers(held, c, share, width, bucket), staged)
    work = 8 * share * (moments > 0) * software.step_in_torch
    temporary = _step_temporary(held, c, share, work, gradients, bucket, width, bf16_pipeline)
    return {
        "parameters": _weights(held, width) * on_device,
        "gradients_held": gradients,
        # Stage 3 allocates its shard at the start (`grad_partitions_flat_buffer`).
        "gradients_always": np.where(zero == 3, gradients, gradients / 2 * bf16_pipeline),
        "optimizer_states": np.where(offloaded, staged, master + moments * share),
        "master": np.where(offloaded, staged - moments * share * same_memory, master),
        "step_temporary": np.where(offloaded, 0.0, temporary),
        "load": 0.0,
        **_deepspeed_buffers(held, c, bucket, width),
    }


def _step_temporary(
    held: Held, c: Candidates, share: Array, work: Array, gradients: Array, bucket: Array, width: int,
    bf16_pipeline: Array,
) -> Array:  # fmt: skip
    """Alive in DeepSpeed's optimizer step only. It works on one tensor (stage 0), the partition (1, 2) or
    a sub-group of it (3): the fp32 copy of its gradients and, of `work` for the whole share, Adam's
    denominator and update where the optimizer is torch's (CPU).

    Stages 1 to 3 drop the gradients once they are copied, before the optimizer works. Stage 0 has
    reduced them by then, flattened into a second copy (`engine.py`, `allreduce_no_retain`).
    """
    group = sub_group_size(bucket, c.dp * c.cp * c.sp, on_nvme(c))
    part = np.where(c.zero == 3, np.minimum(share, group), share)
    stepped = np.where(c.zero == 0, np.minimum(held.largest_tensor, share), part)
    copy = np.where((c.zero >= 1) | (width == 2), 4 * part, 0.0)
    work = work * stepped / np.maximum(share, 1.0)
    many = (c.dp * c.cp * c.sp > 1) & ~bf16_pipeline
    flat = width * held.trainable * np.minimum(held.total, _DEFAULT_BUCKET) * many
    reduced = np.maximum(copy, copy + work - gradients)
    return np.where(c.zero >= 1, reduced, np.maximum(flat, copy + work))


def _deepspeed_buffers(
    held: Held, c: Candidates, bucket: Array, width: int
) -> dict[str, Array | float]:
    """Buckets, what one backward adds before it is reduced, and stage 3's gathered weights.

    One backward: stages 0 and 1 accumulate in place; 2 and 3 fill a bucket, then reduce it. Gathered
    weights stay until `max_live_parameters` are alive; a block and the next are gathered in any case.
    """
    zero, parameters = c.zero, held.total
    in_flight = width * np.minimum(
        held.trainable * parameters, np.maximum(bucket, held.largest_tensor)
    )
    buckets = np.where((zero >= 1) & (zero <= 2), width * bucket * (1 + c.overlap_comm), 0.0)
    buckets = buckets + np.where(zero == 3, width * bucket, 0.0)
    # A tensor larger than stage 3's bucket is reduced outside it, from a copy (`reduce_scatter_coalesced`).
    outside = (zero == 3) & (bucket < held.largest_tensor / c.tp)
    copied = np.where(outside, width * held.trainable * held.largest_tensor / c.tp, 0.0)
    offloaded = (c.offload_optimizer > 0) & (zero < 3)
    temporary_gradient = np.where(offloaded, width * held.largest_tensor / c.tp, 0.0)
    live = np.maximum(max_live_parameters(bucket, on_nvme(c)), 2 * held.block)
    return {
        "gradients_new": np.where(zero >= 2, in_flight, 0.0) + copied,
        "communication": buckets + temporary_gradient,
        # Stages 1 and 2 release theirs after each backward (`_release_ipg_buffers`).
        "communication_always": np.where(zero == 3, buckets, temporary_gradient),
        "gathered": np.where(zero == 3, width * np.minimum(parameters, live), 0.0),
    }


def _staged(c: Candidates, share: Array, master: Array, moments: Array, width: int) -> Array:
    """What an offloaded optimizer keeps in host memory: states, fp32 gradients, the 16-bit copy of
    stages 1 and 2, and between micro-batches the gradients (stage 3: its flat shard)."""
    again = width * share * ((c.grad_accum > 1) | (c.zero == 3))
    kept: Array = master + (moments + 4 + width * (c.zero < 3)) * share + again
    return kept


def swap_buffers(held: Held, c: Candidates, share: Array, width: int, bucket: Array) -> Array:
    """Bytes that a rank keeps in host memory of what is on NVMe at stage 3.

    The flat gradient shard (`stage3.py`, `grad_partitions_flat_buffer`); four buffers of the largest
    sub-group in fp32 (`optimizer_utils.py`, `SwapBufferManager`), which is closed by the tensor that
    reaches its size; for the weights five of the largest tensor's part, and one of a whole sub-group of
    all ranks (`partitioned_param_swapper.py`, `reserve_partitioned_swap_space`). Pieces under 1 MiB are
    not swapped; they are not counted.
    """
    shards = c.dp * c.cp * c.sp
    largest = parameter_buffer_size(held.largest_tensor / c.tp, shards)
    group = np.minimum(share, sub_group_size(bucket, shards, True) + largest)
    weights = width * (PARAMETER_BUFFERS * largest + shards * group)
    return np.asarray(
        width * share
        + 4 * OPTIMIZER_BUFFERS * group
        + np.where(c.offload_param == _NVME, weights, 0.0)
    )


def _megatron(
    held: Held, c: Candidates, software: Software, precision: str, optimizer: str
) -> dict[str, Array | float]:
    """Megatron-LM: fp32 main gradients in one buffer for bf16, the width's for fp16, whose fp32 copies
    the optimizer keeps; the distributed optimizer divides master weights and moments.

    Megatron-DeepSpeed: the same states under DeepSpeed of its time: ZeRO-1 in fp16 holds fp32
    gradients of its partition, bf16 (BF16_Optimizer) of all weights, beside two default buckets;
    without ZeRO the fp32 gradients and the flat 16-bit ones live in the optimizer step only.
    """
    width, parameters, shard = width_of(precision), held.total, held.shard(c)
    zero3, share = c.zero == 3, np.where(c.zero >= 1, shard, parameters)
    under_deepspeed = software.gradient_bytes is None
    if width == 4:
        gradients, master = 4 * parameters, 0.0
    elif precision == "fp16":
        copies = np.where(under_deepspeed & (c.zero == 0), 0.0, 4 * share)
        gradients, master = 2 * parameters + copies, 4.0
    else:
        gradients, master = (6 if under_deepspeed else 4) * parameters, 4.0
    buckets = (
        2 * width * np.minimum(parameters, _DEFAULT_BUCKET) * (under_deepspeed & (c.zero >= 1))
    )
    gathered = width * np.minimum(parameters, held.root + 2 * held.block)
    gradients = np.where(zero3, (width if under_deepspeed else 4) * shard, gradients)
    return {
        "parameters": width * np.where(zero3, shard, parameters),
        "gradients_held": gradients,
        "gradients_always": gradients,
        "gradients_new": np.where(zero3, width * held.block, 0.0),
        "optimizer_states": np.where(
            c.offload_optimizer > 0, 0, (master + MOMENTS[optimizer]) * share
        ),
        "step_temporary": 0.0,
        "communication": buckets,
        "communication_always": buckets,
        "gathered": np.where(zero3, gathered, 0.0),
        "load": 0.0,
    }


def _fsdp(
    held: Held, c: Candidates, software: Software, width: int, optimizer: str
) -> dict[str, Array | float]:
    """PyTorch FSDP: sharded weights, gradients and moments in fp32 (in the width where the software
    keeps no master weights), and what is gathered in the width: all that is in no block, the block at
    work and the one prefetched. In a pipeline the stage stays gathered, with whole gradients, until
    the last micro-batch. Adapters: FSDP's flat parameter mixes them with frozen weights, so each
    block's gradient is as long as its weights; loading a whole checkpoint gathers all beside shards.
    """
    parameters, shard = held.total, held.shard(c)
    held_bytes = 4 if software.master or width == 4 else width
    replica, pipeline = c.zero == 2, (c.pp > 1) & (c.grad_accum > 1)
    whole = replica | pipeline | (c.zero < 2)
    gathered = width * np.where(
        whole, parameters, np.minimum(parameters, held.root + 2 * held.block)
    )
    reduced = software.gradient_bytes or width
    new = (width + reduced) * np.maximum(held.block, held.root / 2)
    share = held.trainable * shard
    moments = MOMENTS[optimizer] * held_bytes / 4
    unsynced = software.accumulates_whole & (c.grad_accum > 1)
    # Frozen weights outside the blocks are flat parameters of their own, without gradients.
    outside = held.root if held.trainable < 1 else 0.0
    gradients = held_bytes * np.where(unsynced, parameters - outside, shard)
    loading = held_bytes * (parameters + 1.5 * shard) if held.trainable < 1 else 0.0
    return {
        "parameters": held_bytes * shard,
        "gradients_held": gradients + np.where(pipeline, reduced * parameters, 0.0),
        "gradients_always": 0.0,
        "gradients_new": new,
        "optimizer_states": np.where(c.offload_optimizer > 0, 0.0, moments * share),
        "step_temporary": 0.0,
        "communication": 0.0,
        "communication_always": 0.0,
        "gathered": gathered,
        "load": loading,
    }


def _replicated(
    held: Held, c: Candidates, software: Software, width: int, optimizer: str
) -> dict[str, Array | float]:
    """Plain torch on one GPU, or DDP, whose buckets hold the gradients a second time.

    With master weights this is autocast: fp32 weights, gradients and moments, and a cast of each
    matrix that lives through forward and backward. Without, all is in the width.
    """
    parameters, train = held.total, held.trainable
    held_bytes = 4 if software.master or width == 4 else width
    copies = held_bytes * parameters * train * (c.dp > 1) if software.family == "ddp" else 0.0
    frozen = held.frozen_bytes if held.frozen_bytes is not None else held_bytes
    autocast = width * parameters if held_bytes > width else 0.0
    return {
        "parameters": (train * held_bytes + (1 - train) * frozen) * parameters,
        "gradients_held": held_bytes * train * parameters,
        "gradients_always": 0.0,
        "gradients_new": 0.0,
        "optimizer_states": MOMENTS[optimizer] * held_bytes / 4 * train * parameters,
        "step_temporary": 0.0,
        "communication": copies,
        "communication_always": copies,
        "gathered": autocast,
        "load": 0.0,
    }


def _weights(held: Held, width: int) -> float:
    """Bytes of one weight on average, frozen and trained together."""
    frozen = held.frozen_bytes if held.frozen_bytes is not None else width
    return held.trainable * width + (1 - held.trainable) * frozen

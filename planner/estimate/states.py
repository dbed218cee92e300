"""Weights, gradients and optimizer states of one rank, as DeepSpeed 0.19.8 allocates them.

Evidence is DeepSpeed's source (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`,
`bf16_optimizer.py`) and the measured grid in docs/log.md. All sizes are bytes, arrays [3, n]
(pipeline position × candidate).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates

MOMENTS = {"adamw": 8, "adam": 8, "sgd": 0, "sgd_momentum": 4}
"""Bytes a parameter of fp32 optimizer state."""


@dataclass(frozen=True, kw_only=True)
class States:
    """One rank's model states, in bytes."""

    parameters: Array
    gradients_held: Array
    """Alive between micro-batches, from the first backward to the optimizer step."""
    gradients_new: Array
    """What one backward adds before it is reduced into those held."""
    optimizer_states: Array
    """Master weights and moments."""
    step_temporary: Array
    """Alive only in the optimizer step: fp32 copies of gradients, updated weights in flight."""
    communication: Array
    """Buckets and gathered layers, from the first backward on."""
    gathered: Array
    """Stage 3: whole weights alive during forward and backward."""


def _divide(parameters: Array, ranks: Array) -> Array:
    return np.ceil(parameters / ranks)


def state_bytes(
    parameters: Array,
    c: Candidates,
    *,
    precision: str,
    optimizer: str,
    bucket: Array,
    largest_tensor: float,
    block_parameters: Array,
    offload_to_host: Array,
) -> States:
    """States of `parameters` weights [3, n] that a rank holds before ZeRO divides them by dp.

    `bucket`: reduce bucket in elements [n]; `block_parameters`: weights of the heaviest block
    [n]; `offload_to_host`: True where optimizer states live in host RAM.

    Stage 0 in fp32 is plain torch. In 16 bits it is DeepSpeed's FP16/BF16 wrapper with fp32
    master weights. Stages 1 and 2 keep the fp32 partition even where the weights are fp32
    themselves (`single_partition_of_fp32_groups` is a clone). Stage 1 + bf16 keeps fp32 gradients
    where DeepSpeed picks BF16_Optimizer, which the emitted configuration never asks for.
    """
    width = 4 if precision in ("fp32", "tf32") else 2
    moments = MOMENTS[optimizer]
    zero, dp = c.zero, c.dp
    share = _divide(parameters, np.where(zero >= 1, dp, 1))
    weights = width * np.where(zero == 3, _divide(parameters, dp), parameters)
    master = np.where((zero == 0) & (width == 4), 0, 4 * share)
    optimizer_states = np.where(offload_to_host, 0, master + moments * share)

    grad_full = width * parameters
    held = np.where(zero >= 2, width * share, grad_full)
    # One backward: stages 0 and 1 accumulate in place; 2 and 3 fill a bucket, then reduce it.
    in_flight = width * np.minimum(parameters, np.maximum(bucket, largest_tensor))
    new = np.where(zero >= 2, in_flight, 0.0)

    communication = np.where((zero >= 1) & (zero <= 2), width * bucket * (1 + c.overlap_comm), 0.0)
    communication = communication + np.where(zero == 3, width * bucket, 0.0)
    gathered = np.where(zero == 3, width * np.minimum(parameters, 2 * block_parameters), 0.0)

    # Adam's out-of-place intermediates (denominator, update) for the tensor being stepped.
    stepped = np.where(zero == 0, largest_tensor, share)
    temporary = 4 * np.minimum(stepped, share) * (2 if moments else 1)
    temporary = temporary + np.where((zero >= 1) | (width == 2), 4 * share, 0)
    temporary = np.where(offload_to_host, 0.0, temporary)
    shape = parameters.shape
    return States(
        parameters=np.broadcast_to(weights, shape).astype(float),
        gradients_held=np.broadcast_to(held, shape).astype(float),
        gradients_new=np.broadcast_to(new, shape).astype(float),
        optimizer_states=np.broadcast_to(optimizer_states, shape).astype(float),
        step_temporary=np.broadcast_to(temporary, shape).astype(float),
        communication=np.broadcast_to(communication, shape).astype(float),
        gathered=np.broadcast_to(gathered, shape).astype(float),
    )

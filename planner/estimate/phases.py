"""What is alive on a rank's device in each phase of a run: those of a step, and loading, evaluation, saving.

Two sides that add up: the weights' (`Alive`, which the layout of the ranks decides) and the batch's
(`Working`, which the micro-batch decides).

Loading, evaluation and saving are those of `outlay run` under DeepSpeed 0.19.8 (`runner/engine.py`,
`runner/export.py`; DeepSpeed's `runtime/zero/`, `runtime/fp16/fused_optimizer.py`). Of other software
they are unknown. Arrays are [3, n] (pipeline position × candidate), bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.activations import Execution, block_saved
from outlay.planner.estimate.buckets import on_nvme, sub_group_size
from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.states import Held, States
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec

PHASES = ("loss", "backward", "backward_end", "step", "load", "eval", "save")
STEP_PHASES = 4
"""The first four are those of a training step."""


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """What loading and saving depend on besides the strategy."""

    on_host: bool
    """The device is the host (CPU): copies on the host take the same memory."""


@dataclass(frozen=True, kw_only=True)
class Alive:
    """What the weights' side has alive in one phase; arrays [3, n], null = nothing."""

    fixed: Array
    """parameters + optimizer_states, which most phases share."""
    parameters: Array
    optimizer_states: Array
    gradients: Array | None = None
    communication: Array | None = None
    workspace: Array | None = None

    @property
    def total(self) -> Array:
        whole = self.fixed
        for part in (self.gradients, self.communication, self.workspace):
            if part is not None:
                whole = whole + part
        return whole


@dataclass(frozen=True, kw_only=True)
class Working:
    """What the batch's side has alive in one phase; arrays [3, n], null = nothing."""

    activations: Array
    logits: Array | None = None

    @property
    def total(self) -> Array:
        return self.activations if self.logits is None else self.activations + self.logits


def _fixed(states: States) -> dict[str, Array]:
    return {
        "fixed": states.parameters + states.optimizer_states,
        "parameters": states.parameters,
        "optimizer_states": states.optimizer_states,
    }


def step_states(
    c: Candidates, states: States, head_grad: Array, late_grad: Array, work: Array
) -> tuple[Alive, ...]:
    """At the loss, in the first and the last block's backward, in the optimizer step; then the load
    where it is measured as a part of the step's peak (FSDP with adapters)."""
    again = np.where(c.grad_accum > 1, states.gradients_held, states.gradients_always)
    # Whole gradients of one micro-batch appear one by one: the first block's and the table's come last.
    late = np.where((c.zero <= 1) & (c.grad_accum == 1), late_grad, 0.0)
    complete = np.maximum(states.gradients_held - late, states.gradients_always)
    fixed = _fixed(states)
    gathered = states.gathered + work
    phases = (
        Alive(**fixed, gradients=again, communication=states.communication_always,
              workspace=gathered),
        Alive(**fixed, gradients=np.maximum(again, np.minimum(states.gradients_held, head_grad)),
              communication=states.communication, workspace=gathered),
        Alive(**fixed, gradients=complete + states.gradients_new,
              communication=states.communication, workspace=gathered),
        Alive(**fixed, gradients=states.gradients_held, workspace=states.step_temporary + work),
    )  # fmt: skip
    if not np.any(states.load):
        return phases
    load = np.maximum(states.load - fixed["fixed"], 0.0)
    return (*phases, Alive(**fixed, workspace=load))


def step_working(
    activations: tuple[Array, Array, Array], logits: Array
) -> tuple[Working | None, ...]:
    """Of the same phases."""
    saved, live, last = activations
    return (
        Working(activations=saved, logits=logits),
        Working(activations=saved + live),
        Working(activations=last),
        None,
    )


def loading(
    held: Held, c: Candidates, states: States, bucket: Array, width: int, run: WholeRun
) -> Alive:
    """The largest moment between an empty device and the first step; no moments yet, they come with it.

    Stages 1 and 2 flatten the weights on the device only where the copy fits, else through the host
    (`stage_1_and_2.py`, `flatten_on_accelerator`), so on a GPU the copy never fails and is not counted;
    then they clone the partition, cast it to fp32 and make a zero gradient for it. Stage 0 in 16 bits
    steps with zero gradients, and so with all moments (`fused_optimizer.py`,
    `initialize_optimizer_states`). Stage 3 holds one whole part (a block, a table) while `zero.Init`
    splits it, later the gradient shard, the bucket and an fp32 buffer of the largest sub-group.
    """
    weights, master = states.parameters, states.master
    share = master / 4
    flat = 2 * weights if run.on_host else weights
    whole = np.maximum(flat, weights + master + np.maximum(width * share, 4 * share))
    first = weights
    if width == 2:
        # On a CPU two temporaries of Adam, and a zero gradient whose pages are never touched.
        first = weights + states.optimizer_states + share * (8 if run.on_host else 4)
    whole = np.where(c.zero == 0, first, whole)
    part = width * np.maximum(held.block, held.largest_tensor / c.tp)
    # On a CPU the pages of a zero gradient are never touched.
    zeros = 0 if run.on_host else 1
    group = zeros * 4 * np.minimum(share, sub_group_size(bucket))
    # On NVMe (`master` is its buffers): a sub-group read back to be widened, and its zero gradient.
    piece = sub_group_size(bucket, c.dp * c.cp * c.sp, True) + held.largest_tensor / c.tp / c.dp
    group = np.where(on_nvme(c), (4 + zeros * 4) * piece, group)
    sharded = weights + np.maximum(
        part, master + group + states.gradients_always + states.communication_always
    )
    whole = np.where(c.zero == 3, sharded, whole)
    masters = np.minimum(master, whole - weights)
    return Alive(fixed=weights + masters, parameters=weights, optimizer_states=masters,
                 workspace=whole - weights - masters)  # fmt: skip


def evaluation_states(states: States, work: Array) -> Alive:
    """All states beside one forward pass without gradients."""
    return Alive(**_fixed(states), gradients=states.gradients_always,
                 communication=states.communication_always, workspace=states.gathered + work)  # fmt: skip


def evaluation_working(
    spec: ModelSpec, job: Job, c: Candidates, ex: Execution, has_head: Array
) -> Working:
    """One forward pass without gradients at the step's micro-batch.

    A block at work holds its input, the normed one, and the larger of attention's and the MLP's
    intermediates; nothing of it stays. The loss: logits, their fp32 copy and its log-softmax.
    """
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    shared = np.where(c.sequence_parallel > 0, c.tp, 1)
    block = np.zeros(len(c))
    for one in spec.blocks:
        s = block_saved(spec, one, ex)
        scores = (s.scores + s.cross_scores) * job.seq_len
        norm = (8.0 if ex.width == 2 and spec.norm == "rmsnorm" else 4.0) * spec.hidden
        inside = np.maximum((s.transient + scores) / c.tp, norm / shared)
        block = np.maximum(block, tokens * (inside + 2 * s.block_input / shared))
    v = float(spec.vocab) if spec.has_head else 0.0
    plain = (ex.width + 8.0 if ex.width == 2 else 8.0) * v
    a_token = np.choose(c.loss, [plain, ex.width * v, plain / 8])
    head = has_head * a_token * tokens / c.tp
    stream = tokens * spec.hidden * ex.width / shared * np.where(c.pp > 1, 2.0, 1.0)
    # The loss comes when no block is at work: only the larger of the two is alive.
    return Working(
        activations=stream + np.where(head > block, 0.0, block),
        logits=np.where(head > block, head, 0.0),
    )


def saving(
    held: Held, c: Candidates, states: States, parameters: float, width: int, run: WholeRun
) -> Alive:
    """Checkpoint, then export. The shards are copied to the host before they are written, so a GPU
    needs no more than its states; stage 3's export gathers one part at a time.

    On the host the whole weights that the first rank gathers for the export count; the checkpoint is
    written from where it lies (measured: docs/log.md).
    """
    part = width * np.maximum(held.block, held.largest_tensor / c.tp)
    extra = np.where(c.zero == 3, part, 0.0) + np.zeros_like(states.parameters)
    if run.on_host:
        extra = extra + width * parameters
    return Alive(**_fixed(states), gradients=states.gradients_always,
                 communication=states.communication_always, workspace=extra)  # fmt: skip

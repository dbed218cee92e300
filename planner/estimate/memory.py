"""Peak memory of a rank: the maximum over the phases of a step of what is alive in each.

Phases: `loss` (end of the forward pass, all saved activations and the logits), `backward` (first
block's backward, then the last, with the gradients complete), `step` (optimizer). A pipeline is
looked at on its first, heaviest middle and last stage; the peak is the largest of the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.activations import block_saved, logits_bytes_per_token
from outlay.planner.estimate.candidates import LOSS, Array, Candidates
from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.stages import StageLoads, heaviest_block, stage_loads
from outlay.planner.estimate.states import States, state_bytes
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec

PARTS = (
    "parameters",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "communication_buffers",
    "workspace",
    "runtime",
    "fragmentation",
)
PHASES = ("loss", "backward", "backward_end", "step")
POSITIONS = ("first", "middle", "last")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Arrays of n candidates, in bytes; parts are those alive at the peak and sum to the total."""

    parts: dict[str, Array]
    allocated: Array
    """What torch allocates at the peak."""
    device: Array
    """With fragmentation and what torch does not count (runtime)."""
    peak_phase: Array
    """Index into PHASES."""
    peak_position: Array
    """Index into POSITIONS."""
    by_position: Array
    """[3, n] device bytes."""
    by_phase: Array
    """[phases, n] device bytes at the position of the peak."""

    def in_kind(self, kind: str) -> Array:
        """The peak as a measurement of that `memory_kind` would show it; device bytes by default."""
        runtime, waste = self.parts["runtime"], self.parts["fragmentation"]
        if kind.startswith("allocated") or kind in ("active", "host_growth"):
            whole = self.allocated
        elif kind == "reserved":
            whole = self.allocated + waste
        else:
            return self.device
        if kind.endswith("_last_rank"):
            return (self.by_position[2] - runtime) * (whole / (self.allocated + waste))
        return whole


@dataclass(frozen=True, kw_only=True)
class _Alive:
    """What is alive in one phase; arrays [3, n]."""

    gradients: Array
    activations: Array
    logits: Array
    communication: Array
    workspace: Array


def _activations(
    spec: ModelSpec, job: Job, c: Candidates, loads: StageLoads, *, width: int, kernels: str
) -> tuple[Array, Array]:
    """(saved by all micro-batches in flight, alive only in one block's backward), [3, n] bytes."""
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    replicated_ranks = np.where(c.sequence_parallel > 0, c.tp, 1)
    in_flight = np.stack([
        np.minimum(c.pp, c.grad_accum),
        np.minimum(np.maximum(c.pp - 1, 1), c.grad_accum),
        np.ones_like(c.pp),
    ])  # fmt: skip
    full, selective = c.activation_checkpointing == 2, c.activation_checkpointing == 1
    saved = np.zeros((3, len(c)))
    live = np.zeros((3, len(c)))
    for g, block in enumerate(spec.blocks):
        s = block_saved(spec, block, width=width, kernels=kernels, attention=job.attention)
        score = np.where(selective, 0.0, s.scores * job.seq_len)
        whole = tokens * ((s.sharded + score) / c.tp + s.replicated / replicated_ranks)
        kept_input = tokens * s.block_input / replicated_ranks
        count = loads.block_counts[:, g]
        recomputed = np.where(full, count, 0.0)
        if np.any(c.recompute_layers >= 0):
            per_stage = np.ceil(c.recompute_layers / c.pp)
            recomputed = np.where(c.recompute_layers >= 0, np.minimum(count, per_stage), recomputed)
        saved += recomputed * kept_input + (count - recomputed) * whole
        one = tokens * s.transient / c.tp + np.where(recomputed > 0, whole, 0.0)
        live = np.maximum(live, np.where(count > 0, one, 0.0))
    edge = tokens * spec.hidden * width
    saved = in_flight * (saved + np.where(c.pp > 1, 2 * edge, edge))
    return saved, live


def _logits(spec: ModelSpec, job: Job, c: Candidates, loads: StageLoads, width: int) -> tuple[Array, Array]:
    """(kept until the backward starts, peak of the loss), [3, n] bytes."""
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    kept, peak = np.zeros(len(c)), np.zeros(len(c))
    for i, name in enumerate(LOSS):
        k, p = logits_bytes_per_token(spec, width, loss=name)
        kept, peak = np.where(c.loss == i, k, kept), np.where(c.loss == i, p, peak)
    return loads.has_head * kept * tokens / c.tp, loads.has_head * peak * tokens / c.tp


def _phases(
    c: Candidates, states: States, saved: Array, live: Array, logits_peak: Array, head_grad: Array
) -> tuple[_Alive, ...]:
    """What is alive at the loss, the first and last block's backward, and the optimizer step."""
    nothing = np.zeros_like(saved)
    again = np.where(c.grad_accum > 1, states.gradients_held, 0.0)
    buffers = states.communication
    return (
        _Alive(gradients=again, activations=saved, logits=logits_peak,
               communication=buffers, workspace=states.gathered),
        _Alive(gradients=np.maximum(again, np.minimum(states.gradients_held, head_grad)),
               activations=saved + live, logits=nothing,
               communication=buffers, workspace=states.gathered),
        _Alive(gradients=states.gradients_held + states.gradients_new, activations=live,
               logits=nothing, communication=buffers, workspace=states.gathered),
        _Alive(gradients=states.gradients_held, activations=nothing, logits=nothing,
               communication=nothing, workspace=states.step_temporary),
    )  # fmt: skip


def estimate_memory(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    *,
    bucket: Array,
    figures: Mapping[str, float],
    software: Software,
) -> Memory:
    """Peak memory of the heaviest rank.

    `figures` gives `memory.runtime_bytes` (context, libraries), `memory.runtime_bytes_per_rank_group`
    (a communicator) and `memory.fragmentation_fraction` of the allocated peak.
    """
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    width = 4 if job.precision in ("fp32", "tf32") else 2
    on_rank = loads.dense_parameters / c.tp + loads.expert_parameters / (c.tp * c.ep)
    heaviest = heaviest_block(spec)
    counts = parameter_counts(spec)
    block = counts.blocks[spec.blocks.index(heaviest)].total
    states = state_bytes(
        on_rank, c,
        precision=job.precision,
        optimizer=_optimizer_key(job),
        bucket=bucket,
        largest_tensor=float(largest_matrix(spec)),
        block_parameters=block / c.tp,
        offload_to_host=c.offload_optimizer > 0,
    )  # fmt: skip
    saved, live = _activations(spec, job, c, loads, width=width, kernels=software.kernels)
    _, logits_peak = _logits(spec, job, c, loads, width)
    head_grad = width * float(spec.vocab * spec.hidden) / c.tp * loads.has_head
    phases = _phases(c, states, saved, live, logits_peak, head_grad)

    fixed = states.parameters + states.optimizer_states
    totals = np.stack([
        fixed + p.gradients + p.activations + p.logits + p.communication + p.workspace for p in phases
    ])  # fmt: skip
    totals = np.where(loads.exists, totals, 0.0)
    n = np.arange(len(c))
    flat = totals.max(axis=0)
    position = flat.argmax(axis=0)
    phase = totals[:, position, n].argmax(axis=0)
    allocated = totals[phase, position, n]

    groups = 1.0 + (c.dp > 1) + (c.tp > 1) + (c.pp > 1) + (c.sp > 1) + (c.ep > 1)
    runtime = figures["memory.runtime_bytes"] + groups * figures["memory.runtime_bytes_per_group"]
    waste = figures["memory.fragmentation_fraction"]

    def alive(name: str) -> Array:
        chosen: Array = np.stack([getattr(p, name) for p in phases])[phase, position, n]
        return chosen

    parts = {
        "parameters": states.parameters[position, n],
        "gradients": alive("gradients"),
        "optimizer_states": states.optimizer_states[position, n],
        "activations": alive("activations"),
        "logits": alive("logits"),
        "communication_buffers": alive("communication"),
        "workspace": alive("workspace"),
        "runtime": np.broadcast_to(runtime, allocated.shape),
        "fragmentation": waste * allocated,
    }
    overhead = (1 + waste, runtime)
    return Memory(
        parts=parts,
        allocated=allocated,
        device=allocated * overhead[0] + overhead[1],
        peak_phase=phase,
        peak_position=position,
        by_position=np.where(loads.exists, flat * overhead[0] + overhead[1], 0.0),
        by_phase=totals[:, position, n] * overhead[0] + overhead[1],
    )


def _optimizer_key(job: Job) -> str:
    if job.optimizer.name == "sgd":
        return "sgd_momentum" if job.optimizer.momentum else "sgd"
    return job.optimizer.name

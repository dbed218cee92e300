"""Peak memory of a rank: the maximum over the phases of a step of what is alive in each.

Phases (`planner/estimate/phases.py`): `loss` (end of the forward pass, all saved activations and the
logits), `backward` (first block's backward, then the last, with the gradients complete), `step`
(optimizer); for a whole run also `load`, `eval` and `save`. A pipeline is looked at on its first,
heaviest middle and last stage; the peak is the largest of the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.activations import (
    Execution,
    SavedPerToken,
    block_saved,
    head_input_elements,
    logits_bytes_per_token,
)
from outlay.planner.estimate.candidates import LOSS, Array, Candidates
from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.estimate.phases import (
    PHASES as PHASES,
)
from outlay.planner.estimate.phases import (
    Alive,
    WholeRun,
    evaluation,
    loading,
    saving,
    step_phases,
)
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.stages import StageLoads, heaviest_block, stage_loads
from outlay.planner.estimate.states import (
    QUANTIZED_BYTES,
    Held,
    optimizer_key,
    state_bytes,
    width_of,
)
from outlay.planner.spec.job import Finetune, Job
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
    """[phases, n] device bytes at the position of the peak: of a step's phases, or of all PHASES."""
    each_phase: Array
    """[phases, n] the same, each phase at the position where it is largest."""

    least: Array
    """Device bytes below which it cannot run: before it fails, torch's allocator gives back what it
    only keeps cached, so less than the usual fragmentation remains."""

    def in_kind(self, kind: str) -> Array:
        """The peak as a measurement of that `memory_kind` would show it; device bytes by default."""
        runtime, waste = self.parts["runtime"], self.parts["fragmentation"]
        whole: Array
        if kind.startswith("allocated") or kind in ("active", "host_growth"):
            whole = self.allocated
        elif kind == "reserved":
            whole = self.allocated + waste
        else:
            return self.device
        if kind.endswith("_last_rank"):
            whole = (self.by_position[2] - runtime) * (whole / (self.allocated + waste))
        return whole


def in_flight(c: Candidates) -> Array:
    """Micro-batches whose activations are alive at once on {first, middle, last}, [3, n], in units of
    the stage's blocks.

    1F1B: pp − rank (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Interleaved: each of the
    vpp chunks is a vpp-th of the stage, and 2·(pp − rank − 1) + (vpp − 1)·pp of them are warmed up
    before the one at work (Megatron-LM, core/pipeline_parallel/schedules.py).
    """
    rank = np.stack([np.zeros_like(c.pp), np.minimum(1, c.pp - 1), c.pp - 1])
    plain = np.minimum(c.pp - rank, c.grad_accum)
    chunks = np.minimum(2 * (c.pp - rank - 1) + (c.vpp - 1) * c.pp + 1, c.grad_accum * c.vpp)
    alive: Array = np.where((c.vpp > 1) & (c.pp > 1), chunks / c.vpp, plain)
    return alive


def _length(spec: ModelSpec, job: Job, stack: str) -> int:
    """Tokens of a sequence in that stack."""
    decoder = spec.encoder_decoder and stack == "decoder" and job.target_len is not None
    return job.target_len if decoder and job.target_len else job.seq_len


def _per_block(
    s: SavedPerToken, c: Candidates, tokens: Array, keys: tuple[int, int], software: Software,
    imbalance: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """(all that one block saves, what its checkpointing keeps, its backward's temporaries), [n] bytes.

    `keys`: tokens of this sequence and of the encoder's.
    """
    scores = s.scores * keys[0] + s.cross_scores * keys[1]
    shared = np.where(c.sequence_parallel > 0, c.tp, 1)
    routed = s.routed * imbalance
    whole = tokens * ((s.sharded + routed + scores) / c.tp + s.replicated / shared)
    selective = whole - tokens * scores / c.tp
    if software.selective == "per_op":
        selective = tokens * (s.per_op_sharded / c.tp + s.per_op_replicated / shared)
        selective = np.minimum(selective, whole)
    # Megatron-DeepSpeed's ZeRO-3 scripts move the checkpoints to the host: on V100s with 32 GB they ran
    # with 16 and more sequences a rank, whose block inputs alone would not fit.
    on_host = (c.zero == 3) & (software.family == "megatron") & (software.gradient_bytes is None)
    full = np.where(on_host, 0.0, np.minimum(tokens * s.block_input / shared, whole))
    mode = c.activation_checkpointing
    kept = np.where(mode == 2, full, np.where(mode == 1, selective, whole))
    # Sequence parallelism gathers the whole input of a linear layer, and makes its whole gradient.
    gathered = np.where(shared > 1, 2 * s.block_input, 0.0)
    return whole, kept, tokens * (s.transient / c.tp + gathered)


def _activations(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    loads: StageLoads,
    ex: Execution,
    software: Software,
    imbalance: float,
) -> tuple[Array, Array, Array]:
    """[3, n] bytes: saved by all micro-batches in flight; alive besides in one block's backward; all
    that is alive in the backward of the block that comes last."""
    sequences = c.micro_batch / (c.cp * c.sp)
    saved = np.zeros((3, len(c)))
    live, last = np.zeros((3, len(c))), np.zeros((3, len(c)))
    for g, block in enumerate(spec.blocks):
        s = block_saved(spec, block, ex)
        length = _length(spec, job, block.stack)
        keys = (length, job.seq_len)
        whole, kept, transient = _per_block(s, c, sequences * length, keys, software, imbalance)
        count = loads.block_counts[:, g]
        some = np.minimum(count, np.ceil(c.recompute_layers / c.pp))
        recomputed = np.where(c.recompute_layers >= 0, some, count)
        saved += recomputed * kept + (count - recomputed) * whole
        live = np.maximum(live, np.where(count > 0, transient + (whole - kept), 0.0))
        last = np.maximum(last, np.where(count > 0, transient + whole, 0.0))
    shared = np.where(c.sequence_parallel > 0, c.tp, 1)
    edge = sequences * job.seq_len * spec.hidden * ex.width / shared
    head = sequences * job.seq_len * head_input_elements(spec, ex) * ex.width / shared
    alive: Array = in_flight(c) * (saved + _edges(c, software) * edge + loads.has_head * head)
    # Eager attention adds one mask to the scores, a value for each token and key. Checkpointed blocks
    # keep it; without checkpointing it may be gone in the backward pass.
    mask = (ex.attention == "eager") & (ex.kernels == "hf")
    once = mask * sequences * job.seq_len * job.seq_len * ex.width
    return alive + once, live, last + once


def _edges(c: Candidates, software: Software) -> Array:
    """Copies of the residual stream that a stage holds besides its blocks' inputs, [3, n].

    The last block's output, for the final norm or to be sent. DeepSpeed's pipeline keeps what it
    received and what it sent (`runtime/pipe/engine.py`); Megatron frees what it sent.
    """
    megatron = software.family == "megatron"
    if software.family == "deepspeed" or (megatron and software.gradient_bytes is None):
        return np.tile(np.where(c.pp > 1, 2.0, 1.0), (3, 1))
    sent = 0.0 if megatron else 1.0
    return np.stack([np.where(c.pp > 1, sent, 1.0), np.full(len(c), sent), np.ones(len(c))])


def _logits(
    spec: ModelSpec, job: Job, c: Candidates, loads: StageLoads, width: int, software: Software
) -> Array:
    """Peak of the vocabulary-wide tensors during the loss, [3, n] bytes.

    DeepSpeed's pipeline holds the last stage's output and loss of one micro-batch while it runs the
    next (`pipe/engine.py`: `pipe_buffers['outputs']`, `self.loss`): seen in the measured grid.
    """
    tokens = c.micro_batch * _length(spec, job, "decoder") / (c.cp * c.sp)
    peak = np.zeros(len(c))
    for i, name in enumerate(LOSS):
        if np.any(c.loss == i):
            p: Array | float
            k, p = logits_bytes_per_token(spec, width, loss=name, implementation=software.loss)
            if software.family == "deepspeed":
                if software.loss == "runner":
                    # the pipeline's output buffers hold this and the last micro-batch's logits
                    p, k = p + width * spec.vocab * (c.pp > 1), float(width * spec.vocab)
                kept = np.where((c.pp > 1) & (c.grad_accum > 1), k, 0.0)
                peak = np.where(c.loss == i, p + kept, peak)
            else:
                peak = np.where(c.loss == i, p, peak)
    whole: Array = loads.has_head * peak * tokens / c.tp
    return whole


def held_weights(
    spec: ModelSpec, job: Job, c: Candidates, loads: StageLoads, software: Software
) -> Held:
    """Weights of a rank before data parallelism, and how many of them are trained."""
    counts = parameter_counts(spec)
    block = counts.blocks[spec.blocks.index(heaviest_block(spec))]
    root = loads.has_embedding * counts.embedding + loads.has_head * (counts.final + counts.head)
    trainable, frozen = 1.0, None
    if job.finetune is not None:
        trainable = min(1.0, adapter_parameters(spec, job.finetune) / counts.total)
        if job.finetune.quant != "none":
            linear = sum(
                b.count * (p.total - p.norms)
                for b, p in zip(spec.blocks, counts.blocks, strict=True)
            )
            linear += counts.head * software.quantizes_head
            low, width = QUANTIZED_BYTES[job.finetune.quant], width_of(job.precision)
            frozen = (linear * low + (counts.total - linear) * width) / counts.total
    return Held(
        dense=loads.dense_parameters / c.tp,
        experts=loads.expert_parameters / (c.tp * c.ep),
        block=(block.total - block.experts) / c.tp + block.experts / (c.tp * c.ep),
        root=root / c.tp,
        largest_tensor=float(largest_matrix(spec)),
        trainable=trainable,
        frozen_bytes=frozen,
    )


def adapter_parameters(spec: ModelSpec, finetune: Finetune) -> float:
    """Trained weights: LoRA's two factors on q and v of every block (arXiv 2106.09685), or at most as
    many for the prefixes and scales of the others."""
    total = 0
    for block in spec.blocks:
        a = block.attention
        total += block.count * finetune.rank * (2 * spec.hidden + a.q_width + a.v_width)
    return float(total)


def estimate_memory(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    *,
    bucket: Array,
    figures: Mapping[str, float],
    software: Software,
    run: WholeRun | None = None,
) -> Memory:
    """Peak memory of the heaviest rank: of a step, or of the whole run where `run` is given (loading,
    evaluation and saving are known of DeepSpeed only).

    `figures` gives `memory.workspace_bytes` (matrix multiply's, allocated by torch),
    `memory.runtime_bytes` (context, libraries), `memory.runtime_bytes_per_group` (a communicator),
    `memory.fragmentation_fraction` of the allocated peak and `memory.expert_imbalance`.
    """
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    width = width_of(job.precision)
    ex = Execution(
        width=width, kernels=software.kernels, attention=job.attention,
        mask_bytes=software.mask_bytes or width, finetune=job.finetune,
        quant_saves_input=software.quant_saves_input,
    )  # fmt: skip
    held = held_weights(spec, job, c, loads, software)
    states = state_bytes(
        held,
        c,
        software=software, precision=job.precision, optimizer=optimizer_key(job), bucket=bucket,
    )  # fmt: skip
    activations = _activations(
        spec, job, c, loads, ex, software, figures["memory.expert_imbalance"]
    )
    logits = _logits(spec, job, c, loads, width, software)
    head_grad = held.trainable * width * float(spec.vocab * spec.hidden) / c.tp * loads.has_head
    work = figures["memory.workspace_bytes"]
    if held.frozen_bytes is not None:
        work = work + width * held.largest_tensor
    at_work = np.full(logits.shape, work)
    table = parameter_counts(spec).embedding - spec.vocab * spec.hidden * spec.tie_embeddings
    # ... of that block, all but the last projection's, whose gradient is made first
    down = spec.hidden * max(b.mlp.ffn * max(1, b.mlp.experts) for b in spec.blocks) / c.tp
    late = np.maximum(loads.has_embedding * table / c.tp + held.block - down, 0.0)
    late_grad = held.trainable * width * late
    phases = step_phases(c, states, activations, logits, head_grad, late_grad, at_work)
    if run is not None and software.family == "deepspeed":
        whole = float(parameter_counts(spec).total)
        phases += (
            loading(held, c, states, bucket, width, run),
            evaluation(spec, job, c, states, ex, loads.has_head, at_work),
            saving(held, c, states, whole, width, run),
        )
    return _peak(c, loads, phases, figures)


def _peak(
    c: Candidates,
    loads: StageLoads,
    phases: tuple[Alive, ...],
    figures: Mapping[str, float],
) -> Memory:
    """The largest phase on the heaviest position, with what torch does not count on top."""
    totals = np.stack([p.total for p in phases])
    totals = np.where(loads.exists, totals, 0.0)
    n = np.arange(len(c))
    flat = totals.max(axis=0)
    position = flat.argmax(axis=0)
    phase = totals[:, position, n].argmax(axis=0)
    allocated = totals[phase, position, n]

    world = c.dp * c.tp * c.pp * c.cp * c.sp
    groups = sum((n > 1).astype(float) for n in (world, c.dp, c.tp, c.pp, c.cp, c.sp, c.ep))
    runtime = figures["memory.runtime_bytes"] + groups * figures["memory.runtime_bytes_per_group"]
    waste = figures["memory.fragmentation_fraction"]

    def alive(name: str) -> Array:
        chosen = np.zeros(len(c))
        for k, one in enumerate(phases):
            part = getattr(one, name)
            if part is not None:
                chosen = np.where(phase == k, part[position, n], chosen)
        return chosen

    parts = {
        "parameters": alive("parameters"),
        "gradients": alive("gradients"),
        "optimizer_states": alive("optimizer_states"),
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
        least=allocated * (1 + figures["memory.fragmentation_least_fraction"]) + runtime,
        peak_phase=phase,
        peak_position=position,
        by_position=np.where(loads.exists, flat * overhead[0] + overhead[1], 0.0),
        by_phase=totals[:, position, n] * overhead[0] + overhead[1],
        each_phase=totals.max(axis=1) * overhead[0] + overhead[1],
    )

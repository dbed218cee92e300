"""Peak memory of a rank: the maximum over the phases of a step of what is alive in each.

Phases (`planner/estimate/phases.py`): `loss` (end of the forward pass, all saved activations and the
logits), `backward` (first block's backward, then the last, with the gradients complete), `step`
(optimizer); for a whole run also `load`, `eval` and `save`. A pipeline is looked at on its first,
heaviest middle and last stage; the peak is the largest of the three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from outlay.planner.estimate.activations import (
    Execution,
    SavedPerToken,
    block_saved,
    head_input_elements,
    logits_bytes_per_token,
)
from outlay.planner.estimate.buckets import largest_on_rank
from outlay.planner.estimate.candidates import LOSS, Array, Candidates
from outlay.planner.estimate.compression import with_states, with_working
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.peak import PARTS as PARTS
from outlay.planner.estimate.peak import POSITIONS as POSITIONS
from outlay.planner.estimate.peak import Memory as Memory
from outlay.planner.estimate.peak import Sides, peak_of, runtime_bytes
from outlay.planner.estimate.phases import (
    PHASES as PHASES,
)
from outlay.planner.estimate.phases import (
    Alive,
    WholeRun,
    Working,
    evaluation_states,
    evaluation_working,
    loading,
    saving,
    step_states,
    step_working,
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
from outlay.planner.estimate.tables import distinct
from outlay.planner.spec.job import Finetune, Job
from outlay.planner.spec.model import ModelSpec

_LAYOUT = (
    "zero", "dp", "tp", "pp", "cp", "sp", "ep", "offload_optimizer", "offload_param", "overlap_comm",
    "reduce_bucket_size",
)  # fmt: skip
"""With whether gradients accumulate, what the weights' side depends on."""
_BATCH = (
    "tp", "pp", "vpp", "cp", "sp", "micro_batch", "activation_checkpointing", "recompute_layers",
    "sequence_parallel", "loss",
)  # fmt: skip
"""With the number of micro-batches while a pipeline is not full, what the batch's side depends on."""


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


def _moves_checkpoints(software: Software) -> bool:
    """Whether that software moves checkpointed activations to the host at stage 3."""
    return software.family == "megatron" and software.gradient_bytes is None


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
    on_host = (c.zero == 3) & _moves_checkpoints(software)
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
                    # the pipeline's output buffers hold this and the last micro-batch's logits; the fused
                    # loss works in them, the chunked one is given hidden states
                    logits = float(width * spec.vocab) * (name != "chunked")
                    p, k = p + logits * (name == "plain") * (c.pp > 1), logits
                kept = np.where((c.pp > 1) & (c.grad_accum > 1), k, 0.0)
                peak = np.where(c.loss == i, p + kept, peak)
            else:
                peak = np.where(c.loss == i, p, peak)
    whole: Array = loads.has_head * peak * tokens / c.tp
    if software.family == "deepspeed" and job.finetune is None:
        # made on the way, before the backward pass takes it (runner/loss.py)
        head_gradient = width * float(spec.vocab) * spec.hidden
        whole = whole + loads.has_head * head_gradient * (c.loss == LOSS.index("chunked"))
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
        largest_tensor=largest_on_rank(spec, c).astype(float),
        trainable=trainable,
        frozen_bytes=frozen,
    )


def adapter_parameters(spec: ModelSpec, finetune: Finetune) -> float:
    """Trained weights: LoRA's two factors on q and v of every block (arXiv 2106.09685), with DoRA a norm of
    each output beside them (arXiv 2402.09353), or at most as many for the prefixes and scales of the others."""
    total = 0
    for block in spec.blocks:
        a = block.attention
        total += block.count * finetune.rank * (2 * spec.hidden + a.q_width + a.v_width)
        if finetune.method == "dora":
            total += block.count * (a.q_width + a.v_width + (a.k_width if a.fused_qkv else 0))
    return float(total)


def execution_of(job: Job, software: Software) -> Execution:
    """How the blocks run under that software."""
    width = width_of(job.precision)
    return Execution(
        width=width, kernels=software.kernels, attention=job.attention,
        mask_bytes=software.mask_bytes or width, finetune=job.finetune, peft=software.family == "deepspeed",
        quant_saves_input=software.quant_saves_input,
    )  # fmt: skip


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
    if software.family != "deepspeed":
        run = None
    accumulates = (c.grad_accum > 1).astype(np.int64)
    first, layout = distinct(c, _LAYOUT, accumulates)
    one = c.take(first)
    # 1F1B warms up at most 3·pp micro-batches' worth (`in_flight`): more of them change nothing.
    few = np.minimum(c.grad_accum, 3 * c.pp)
    more = (few, (c.zero == 3).astype(np.int64)) if _moves_checkpoints(software) else (few,)
    example, batch = distinct(c, _BATCH, *more)
    sides = Sides(
        states=_states_side(spec, job, one, bucket[first], figures, software, run),
        working=_batch_side(spec, job, c.take(example), figures, software, run),
        exists=stage_loads(spec, job.seq_len, one.pp, uniform=software.uniform_stages).exists,
        runtime=runtime_bytes(one, figures),
        fragmentation=figures["memory.fragmentation_fraction"],
        least_fragmentation=figures["memory.fragmentation_least_fraction"],
    )
    if len(sides.working) < len(sides.states):
        filler = (None,) * (len(sides.states) - len(sides.working))
        sides = dataclasses.replace(sides, working=sides.working + filler)
    return peak_of(sides, layout, batch)


def _states_side(
    spec: ModelSpec, job: Job, c: Candidates, bucket: Array, figures: Mapping[str, float],
    software: Software, run: WholeRun | None,
) -> tuple[Alive, ...]:  # fmt: skip
    """What the weights' side has alive in each phase, for each layout."""
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    width = width_of(job.precision)
    held = held_weights(spec, job, c, loads, software)
    states = state_bytes(
        held, c, software=software, precision=job.precision, optimizer=optimizer_key(job), bucket=bucket
    )  # fmt: skip
    head_grad = held.trainable * width * float(spec.vocab * spec.hidden) / c.tp * loads.has_head
    work: Array | float = figures["memory.workspace_bytes"]
    if held.frozen_bytes is not None:
        work = work + width * held.largest_tensor
    at_work = np.full((3, len(c)), work)
    table = parameter_counts(spec).embedding - spec.vocab * spec.hidden * spec.tie_embeddings
    # ... of that block, all but the last projection's, whose gradient is made first
    down = spec.hidden * max(b.mlp.ffn * max(1, b.mlp.experts) for b in spec.blocks) / c.tp
    late = np.maximum(loads.has_embedding * table / c.tp + held.block - down, 0.0)
    phases = step_states(c, states, head_grad, held.trainable * width * late, at_work)
    if run is not None:
        phases = (
            *phases,
            loading(held, c, states, bucket, width, run),
            evaluation_states(states, at_work),
            saving(held, c, states, float(parameter_counts(spec).total), width, run),
        )
    load = PHASES.index("load") if run is not None else -1
    return with_states(phases, spec, job, c, held.dense + held.experts, width, load)


def _batch_side(
    spec: ModelSpec, job: Job, c: Candidates, figures: Mapping[str, float], software: Software,
    run: WholeRun | None,
) -> tuple[Working | None, ...]:  # fmt: skip
    """What the batch's side has alive in each phase, for each micro-batch."""
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    ex = execution_of(job, software)
    imbalance = figures["memory.expert_imbalance"]
    activations = _activations(spec, job, c, loads, ex, software, imbalance)
    logits = _logits(spec, job, c, loads, ex.width, software)
    phases = with_working(step_working(activations, logits), spec, job, c, ex)
    if run is None:
        return phases
    return (*phases, None, evaluation_working(spec, job, c, ex, loads.has_head), None)

"""One micro-batch through a rank's stage: compute, and the collectives inside the passes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.communication import Figures, all_to_all_s, collective_s, transfer_s
from outlay.planner.estimate.operators import BlockTime, Speed, block_s, head_s, width_of
from outlay.planner.estimate.pipeline import slowest_stage, waits_s
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.stages import StageLoads, stage_loads
from outlay.planner.estimate.tables import distinct, gather
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import Block, ModelSpec

_BLOCK_SHAPE = ("tp", "cp", "sp", "ep", "micro_batch", "sequence_parallel")
"""What the operators and the inner collectives of a block depend on."""
TENSORS_PER_BLOCK = 9
"""Parameters (tensors) of a gated block: what DeepSpeed's per-parameter hooks run on."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Seconds of the slowest stage [n]."""

    forward: Array
    backward: Array
    recompute: Array
    tensor_parallel: Array
    sequence_parallel: Array
    expert_parallel: Array
    forward_pass: Array
    """The whole forward pass, collectives in it included."""
    backward_pass: Array
    """Backward with what it recomputes and sends."""
    per_stage: Array
    """[3, n]: first, middle and last stage."""
    waits: Array
    """[3, n]: what each would wait in a step if it set the pace."""


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """Collectives of one block: seconds of one forward pass; backward sends as much."""

    wait: Array
    """For the slowest rank of a tensor-parallel group at each of its collectives, whatever their size."""

    tensor: Array
    sequence: Array
    expert: Array


def hook_s(c: Candidates, figures: Figures) -> Array:
    """DeepSpeed's Python on the parameters of one block, a micro-batch (stage 3: on its modules)."""
    partitioned = np.where(
        (c.zero == 1) | (c.zero == 2), figures["deepspeed.parameter_hook_s"], 0.0
    )
    module = np.where(c.zero == 3, figures["deepspeed.stage3_parameter_s"], 0.0)
    return np.asarray(TENSORS_PER_BLOCK * (partitioned + module))


def _sent(
    spec: ModelSpec,
    block: Block,
    job: Job,
    c: Candidates,
    cluster: Cluster,
    core: Array,
    figures: Figures,
    software: Software,
) -> _Sent:
    """tp: an all-reduce after attention and one after the MLP (Megatron, arXiv 1909.08053); under
    sequence parallelism a reduce-scatter and an all-gather of the same volume. sp (Ulysses): q, k, v
    and the output change places. cp (ring): k and v go round while attention computes. ep: tokens go
    to their experts and back."""
    width, h, a = width_of(job.precision), spec.hidden, block.attention
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    message = width * tokens * h
    tensor, wait = np.zeros(len(c)), np.zeros(len(c))
    if (c.tp > 1).any():
        wait = 2.0 * figures["communication.wait_s"] * np.log2(c.tp)
        tensor = 2.0 * collective_s(
            "all_reduce", message, c.tp, np.ones_like(c.tp), cluster, figures
        )
        if software.tensor_overlap:
            tensor = tensor * (1.0 - figures["communication.tensor_overlap_fraction"])
    sequence = np.zeros(len(c))
    if (c.sp > 1).any():
        heads = width * tokens * (a.q_width + a.out_width + a.k_width + a.v_width) / c.tp
        sequence = all_to_all_s(heads, c.sp, c.tp, cluster, figures)
    if (c.cp > 1).any():
        ring = width * tokens * (a.k_width + a.v_width) / c.tp
        beyond = c.tp * c.cp > cluster.ranks_per_node
        hop = transfer_s(ring, cluster, beyond, figures)
        sequence = sequence + np.where(c.cp > 1, np.maximum((c.cp - 1) * hop - core, 0.0), 0.0)
    expert = np.zeros(len(c))
    if block.mlp.experts and (c.ep > 1).any():
        routed = (
            message
            * block.mlp.top_k
            * figures["moe.imbalance"]
            / np.where(c.sequence_parallel > 0, c.tp, 1)
        )
        # Experts may spread over the tensor-parallel ranks too (Megatron's parallel folding).
        stride = np.clip(c.dp * c.tp * c.cp // c.ep, 1, c.tp)
        one = all_to_all_s(routed, c.ep, stride, cluster, figures, copies=block.mlp.top_k)
        expert = 2.0 * one * figures["moe.dispatch_factor"]
    return _Sent(wait=wait, tensor=tensor, sequence=sequence, expert=expert)


def _again(
    c: Candidates, t: BlockTime, sent: _Sent, count: Array, policy: str
) -> tuple[Array, Array, Array]:
    """(compute, sent, blocks) that recomputation of `count` blocks [3, n] adds.

    Full: the forward pass again. Selective: Megatron's attention core, or torch's per-operator
    policy, which keeps attention and every second matrix multiply.
    """
    full, selective = c.activation_checkpointing == 2, c.activation_checkpointing == 1
    part = t.selective if policy == "per_op" else t.core
    chosen = np.where(
        c.recompute_layers >= 0, np.minimum(count, np.ceil(c.recompute_layers / c.pp)), count
    )
    blocks = np.where(full, chosen, 0.0)
    compute = blocks * t.recompute + np.where(selective, count, 0.0) * part
    return compute, blocks * (sent.tensor + sent.sequence + sent.expert), blocks


def accumulate_s(
    job: Job, c: Candidates, loads: StageLoads, speed: Speed, figures: Figures, software: Software
) -> Array:
    """Adding one micro-batch's gradients to those before it, each stage [3, n]: the new gradient is
    read, the sum read and written. Where nothing is added, or a shard only (stage 3), nothing.

    Megatron adds in fp32 where the precision is bf16 (megatron/arguments.py requires it).
    """
    width = width_of(job.precision)
    total = 4 if software.accumulates_fp32 and job.precision != "fp16" else width
    weights = loads.dense_parameters / c.tp + loads.expert_parameters / (c.tp * c.ep)
    share = np.where((c.grad_accum > 1) & (c.zero < 3), 1.0, 0.0)
    moved = share * (width + 2.0 * total) * figures["compute.accumulate_factor"]
    return np.asarray(weights * moved / speed.memory_bytes_per_s)


def _targets(spec: ModelSpec, job: Job) -> Job:
    """The job as the decoder of an encoder-decoder sees it: its sequences are the targets."""
    if not spec.encoder_decoder or job.target_len is None:
        return job
    return dataclasses.replace(job, seq_len=job.target_len)


def _longest(kernels: Array, host: Array, software: Software) -> Array:
    """A pass of a stage: the slower of its kernels and of starting them, or both where one core does both."""
    return np.maximum(kernels, host) if software.start_hidden else kernels + host


@dataclass(kw_only=True)
class _Sums:
    """Over the blocks of each stage, arrays [3, n]: kernels, their start on the host, collectives."""

    forward: Array
    backward: Array
    recompute: Array
    host_forward: Array
    host_backward: Array
    host_recompute: Array
    tensor: Array
    sequence: Array
    expert: Array
    sent_again: Array
    """What recomputation sends once more."""
    wait: Array
    wait_again: Array
    drained: Array
    """Megatron's tracker copies random states between host and device for each checkpointed block,
    which drains the queue of kernels: nothing hides that. torch's own checkpointing costs the host."""

    @property
    def sent(self) -> Array:
        return self.tensor + self.sequence + self.expert


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What one block, or the head, takes of a micro-batch of some shape, wherever it lies."""

    blocks: tuple[tuple[BlockTime, _Sent], ...]
    """By group of blocks."""
    head: tuple[Array, Array]
    """(forward, backward)."""


def _shape(
    spec: ModelSpec, job: Job, c: Candidates, cluster: Cluster, speed: Speed, figures: Figures,
    software: Software, *, tabled: bool,
) -> _Shape:  # fmt: skip
    """Computed once for each distinct shape where `tabled`, then spread over the candidates."""
    if tabled:
        names = (*_BLOCK_SHAPE, "dp") if any(b.mlp.experts for b in spec.blocks) else _BLOCK_SHAPE
        first, which = distinct(c, names)
        few = _shape(spec, job, c.take(first), cluster, speed, figures, software, tabled=False)
        return _Shape(
            blocks=tuple((gather(t, which), gather(sent, which)) for t, sent in few.blocks),
            head=(few.head[0][which], few.head[1][which]),
        )
    targets, blocks = _targets(spec, job), []
    for block in spec.blocks:
        mine = targets if block.stack == "decoder" else job
        t = block_s(spec, block, mine, c, speed, figures, software)
        blocks.append((t, _sent(spec, block, mine, c, cluster, t.core, figures, software)))
    masked = 1.0 if spec.blocks[-1].attention.causal else software.masked_head
    return _Shape(blocks=tuple(blocks), head=head_s(spec, targets, c, speed, figures, masked))


def _sums(
    spec: ModelSpec, job: Job, c: Candidates, cluster: Cluster, speed: Speed, figures: Figures,
    software: Software, loads: StageLoads, *, tabled: bool,
) -> _Sums:  # fmt: skip
    s = _Sums(**{f.name: np.zeros((3, len(c))) for f in dataclasses.fields(_Sums)})
    hooks = hook_s(c, figures) if software.family == "deepspeed" and software.start_hidden else 0.0
    shape = _shape(spec, job, c, cluster, speed, figures, software, tabled=tabled)
    for g, (t, sent) in enumerate(shape.blocks):
        count = loads.block_counts[:, g]
        again, collectives, blocks = _again(c, t, sent, count, software.selective)
        s.forward += count * t.forward
        s.backward += count * t.backward
        s.recompute += again
        s.host_forward += count * (t.host_forward + hooks / 2.0)
        s.host_backward += count * (t.host_backward + hooks / 2.0)
        s.host_recompute += blocks * t.host_forward
        s.tensor += count * sent.tensor
        s.sequence += count * sent.sequence
        s.expert += count * sent.expert
        s.sent_again += collectives
        s.wait += count * sent.wait
        s.wait_again += blocks * sent.wait
        if software.family == "megatron":
            s.drained += blocks * figures["compute.checkpoint_megatron_s"]
        else:
            s.host_recompute += blocks * figures["compute.checkpoint_start_s"]
    s.forward += loads.has_head * shape.head[0]
    s.backward += loads.has_head * shape.head[1] + accumulate_s(
        job, c, loads, speed, figures, software
    )
    return s


def micro_batch_s(
    spec: ModelSpec, job: Job, c: Candidates, cluster: Cluster, speed: Speed, figures: Figures,
    software: Software, *, tabled: bool = True,
) -> MicroBatch:  # fmt: skip
    """Every part of one micro-batch on the slowest stage, and what each stage would wait. `tabled`
    False: figures may be arrays [n] too."""
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    s = _sums(spec, job, c, cluster, speed, figures, software, loads, tabled=tabled)
    inside, both = s.sent, s.backward + s.recompute
    pass_f = _longest(s.forward + inside, s.host_forward, software)
    pass_b = _longest(both + inside + s.sent_again, s.host_backward + s.host_recompute, software)
    again = _longest(s.recompute + s.sent_again, s.host_recompute, software) - s.sent_again
    again = np.minimum(np.where(s.recompute > 0, again, 0.0), pass_b - inside - s.sent_again)
    whole_f = (pass_f + s.wait) * loads.exists
    whole_b = (pass_b + s.drained + s.wait + s.wait_again) * loads.exists
    slowest, n = slowest_stage(whole_f + whole_b), np.arange(len(c))
    repeated = np.where(inside > 0, 2.0 + s.sent_again / np.where(inside > 0, inside, 1.0), 0.0)

    def at(values: Array) -> Array:
        return np.asarray(values[slowest, n])

    return MicroBatch(
        forward=at(pass_f - inside),
        backward=at(pass_b - inside - s.sent_again - again),
        recompute=at(again + s.drained),
        tensor_parallel=at(s.tensor * repeated + 2.0 * s.wait + s.wait_again),
        sequence_parallel=at(s.sequence * repeated),
        expert_parallel=at(s.expert * repeated),
        forward_pass=at(whole_f),
        backward_pass=at(whole_b),
        per_stage=whole_f + whole_b,
        waits=waits_s(whole_f, whole_b, c.pp, c.vpp, c.grad_accum),
    )

"""Seconds of one optimizer step, by parts that sum to it.

forward, backward and recompute from each block's operators; tensor, sequence and expert parallelism
from their collectives; data parallelism from what compute does not hide; the pipeline from 1F1B; the
optimizer from bytes. What depends on the shape of a micro-batch alone is computed once for each
distinct shape.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from outlay.planner.estimate.candidates import OFFLOAD, Array, Candidates
from outlay.planner.estimate.communication import Figures, transfer_s
from outlay.planner.estimate.compression import extra_s
from outlay.planner.estimate.data_parallel import Traffic, exposed_s, traffic
from outlay.planner.estimate.memory import adapter_parameters
from outlay.planner.estimate.micro_batch import TENSORS_PER_BLOCK, MicroBatch, hook_s, micro_batch_s
from outlay.planner.estimate.operators import Speed, speed_of, width_of
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.pipeline import bubble_s, two_way_bubble_s, zero_bubble_s
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.stages import StageLoads, stage_loads
from outlay.planner.estimate.states import MOMENTS
from outlay.planner.estimate.tables import distinct, gather
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec

__all__ = ["PARTS", "Speed", "Step", "estimate_step", "speed_of"]

PARTS = (
    "forward",
    "backward",
    "recompute",
    "optimizer",
    "tensor_parallel",
    "data_parallel_exposed",
    "pipeline_bubble",
    "pipeline_transfer",
    "sequence_parallel",
    "expert_parallel",
    "offload",
    "overhead",
)

NVME = OFFLOAD.index("nvme")
_CHUNK = 1 << 14
"""Candidates a pass: the arrays of one pass stay in the cache."""
_LAYOUT = ("tp", "pp", "cp", "sp", "ep", "dp", "zero")
_SHAPE = (
    "tp", "pp", "vpp", "cp", "sp", "ep", "micro_batch", "activation_checkpointing", "recompute_layers",
    "sequence_parallel",
)  # fmt: skip
"""What a micro-batch depends on, with dp where experts spread over it, and with ZeRO's kind."""
_SHARDS = ("reduce_bucket_size", "overlap_comm", "offload_optimizer", "offload_param")
"""With the layout, what the weights' part of a step depends on."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """n candidates; `parts` are worked out when they are asked for (a search reads the time alone)."""

    time_s: Array
    rows: Array
    """Which candidates of `whole` these are."""
    whole: _Whole
    factor: float = 1.0

    @cached_property
    def parts(self) -> dict[str, Array]:
        """Seconds [n] by PARTS; they sum to `time_s`."""
        return {k: v * self.factor for k, v in self.whole.parts(self.rows).items()}

    def take(self, index: Array) -> Step:
        """Of the candidates that a mask or an index array selects."""
        return dataclasses.replace(self, time_s=self.time_s[index], rows=self.rows[index])

    def scaled(self, factor: float) -> Step:
        """Every part times the same."""
        return dataclasses.replace(self, time_s=self.time_s * factor, factor=self.factor * factor)


@dataclass(frozen=True, kw_only=True)
class _Shards:
    """What depends on how weights are spread, a step."""

    traffic: Traffic
    optimizer: Array
    offload_step: Array
    offload_micro: Array


def _optimizer_s(
    job: Job, c: Candidates, loads: StageLoads, speed: Speed, figures: Figures, software: Software
) -> Array:
    """Bytes of weights, gradients and moments read and written, by the rank's share. Clipping reads the
    gradients for their norm; where the step is torch's own it scales them in another pass."""
    parameters, share = _rank_parameters(c, loads)
    moments = MOMENTS["adamw" if job.optimizer.name.startswith("adam") else "sgd"] / 4
    passes = figures["optimizer.passes"] * (1 + moments) / 3
    clip = (3.0 if software.step_in_torch else 1.0) if job.gradient_clipping > 0 else 0.0
    update = 4.0 * share * (passes + clip)
    # Stages 1 and 2 copy whole gradients into buckets and whole weights out of them, stage 3 its share.
    held = np.where(c.zero == 3, share, parameters)
    copies = 4.0 * np.where(c.zero >= 1, 2 * held + 2 * share, 0.0)
    on_device = np.where(c.offload_optimizer > 0, 0.0, update)
    return np.asarray((on_device + copies) / speed.memory_bytes_per_s)


def _rank_parameters(c: Candidates, loads: StageLoads) -> tuple[Array, Array]:
    """(weights of the fullest model-parallel rank, what of them one data-parallel rank steps)."""
    parameters = (loads.dense_parameters / c.tp + loads.expert_parameters / (c.tp * c.ep)).max(
        axis=0
    )
    return parameters, parameters / np.where(c.zero >= 1, c.dp * c.cp * c.sp, 1)


def _offload_s(
    job: Job, c: Candidates, loads: StageLoads, cluster: Cluster, figures: Figures
) -> tuple[Array, Array]:
    """(a step, a micro-batch): gradients down and weights up the host link, Adam on the host.

    Offloaded weights come up before forward and before backward (ZeRO-Infinity, arXiv 2104.07857,
    section 5). From NVMe, the optimizer's fp32 weight and moments are read and written once a step and
    16-bit weights read with them; the drives belong to the node, and reads and writes do not overlap.
    """
    away = (c.offload_optimizer > 0) | (c.offload_param > 0)
    if not away.any():
        return np.zeros(len(c)), np.zeros(len(c))
    link = cluster.accelerator.pcie_bytes_per_s or cluster.intra.bytes_per_s
    rate = link * figures["offload.link_fraction"]
    _, share = _rank_parameters(c, loads)
    width = width_of(job.precision)
    adam = share * cluster.ranks_per_node / figures["offload.adam_parameters_per_s"]
    step = np.where(c.offload_optimizer > 0, 2.0 * width * share / rate + adam, 0.0)
    micro = np.where(c.offload_param > 0, 2.0 * width * share / rate, 0.0)
    read, write = (
        figures["offload.nvme_read_bytes_per_s"],
        figures["offload.nvme_write_bytes_per_s"],
    )
    node = share * cluster.ranks_per_node
    states = 4.0 * (1.0 + MOMENTS["adamw" if job.optimizer.name.startswith("adam") else "sgd"] / 4)
    step = step + np.where(c.offload_optimizer == NVME, states * node * (1 / read + 1 / write), 0.0)
    step = step + np.where(c.offload_param == NVME, width * node / write, 0.0)
    return step, micro + np.where(c.offload_param == NVME, 2.0 * width * node / read, 0.0)


def trained_share(spec: ModelSpec, job: Job) -> float:
    """Share of the weights that has gradients: what is reduced and stepped."""
    if job.finetune is None:
        return 1.0
    return min(1.0, adapter_parameters(spec, job.finetune) / parameter_counts(spec).total)


def _shards(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    bucket: Array,
    cluster: Cluster,
    speed: Speed,
    figures: Figures,
    software: Software,
) -> _Shards:
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    step, micro = _offload_s(job, c, loads, cluster, figures)
    trained = trained_share(spec, job)
    return _Shards(
        traffic=traffic(job, c, loads, bucket, cluster, figures, software, trained),
        optimizer=trained * _optimizer_s(job, c, loads, speed, figures, software),
        offload_step=trained * step,
        offload_micro=micro,
    )


def _transfer_s(
    spec: ModelSpec, job: Job, c: Candidates, cluster: Cluster, figures: Figures, software: Software
) -> Array:
    """Activations and their gradients from stage to stage, both ways, a micro-batch.

    Megatron sends 1/tp of the message from each tensor-parallel rank and gathers it behind the
    network (arXiv 2104.04473, section 4.1) and, before its exchanges ran beside compute, waits for the
    device after each (megatron/p2p_communication.py); others send all of it from each.
    """
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    size = width_of(job.precision) * tokens * spec.hidden
    if software.family == "megatron":
        size = size / c.tp
    reach = c.tp * c.cp * c.sp * c.dp
    across = (reach >= cluster.ranks_per_node) & (cluster.nodes > 1)
    one = transfer_s(size, cluster, across, figures)
    if software.family == "megatron" and not software.overlap:
        one = one + figures["communication.transfer_sync_s"]
    return np.where(c.pp > 1, 2.0 * c.vpp * one, 0.0)


def _overhead_s(
    spec: ModelSpec, c: Candidates, figures: Figures, software: Software
) -> tuple[Array, Array]:
    """(a step, a micro-batch) of the trainer's own work; DeepSpeed's per parameter where not hidden."""
    if software.family != "deepspeed":
        return np.full(len(c), figures["trainer.step_s"]), np.full(
            len(c), figures["trainer.micro_step_s"]
        )
    micro = figures["deepspeed.micro_step_s"] + np.where(
        c.pp > 1, figures["deepspeed.pipeline_instruction_s"], 0.0
    )
    if not software.start_hidden:
        micro = micro + hook_s(c, figures) * (spec.layers / c.pp + 3.0 / TENSORS_PER_BLOCK)
    return np.full(len(c), figures["deepspeed.step_s"]), micro


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """All candidates of one estimate: the tables of their micro-batches and of their shards."""

    spec: ModelSpec
    job: Job
    c: Candidates
    cluster: Cluster
    micro: MicroBatch
    shards: _Shards
    of_micro: Array | None
    """Row of each candidate in `micro`; null = its own."""
    of_shards: Array | None
    figures: Figures
    software: Software
    memory_bytes_per_s: float | Array

    def parts(self, rows: Array | slice) -> dict[str, Array]:
        """Seconds of these candidates by PARTS."""
        m, s = self.micro, self.shards
        if self.of_micro is not None and self.of_shards is not None:
            m, s = gather(m, self.of_micro[rows]), gather(s, self.of_shards[rows])
        elif not isinstance(rows, slice):
            m, s = gather(m, rows), gather(s, rows)
        c = self.c.take(rows)
        parts = _parts(self.spec, self.job, c, self.cluster, m, s, self.figures, self.software)
        extra = extra_s(
            self.spec, self.job, c, m.forward, self.memory_bytes_per_s, self.figures,
            start_hidden=self.software.start_hidden,
        )  # fmt: skip
        if extra is not None:
            parts["forward"] = parts["forward"] + c.grad_accum * extra.forward
            parts["backward"] = parts["backward"] + c.grad_accum * extra.backward
            parts["optimizer"] = parts["optimizer"] + extra.step
        # The slowest of many ranks sets the pace; the spread grows with how many there are.
        late = self.figures["communication.straggler_per_doubling"] * np.log2(
            np.maximum(c.dp * c.tp * c.pp * c.cp * c.sp, 1)
        )
        parts["overhead"] = parts["overhead"] + late * functools.reduce(np.add, parts.values())
        return parts

    def step(self) -> Step:
        """Of all of them, piece by piece."""
        n = len(self.c)
        if self.of_micro is None:
            return self._timed(functools.reduce(np.add, self.parts(slice(0, n)).values()))
        time_s = np.empty(n)
        for start in range(0, n, _CHUNK):
            piece = slice(start, min(start + _CHUNK, n))
            time_s[piece] = functools.reduce(np.add, self.parts(piece).values())
        return self._timed(time_s)

    def _timed(self, time_s: Array) -> Step:
        return Step(time_s=time_s, rows=np.arange(len(self.c)), whole=self)


def _bubble_s(c: Candidates, m: MicroBatch, software: Software) -> Array:
    """By the schedule of the software. Of a backward pass cut in two, half of its compute is taken for
    the gradients of the weights: of a linear layer they are as many FLOPs as those of its input."""
    if software.two_way:
        return two_way_bubble_s(m.forward, m.backward + m.recompute, c.pp)
    if software.zero_bubble:
        weights = m.backward / 2.0
        inputs = m.backward_pass - weights
        return zero_bubble_s(m.forward_pass, inputs, weights, c.pp, c.grad_accum)
    return bubble_s(m.per_stage, m.waits, c.grad_accum.astype(float))


def _parts(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    cluster: Cluster,
    m: MicroBatch,
    s: _Shards,
    figures: Figures,
    software: Software,
) -> dict[str, Array]:
    """Parts of a step from those of a micro-batch and of the weights."""
    micro = c.grad_accum.astype(float)
    t = s.traffic
    each = exposed_s(t.forward, m.forward_pass, t.overlap, figures)
    each = each + exposed_s(t.backward, m.backward_pass, t.overlap, figures)
    once = exposed_s(t.last, m.backward_pass, t.overlap, figures) + t.after
    transfer = _transfer_s(spec, job, c, cluster, figures, software)
    step_overhead, micro_overhead = _overhead_s(spec, c, figures, software)
    return {
        "forward": micro * m.forward,
        "backward": micro * m.backward,
        "recompute": micro * m.recompute,
        "optimizer": s.optimizer,
        "tensor_parallel": micro * m.tensor_parallel,
        "data_parallel_exposed": micro * each + once,
        "pipeline_bubble": _bubble_s(c, m, software),
        "pipeline_transfer": (micro * figures["communication.transfer_exposed"] + c.pp - 1.0)
        * transfer,
        "sequence_parallel": micro * m.sequence_parallel,
        "expert_parallel": micro
        * np.maximum(m.expert_parallel - software.two_way * (m.forward + m.backward), 0.0),
        "offload": s.offload_step + micro * s.offload_micro,
        "overhead": step_overhead + micro * micro_overhead,
    }


def estimate_step(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    cluster: Cluster,
    speed: Speed,
    *,
    bucket: Array,
    figures: Figures,
    software: Software,
    tabled: bool = True,
) -> Step:
    """Seconds of a step for each candidate. `tabled` False: figures may be arrays [n] too."""
    of_micro = of_shards = None
    if tabled:
        # A pipeline's bubble depends on the number of micro-batches only while they are fewer than stages,
        # that of an interleaved one while they are fewer than twice as many.
        few = np.minimum(c.grad_accum, np.maximum(c.pp * np.minimum(c.vpp, 2), 2))
        kind = (c.zero + 1) // 2  # hooks and accumulation: none, stages 1 and 2, stage 3
        names = (*_SHAPE, "dp") if any(b.mlp.experts for b in spec.blocks) else _SHAPE
        shape, of_micro = distinct(c, names, kind, few)
        m = micro_batch_s(spec, job, c.take(shape), cluster, speed, figures, software)
        spread, of_shards = distinct(c, (*_LAYOUT, *_SHARDS))
        s = _shards(spec, job, c.take(spread), bucket[spread], cluster, speed, figures, software)
    else:
        m = micro_batch_s(spec, job, c, cluster, speed, figures, software, tabled=False)
        s = _shards(spec, job, c, bucket, cluster, speed, figures, software)
    whole = _Whole(
        spec=spec, job=job, c=c, cluster=cluster, micro=m, shards=s, of_micro=of_micro,
        of_shards=of_shards, figures=figures, software=software,
        memory_bytes_per_s=speed.memory_bytes_per_s,
    )  # fmt: skip
    return whole.step()

"""Seconds of one optimizer step, by parts that sum to it.

forward, backward and recompute from matrix multiplies, attention, memory-bound operators and the
overhead of starting each; the optimizer from bytes; collectives by ZeRO stage; the pipeline's
bubble from 1F1B: (pp − 1)/(M + pp − 1) of the slowest stage's time (Narayanan et al. 2021,
arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.communication import collective_s, transfer_s
from outlay.planner.estimate.compute import attention_flops_per_token, block_gemms
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.stages import StageLoads, stage_loads
from outlay.planner.estimate.states import MOMENTS
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import Block, ModelSpec

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

OPERATORS_PER_BLOCK = 60
"""Operators that transformers' eager decoder block starts in one forward pass: two norms of six,
rotary embedding about 14, projections and their reshapes 20, MLP 5, residuals 2 (counted with
torch.profiler on a Llama block; kernels of fused implementations are fewer)."""
TENSORS_PER_BLOCK = 9
"""Parameters (tensors) of a gated block: what DeepSpeed's per-parameter hooks run on."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one rank of this cluster sustains; from measurement where there is one."""

    gemm_flops: float
    memory_bytes_per_s: float
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """Arrays of n candidates, seconds."""

    parts: dict[str, Array]
    time_s: Array


def speed_of(cluster: Cluster, precision: str, figures: Mapping[str, float]) -> Speed | None:
    """Rates of one rank; None where neither a measurement nor a datasheet gives them."""
    rates, accelerator = cluster.rates, cluster.accelerator
    if rates is not None and precision in rates.gemm_flops:
        return Speed(
            gemm_flops=rates.gemm_flops[precision],
            memory_bytes_per_s=rates.memory_bytes_per_s,
            measured=True,
        )
    peak = accelerator.flops.get(precision)
    if peak is None or accelerator.memory_bytes_per_s is None:
        return None
    return Speed(
        gemm_flops=peak * figures["compute.gemm_fraction"],
        memory_bytes_per_s=accelerator.memory_bytes_per_s * figures["compute.memory_fraction"],
        measured=False,
    )


def gemm_s(tokens: Array, k: Array, n: Array, speed: Speed, width: int, figures: Mapping[str, float]) -> Array:
    """One product of [tokens, k]·[k, n]: the slower of arithmetic and memory, with a start.

    The rate falls for few tokens as tokens/(tokens + half): `compute.gemm_half_tokens` is where
    half of the sustained rate is reached.
    """
    half = figures["compute.gemm_half_tokens"]
    arithmetic = 2.0 * (tokens + half) * k * n / speed.gemm_flops
    traffic = width * (tokens * k + k * n + tokens * n) / speed.memory_bytes_per_s
    return np.maximum(arithmetic, traffic)


def elementwise_bytes_per_token(spec: ModelSpec, block: Block, width: int, kernels: str) -> float:
    """Memory traffic of norms, rotary embedding, activation and residuals of one block, forward.

    hf: RMSNorm reads and writes 7 h-wide tensors, twice; rotary 9 of q and k; residuals 6 h; SwiGLU
    5 ffn. fused: norms 2 h each, rotary 2, residuals with the norm 4 h, SwiGLU 3 ffn.
    """
    a, mlp, h = block.attention, block.mlp, spec.hidden
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    ffn = mlp.ffn * mlp.top_k + mlp.shared_ffn if mlp.experts else mlp.ffn
    if kernels == "hf":
        return width * (22.0 * h + 9.0 * (q + kv) + (5.0 if mlp.gated else 4.0) * ffn)
    return width * (8.0 * h + 2.0 * (q + kv) + 3.0 * ffn)


def block_forward_s(
    spec: ModelSpec, block: Block, job: Job, c: Candidates, speed: Speed, figures: Mapping[str, float], kernels: str
) -> tuple[Array, Array]:
    """(matrix and attention seconds, memory-bound and start seconds) of one block and micro-batch."""
    width = 4 if job.precision in ("fp32", "tf32") else 2
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    heavy = np.zeros(len(c))
    for g in block_gemms(spec, block):
        k = g.k / np.where(g.shard == "k", c.tp, 1)
        n = g.n / np.where(g.shard == "n", c.tp, 1)
        heavy = heavy + gemm_s(tokens * g.visits, k, n, speed, width, figures)
    causal = job.attention != "eager"
    flops = attention_flops_per_token(block, job.seq_len, causal=causal) * tokens / c.tp
    heavy = heavy + flops / (speed.gemm_flops * figures["compute.attention_fraction"])
    traffic = elementwise_bytes_per_token(spec, block, width, kernels) * tokens
    light = traffic / speed.memory_bytes_per_s * figures["compute.elementwise_factor"]
    return heavy, light + OPERATORS_PER_BLOCK * figures["compute.operator_start_s"]


def head_s(spec: ModelSpec, job: Job, c: Candidates, speed: Speed, figures: Mapping[str, float]) -> tuple[Array, Array]:
    """(forward, backward) seconds of final projection and loss for one micro-batch.

    The loss touches vocabulary-wide fp32 values 3 times forward and 6 times backward.
    """
    if not spec.has_head:
        return np.zeros(len(c)), np.zeros(len(c))
    width = 4 if job.precision in ("fp32", "tf32") else 2
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    product = gemm_s(tokens, np.asarray(spec.hidden), spec.vocab / c.tp, speed, width, figures)
    value = 4.0 * spec.vocab / c.tp * tokens / speed.memory_bytes_per_s
    value = value * figures["compute.elementwise_factor"]
    return product + 3 * value, 2 * product + 6 * value


def _optimizer_s(
    spec: ModelSpec, job: Job, c: Candidates, loads: StageLoads, speed: Speed, figures: Mapping[str, float]
) -> Array:
    """Bytes of weights, gradients and moments read and written, by the rank's share."""
    parameters = (loads.dense_parameters / c.tp + loads.expert_parameters / (c.tp * c.ep)).max(axis=0)
    share = parameters / np.where(c.zero >= 1, c.dp, 1)
    moments = MOMENTS["adamw" if job.optimizer.name.startswith("adam") else "sgd"] / 4
    passes = figures["optimizer.passes"] * (1 + moments) / 3
    clip = 3.0 if job.gradient_clipping > 0 else 0.0
    traffic = 4.0 * share * (passes + clip)
    copies = 4.0 * np.where(c.zero >= 1, 2 * parameters + 2 * share, 0.0)
    return (traffic + copies) / speed.memory_bytes_per_s


def _data_parallel_s(
    spec: ModelSpec, job: Job, c: Candidates, loads: StageLoads, bucket: Array, cluster: Cluster, figures: Mapping[str, float]
) -> Array:
    """Collectives that nothing hides, a step.

    Stages 0 and 1 reduce once, stage 2 every micro-batch; stages 1 and 2 gather the weights after
    the step; stage 3 gathers twice and reduces once every micro-batch (DEEPSPEED 0.19.8).
    """
    width = 4 if job.precision in ("fp32", "tf32") else 2
    parameters = (loads.dense_parameters / c.tp).max(axis=0)
    size = width * parameters
    stride = c.tp * c.cp * c.sp
    messages = np.maximum(1.0, np.ceil(parameters / np.maximum(bucket, 1)))

    def spent(kind: str, pieces: Array) -> Array:
        one: Array = collective_s(kind, size / pieces, c.dp, stride, cluster, figures)
        return one * pieces

    counts = parameter_counts(spec)
    layers = np.maximum(1.0, loads.block_counts.sum(axis=1).max(axis=0)) + 2
    reduce = spent("all_reduce", messages)
    gather = spent("all_gather", messages)
    gather_layers = spent("all_gather", layers)
    scatter = spent("reduce_scatter", messages)
    assert counts.total > 0
    micro = c.grad_accum
    total = np.select(
        [c.zero == 0, c.zero == 1, c.zero == 2],
        [reduce, reduce + gather, micro * reduce + gather],
        micro * (2 * gather_layers + scatter),
    )
    hidden = figures["communication.overlap_fraction"] * (c.overlap_comm > 0)
    return np.where(c.dp > 1, total * (1 - hidden), 0.0)


def _overhead_s(spec: ModelSpec, c: Candidates, figures: Mapping[str, float]) -> Array:
    """DeepSpeed's Python: per step, per parameter and micro-batch, per module under stage 3."""
    blocks = spec.layers / c.pp
    tensors = blocks * TENSORS_PER_BLOCK + 3
    partitioned = np.where((c.zero == 1) | (c.zero == 2), figures["deepspeed.parameter_hook_s"], 0.0)
    module = np.where(c.zero == 3, figures["deepspeed.stage3_parameter_s"], 0.0)
    runs = c.grad_accum
    pipeline = np.where(c.pp > 1, figures["deepspeed.pipeline_instruction_s"], 0.0)
    return (
        figures["deepspeed.step_s"]
        + runs * (figures["deepspeed.micro_step_s"] + tensors * (partitioned + module) + pipeline)
    )


def estimate_step(
    spec: ModelSpec,
    job: Job,
    c: Candidates,
    cluster: Cluster,
    speed: Speed,
    *,
    bucket: Array,
    figures: Mapping[str, float],
    software: Software,
) -> Step:
    """Seconds of a step for each candidate."""
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    width = 4 if job.precision in ("fp32", "tf32") else 2
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    forward, light = np.zeros((3, len(c))), np.zeros((3, len(c)))
    recompute = np.zeros((3, len(c)))
    for g, block in enumerate(spec.blocks):
        heavy_one, light_one = block_forward_s(spec, block, job, c, speed, figures, software.kernels)
        count = loads.block_counts[:, g]
        forward += count * heavy_one
        light += count * light_one
        again = np.where(c.activation_checkpointing == 2, count, 0.0)
        if np.any(c.recompute_layers >= 0):
            some = np.minimum(count, np.ceil(c.recompute_layers / c.pp))
            again = np.where(c.recompute_layers >= 0, some, again)
        recompute += again * (heavy_one + light_one)
    head_forward, head_backward = head_s(spec, job, c, speed, figures)
    f = forward + light + loads.has_head * head_forward
    b = 2 * forward + figures["compute.backward_light_factor"] * light + loads.has_head * head_backward
    stage = f + b + recompute
    slowest = stage.argmax(axis=0)
    n = np.arange(len(c))
    micro = c.grad_accum.astype(float)

    tp_message = width * tokens * spec.hidden
    per_pass = collective_s("all_reduce", tp_message, c.tp, np.ones_like(c.tp), cluster, figures)
    passes = 4 + 2 * (c.activation_checkpointing == 2)
    blocks_here = loads.block_counts.sum(axis=1)[slowest, n]
    tensor_parallel = micro * blocks_here * passes * per_pass

    across = c.tp * c.cp * c.sp * c.dp >= cluster.ranks_per_node
    edge = transfer_s(tp_message, cluster, across & (cluster.nodes > 1), figures)
    transfer = np.where(c.pp > 1, 2 * (micro + c.pp - 1) * edge, 0.0)

    parts = {name: np.zeros(len(c)) for name in PARTS}
    parts["forward"] = micro * f[slowest, n]
    parts["backward"] = micro * b[slowest, n]
    parts["recompute"] = micro * recompute[slowest, n]
    parts["optimizer"] = _optimizer_s(spec, job, c, loads, speed, figures)
    parts["tensor_parallel"] = tensor_parallel
    parts["data_parallel_exposed"] = _data_parallel_s(spec, job, c, loads, bucket, cluster, figures)
    parts["pipeline_bubble"] = (c.pp - 1.0) * stage[slowest, n]
    parts["pipeline_transfer"] = transfer
    parts["overhead"] = _overhead_s(spec, c, figures)
    return Step(parts=parts, time_s=np.sum(list(parts.values()), axis=0))

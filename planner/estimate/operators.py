"""Seconds of one block's operators on one rank, for one micro-batch.

A kernel takes the longer of its arithmetic and its memory traffic. The host starts kernels ahead of
the device, so a block takes the longer of its kernels and of starting them; where the device is the
host itself (`start_hidden` False) the two add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.compute import attention_flops_per_token, block_gemms, keys_per_token
from outlay.planner.estimate.software import Software
from outlay.planner.estimate.states import QUANTIZED_BYTES
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import Attention, Block, ModelSpec

Figures = Mapping[str, "float | Array"]

TILE = 128
"""Rows and columns of the output that one multiprocessor computes at a time: cuBLAS's usual tiles
are 128×128 and 128×256 (NVIDIA, Matrix Multiplication Background User's Guide, DA-08587, section 4)."""
ALIGNMENT = 8
"""Elements: 16-byte rows, below which tensor cores fall back to slower kernels (same guide, section 2)."""
ROW_BYTES = 128
"""Rows of a multiple of this many bytes are read fastest (same guide, section 3: 64 16-bit values)."""
UNFUSED_SOFTMAX_OPERATORS = 6
"""Kernels that start in place of the one fused softmax: to fp32, scale, make the mask, apply it, softmax,
back to 16 bits, and a copy (`forward_torch_softmax` of the same file), less that one."""
_WIDTH = {"fp32": 4, "tf32": 4}
_LOW = {"fp8": "fp8", "nvfp4": "fp4"}
"""Precisions of which only the linear layers of blocks run at the low rate."""


def width_of(precision: str) -> int:
    """Bytes of an activation: 4 in fp32 and tf32, 2 otherwise (fp8 and fp4 keep 16-bit activations)."""
    return _WIDTH.get(precision, 2)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one rank of this cluster sustains; from measurement where there is one."""

    gemm_flops: float | Array
    """In the width of activations."""
    linear_flops: float | Array
    """Of the linear layers: the low-precision rate under fp8 and nvfp4."""
    memory_bytes_per_s: float | Array
    measured: bool
    sm_count: int | None = None
    """Null: unknown, so no quantization to waves."""


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """One block and micro-batch, seconds [n]; each pass is kernels only, `host_*` what starting them takes."""

    forward: Array
    backward: Array
    recompute: Array
    """Full recomputation: the forward pass again."""
    core: Array
    """Selective recomputation as Megatron does it: the attention core again."""
    selective: Array
    """As torch's per-operator policy does it: all but attention and every second product again."""
    host_forward: Array
    host_backward: Array


def speed_of(cluster: Cluster, precision: str, figures: Figures) -> Speed | None:
    """Rates of one rank; None where neither a measurement nor a datasheet gives them."""
    rates, accelerator = cluster.rates, cluster.accelerator
    if rates is not None and precision in rates.gemm_flops:
        gemm = rates.gemm_flops[precision] * figures["compute.gemm_fraction"]
        memory = rates.memory_bytes_per_s * figures["compute.memory_fraction"]
        return Speed(gemm_flops=gemm, linear_flops=gemm, memory_bytes_per_s=memory, measured=True)
    low = _LOW.get(precision)
    base = "bf16" if low else precision
    peak, memory_rate = accelerator.flops.get(base), accelerator.memory_bytes_per_s
    if peak is None or memory_rate is None or (low and low not in accelerator.flops):
        return None
    if base == "fp32":
        gemm = peak * figures["compute.fp32_fraction"]
    else:
        gemm = (
            peak
            * figures["compute.gemm_fraction"]
            * (figures["compute.tf32_factor"] if base == "tf32" else 1.0)
        )
    linear = gemm
    if low:
        linear = gemm * (accelerator.flops[low] / peak) * figures[f"compute.{low}_factor"]
    return Speed(
        gemm_flops=gemm,
        linear_flops=linear,
        memory_bytes_per_s=memory_rate * figures["compute.memory_fraction"],
        measured=False,
        sm_count=accelerator.sm_count if accelerator.kind == "gpu" else None,
    )


def _padded(size: Array, share: float | Array) -> Array:
    """`size` rounded up to whole tiles by the share `share` of the way."""
    whole = np.ceil(size / TILE) * TILE
    return size + share * (whole - size)


def gemm_s(
    tokens: Array,
    k: Array,
    n: Array,
    speed: Speed,
    width: int,
    figures: Figures,
    *,
    rate: float | Array | None = None,
    count: Array | float = 1.0,
) -> Array:
    """`count` products of [tokens, k]·[k, n] in one kernel: the slower of arithmetic and memory.

    The output is computed in tiles, `sm_count` at a time, so its area is rounded up to tiles and to
    waves by the share `compute.wave_share` (split-k and smaller tiles recover the rest). A tile
    pays a prologue worth `compute.gemm_half_k` steps of k, a product of few tokens is as slow as
    `compute.gemm_half_tokens` more of them, and each kernel has a fixed time.
    """
    rate = speed.gemm_flops if rate is None else rate
    half = figures["compute.gemm_half_tokens"]
    share = figures["compute.wave_share"]
    area = count * _padded(tokens, share) * _padded(np.asarray(n, float), share)
    if speed.sm_count:
        odd = (k * width % ROW_BYTES != 0) | (np.asarray(n) * width % ROW_BYTES != 0)
        rate = rate / np.where(odd, figures["compute.unaligned_factor"], 1.0)
        wave = speed.sm_count * float(TILE * TILE)
        area = area + share * (np.ceil(area / wave) * wave - area)
    area = area + half * n * count
    arithmetic = 2.0 * area * (k + figures["compute.gemm_half_k"]) / rate
    traffic = width * count * (tokens * k + k * n + tokens * n) / speed.memory_bytes_per_s
    return np.asarray(np.maximum(arithmetic, traffic) + figures["compute.kernel_s"])


def linear_s(
    spec: ModelSpec,
    block: Block,
    job: Job,
    c: Candidates,
    tokens: Array,
    speed: Speed,
    figures: Figures,
) -> tuple[Array, Array]:
    """(forward, forward and both backward products) seconds of one block's weight multiplies.

    Backward: dX is [tokens, n]·[n, k] and dW is [k, tokens]·[tokens, n]. Experts receive
    tokens·top_k·imbalance over the group's ep ranks, each local expert its share. Frozen weights have no
    dW; quantized ones are unpacked into the compute width in each pass (QLoRA, arXiv 2305.14314, section 3).
    The products of adapters, below 1 % of these at usual ranks, are left out.
    """
    width, mlp = width_of(job.precision), block.mlp
    low = job.precision in _LOW
    forward, backward = np.zeros(len(c)), np.zeros(len(c))
    for g in block_gemms(spec, block):
        k = np.asarray(g.k / np.where(g.shard == "k", c.tp, 1), float)
        n = np.asarray(g.n / np.where(g.shard == "n", c.tp, 1), float)
        rows, count = tokens, np.ones(len(c))
        if g.name.startswith("expert"):
            count = np.maximum(1.0, mlp.experts / c.ep)
            rows = tokens * mlp.top_k * c.ep / mlp.experts * figures["moe.imbalance"]
        forward = forward + gemm_s(
            rows, k, n, speed, width, figures, rate=speed.linear_flops, count=count
        )
        backward = backward + gemm_s(
            rows, n, k, speed, width, figures, rate=speed.linear_flops, count=count
        )
        if job.finetune is None:
            backward = backward + gemm_s(
                k, rows, n, speed, width, figures, rate=speed.linear_flops, count=count
            )
        elif job.finetune.quant in QUANTIZED_BYTES:
            unpacked = (QUANTIZED_BYTES[job.finetune.quant] + width) * count * k * n
            forward = forward + unpacked / speed.memory_bytes_per_s
            backward = backward + unpacked / speed.memory_bytes_per_s
        if low:
            # Each tensor is cast once, into the layouts of both products that read it.
            cast = count * figures["compute.cast_bytes"] / speed.memory_bytes_per_s
            forward, backward = forward + (rows * k + k * n) * cast, backward + rows * n * cast
    if job.finetune is not None and job.finetune.method == "dora":
        more = _dora_s(spec, block, job, tokens, speed, figures)
        forward, backward = forward + more[0], backward + more[1]
    return forward, backward


def _dora_s(
    spec: ModelSpec, block: Block, job: Job, tokens: Array, speed: Speed, figures: Figures
) -> tuple[Array, Array]:
    """(forward, backward) seconds of one block's norms of merged weights (peft/tuners/lora/dora.py).

    The product of the factors is written, scaled, added to the weight and squared: seven passes over
    matrices of that size. With dropout the frozen projection runs once more, on what was dropped out, and
    its dX too. From the operations; no measured run has it.
    """
    a, width = block.attention, width_of(job.precision)
    assert job.finetune is not None
    outputs = np.asarray(float(a.q_width + a.v_width + (a.k_width if a.fused_qkv else 0)))
    hidden = np.asarray(float(spec.hidden))
    passes = 7.0 * width * hidden * outputs / speed.memory_bytes_per_s
    if not job.finetune.dropout:
        return passes, np.zeros_like(passes)
    again = gemm_s(tokens, hidden, outputs, speed, width, figures, rate=speed.linear_flops)
    return passes + again, gemm_s(
        tokens, outputs, hidden, speed, width, figures, rate=speed.linear_flops
    )


def _score_traffic_bytes(a: Attention, width: int, kernels: str) -> tuple[float, float]:
    """(forward, backward) bytes a score that unfused attention moves besides q, k and v.

    Forward: QKᵀ writes, softmax reads and writes, PV reads; dropout reads, writes and makes a mask.
    Backward: dP written and read, softmax reads two and writes one, two products read each.
    Modules in plain torch scale, mask and upcast to fp32 in kernels of their own.
    """
    forward, backward = 4.0 * width, 8.0 * width
    if a.dropout > 0:
        forward, backward = forward + 2.0 * width + 1.0, backward + 2.0 * width + 1.0
    if kernels == "hf":
        forward, backward = forward + 8.0 * width, backward + 4.0 * width
    return forward, backward


def fused_softmax_fits(block: Block, job: Job, c: Candidates) -> Array:
    """Whether Megatron's fused softmax takes this shape; else torch's operators run one by one [n].

    A thread block of that kernel works on four rows of 16-bit scores, so the micro-batch times the rank's
    heads has to be a multiple of 4, for 17 to 4096 keys (megatron/model/fused_softmax.py,
    `is_kernel_available`; before 2022 up to 2048 keys).
    """
    rows = c.micro_batch * block.attention.heads // c.tp
    possible = 16 < job.seq_len <= 4096 and job.seq_len % 4 == 0 and width_of(job.precision) == 2
    return np.asarray((rows % 4 == 0) & possible)


def attention_s(
    block: Block,
    job: Job,
    c: Candidates,
    tokens: Array,
    speed: Speed,
    figures: Figures,
    software: Software,
) -> tuple[Array, Array]:
    """(forward, backward) seconds of one block's attention core.

    flash: the keys that a token sees, in one kernel; backward computes five products where forward
    computes two (Dao, arXiv 2307.08691, section 3.2). eager: the full square, bound by the traffic
    of the scores; rows of head_dim that are no multiple of 8 take slower kernels.
    """
    a, width = block.attention, width_of(job.precision)
    eager = job.attention == "eager"
    flops = attention_flops_per_token(block, job.seq_len, causal=not eager) * tokens / c.tp
    if not eager:
        heavy = flops / (speed.gemm_flops * figures["compute.attention_fraction"])
        if software.recent_attention:
            heavy = heavy / figures["compute.attention_recent_factor"]
        kernel = figures["compute.kernel_s"]
        return heavy + kernel, heavy * figures["compute.attention_backward_factor"] + 2.0 * kernel
    heavy = flops / (speed.gemm_flops * figures["compute.eager_fraction"])
    if a.head_dim % ALIGNMENT:
        heavy = heavy * figures["compute.misaligned_factor"]
    keys = keys_per_token(job.seq_len, a.window, causal=False)
    scores = (
        a.heads
        / c.tp
        * tokens
        * keys
        * figures["compute.softmax_factor"]
        / speed.memory_bytes_per_s
    )
    forward, backward = (np.asarray(x) for x in _score_traffic_bytes(a, width, software.kernels))
    if software.kernels == "fused":
        fits, apart = fused_softmax_fits(block, job, c), _score_traffic_bytes(a, width, "hf")
        forward, backward = np.where(fits, forward, apart[0]), np.where(fits, backward, apart[1])
    return heavy + forward * scores, 2.0 * heavy + backward * scores


def elementwise_bytes_per_token(
    spec: ModelSpec, block: Block, width: int, kernels: str
) -> tuple[float, float]:
    """(divided by tp, whole on each tp rank) memory traffic of one block's other operators, forward.

    hf: RMSNorm reads and writes 8 h-wide tensors, a layer norm 2, twice; rotary 9 of q and k;
    residuals 6 h, dropout before them 4 h and its masks; SwiGLU 5 ffn, others 4. fused: norms 2 h each,
    rotary 2, residuals with the norm 4 h, activation 3 ffn, dropout makes and reads two masks. A routed
    token is gathered, permuted and summed top_k times.
    """
    a, mlp, h = block.attention, block.mlp, spec.hidden
    qk = a.q_width + a.k_width
    ffn = mlp.ffn * mlp.top_k + mlp.shared_ffn if mlp.experts else mlp.ffn
    routed = 6.0 * h * mlp.top_k if mlp.experts else 0.0
    masks = 2.0 * h if spec.residual_dropout > 0 else 0.0
    if kernels == "hf":
        rotary = 9.0 * qk if spec.positions == "rotary" else 0.0
        whole = 22.0 if spec.norm == "rmsnorm" else 10.0
        whole += 4.0 if spec.residual_dropout > 0 else 0.0
        sharded = width * (rotary + (5.0 if mlp.gated else 4.0) * ffn)
        return sharded, width * (whole * h + routed) + masks
    return width * (2.0 * qk + 3.0 * ffn), width * (8.0 * h + routed) + masks


def block_s(
    spec: ModelSpec,
    block: Block,
    job: Job,
    c: Candidates,
    speed: Speed,
    figures: Figures,
    software: Software,
) -> BlockTime:
    """All operators of one block, for one micro-batch."""
    width = width_of(job.precision)
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    linear_forward, linear_backward = linear_s(spec, block, job, c, tokens, speed, figures)
    core_forward, core_backward = attention_s(block, job, c, tokens, speed, figures, software)
    sharded, whole = elementwise_bytes_per_token(spec, block, width, software.kernels)
    split = np.where(c.sequence_parallel > 0, c.tp, 1)
    traffic = (sharded / c.tp + whole / split) * tokens * figures["compute.elementwise_factor"]
    if software.kernels == "hf" and speed.sm_count:
        traffic = traffic * figures["compute.plain_kernels_factor"]
    light = traffic / speed.memory_bytes_per_s
    back = figures["compute.backward_light_factor"]
    operators = software.block_operators * (1.5 if block.mlp.experts else 1.0)
    more = np.zeros(len(c))
    if job.attention == "eager" and software.kernels == "fused":
        more = np.where(fused_softmax_fits(block, job, c), 0.0, UNFUSED_SOFTMAX_OPERATORS)
    host = np.asarray((operators + more) * figures["compute.operator_start_s"])
    forward = linear_forward + core_forward + light
    return BlockTime(
        forward=forward,
        backward=linear_backward + core_backward + back * light,
        recompute=forward,
        core=core_forward,
        selective=0.5 * linear_forward + light,
        host_forward=host,
        host_backward=host * figures["compute.backward_start_factor"],
    )


def head_s(
    spec: ModelSpec, job: Job, c: Candidates, speed: Speed, figures: Figures, share: float = 1.0
) -> tuple[Array, Array]:
    """(forward, backward) seconds of final projection and loss for one micro-batch, of `share` of its
    tokens (a masked language model may gather the masked ones first).

    The loss touches vocabulary-wide fp32 values 3 times forward and 6 times backward.
    """
    if not spec.has_head:
        return np.zeros(len(c)), np.zeros(len(c))
    width = width_of(job.precision)
    tokens = share * c.micro_batch * job.seq_len / (c.cp * c.sp)
    vocab = spec.vocab / c.tp
    hidden = np.asarray(float(spec.hidden))
    product = gemm_s(tokens, hidden, vocab, speed, width, figures)
    value = 4.0 * vocab * tokens * figures["compute.elementwise_factor"] / speed.memory_bytes_per_s
    back = 2.0 if job.finetune is None else 1.0  # a frozen head has no dW
    return product + 3.0 * value, back * product + 6.0 * value

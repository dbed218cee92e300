"""What arithmetic and DeepSpeed forbid of a strategy, one function a rule.

From DeepSpeed 0.19.8's source and tries on CPU; paths are under `deepspeed/`.
"""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.rules.core import Context, rule


@rule(
    "world_is_ranks",
    "arithmetic",
    "world = dp·tp·pp·cp·sp",
    lambda s, x: (
        f"dp {s.dp} · tp {s.tp} · pp {s.pp} · cp {s.cp} · sp {s.sp} = {s.world}, "
        f"but the hardware has {x.cluster.ranks} ranks"
    ),
)
def world_is_ranks(c: Candidates, x: Context) -> Array:
    return np.asarray(c.dp * c.tp * c.pp * c.cp * c.sp != x.cluster.ranks)


@rule(
    "batch_closes",
    "deepspeed",
    "runtime/config.py:602-650 (train_batch = micro × accumulation × dp)",
    lambda s, x: (
        f"micro_batch {s.micro_batch} · grad_accum {s.grad_accum} · dp {s.dp} = {s.global_batch}, "
        f"not the global batch {x.job.global_batch}"
    ),
)
def batch_closes(c: Candidates, x: Context) -> Array:
    return np.asarray(c.micro_batch * c.grad_accum * c.dp != x.job.global_batch)


@rule(
    "zero_stage_exists",
    "arithmetic",
    "ZeRO has stages 0 to 3",
    lambda s, x: f"ZeRO-{s.zero} does not exist: the stages are 0, 1, 2 and 3",
)
def zero_stage_exists(c: Candidates, x: Context) -> Array:
    return np.asarray((c.zero < 0) | (c.zero > 3))


@rule(
    "stages_have_blocks",
    "arithmetic",
    "each pipeline stage needs at least one block",
    lambda s, x: f"pp {s.pp} stages for {x.spec.layers} blocks",
)
def stages_have_blocks(c: Candidates, x: Context) -> Array:
    return np.asarray(c.pp > x.spec.layers)


@rule(
    "pipeline_without_zero_2",
    "deepspeed",
    "runtime/pipe/engine.py:76",
    lambda s, x: f"ZeRO-{s.zero} with pp {s.pp}: DeepSpeed's pipeline engine takes ZeRO 0 or 1",
)
def pipeline_without_zero_2(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (c.zero >= 2))


@rule(
    "pipeline_without_ulysses",
    "deepspeed",
    "__init__.py:582 (mpu must be None with a pipeline; Ulysses is passed as mpu)",
    lambda s, x: f"sp {s.sp} with pp {s.pp}: DeepSpeed's pipeline takes no Ulysses group",
)
def pipeline_without_ulysses(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (c.sp > 1))


@rule(
    "tensor_parallel_divides_heads",
    "deepspeed",
    "module_inject/tp_shard.py:91: whole key-value heads are shared out, unevenly where they do not divide (tried: "
    "3 heads, and 1 key-value head, over 2 ranks start and step)",
    lambda s, x: (
        f"tp {s.tp} does not divide the attention heads "
        + ", ".join(sorted({f"{b.attention.heads}/{b.attention.kv_heads}" for b in x.spec.blocks}))
        + ": ranks would get unequal shares"
    ),
    effect="changed",
)
def tensor_parallel_divides_heads(c: Candidates, x: Context) -> Array:
    bad = np.zeros(len(c), bool)
    for block in x.spec.blocks:
        bad |= (block.attention.heads % c.tp != 0) | (block.attention.kv_heads % c.tp != 0)
    return bad


@rule(
    "sequence_parallel_divides",
    "deepspeed",
    "runtime/sequence_parallel/ulysses_sp.py:148",
    lambda s, x: f"sp {s.sp} must divide the heads and the sequence length {x.job.seq_len}",
)
def sequence_parallel_divides(c: Candidates, x: Context) -> Array:
    bad = np.asarray(x.job.seq_len % c.sp != 0)
    for block in x.spec.blocks:
        bad = bad | (block.attention.heads % c.sp != 0)
    return bad


@rule(
    "expert_parallel_divides",
    "arithmetic",
    "ep divides dp and the number of experts",
    lambda s, x: f"ep {s.ep} must divide dp {s.dp} and the experts of the model",
)
def expert_parallel_divides(c: Candidates, x: Context) -> Array:
    experts = max(b.mlp.experts for b in x.spec.blocks)
    return np.asarray((c.dp % c.ep != 0) | ((c.ep > 1) & ((experts == 0) | (experts % c.ep != 0))))


@rule(
    "precision_runs_on_cpu",
    "deepspeed",
    "accelerator/cpu_accelerator.py: is_fp16_supported is false; tf32 and fp8 are GPU formats",
    lambda s, x: f"{x.job.precision} does not run on CPU: use fp32 or bf16",
)
def precision_runs_on_cpu(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.cluster.kind == "cpu" and x.job.precision not in ("fp32", "bf16"))


@rule(
    "deepspeed_runs_there",
    "deepspeed",
    "DeepSpeed has no accelerator backend for it",
    lambda s, x: (
        f"DeepSpeed does not train on {x.cluster.accelerator.title}; it can be sized and priced only"
    ),
)
def deepspeed_runs_there(c: Candidates, x: Context) -> Array:
    return np.full(len(c), not x.cluster.accelerator.deepspeed)


@rule(
    "offload_param_needs_stage_3",
    "deepspeed",
    "runtime/engine.py:2655-2711: stages 1 and 2 are not given it; accepted and ignored (tried)",
    lambda s, x: f"offload_param at ZeRO-{s.zero}: weights are offloaded at stage 3 only",
    effect="ignored",
)
def offload_param_needs_stage_3(c: Candidates, x: Context) -> Array:
    return np.asarray((c.offload_param > 0) & (c.zero != 3))


@rule(
    "offload_needs_zero",
    "deepspeed",
    "ops/adam/cpu_adam.py: it initializes (tried on CPU), and on a GPU the CPU optimizer's step asserts that "
    "its weights are on the CPU",
    lambda s, x: (
        "offload_optimizer at ZeRO-0: nothing is offloaded, and on a GPU the first step fails"
    ),
    effect="changed",
)
def offload_needs_zero(c: Candidates, x: Context) -> Array:
    return np.asarray((c.offload_optimizer > 0) & (c.zero == 0))


@rule(
    "sequence_fits_positions",
    "arithmetic",
    "a learned position table has no rows beyond it",
    lambda s, x: (
        f"sequence length {x.job.seq_len} exceeds the model's {x.spec.max_positions} learned positions"
    ),
)
def sequence_fits_positions(c: Candidates, x: Context) -> Array:
    too_long = x.spec.positions == "learned" and x.job.seq_len > x.spec.max_positions
    return np.full(len(c), too_long)


@rule(
    "recomputed_layers_exist",
    "arithmetic",
    "a layer is recomputed once",
    lambda s, x: f"recompute_layers {s.recompute_layers}: the model has {x.spec.layers} layers",
)
def recomputed_layers_exist(c: Candidates, x: Context) -> Array:
    return np.asarray(c.recompute_layers > x.spec.layers)


@rule(
    "not_run_by_deepspeed",
    "deepspeed",
    "no interleaved schedule and no ring attention in 0.19.8",
    lambda s, x: f"vpp {s.vpp}, cp {s.cp}: estimated only, DeepSpeed does not run it",
)
def not_run_by_deepspeed(c: Candidates, x: Context) -> Array:
    return np.asarray((c.vpp > 1) | (c.cp > 1))


@rule(
    "nvme_needs_stage_3",
    "deepspeed",
    "runtime/zero/stage_1_and_2.py:221: any device but none is cpu_offload there; swapping is stage3.py's",
    lambda s, x: (
        f"offload to NVMe at ZeRO-{s.zero}: DeepSpeed swaps to NVMe at stage 3 only, and keeps the states in "
        "host memory below it"
    ),
    effect="changed",
)
def nvme_needs_stage_3(c: Candidates, x: Context) -> Array:
    return np.asarray(((c.offload_optimizer == 2) | (c.offload_param == 2)) & (c.zero != 3))


@rule(
    "sequence_parallel_divides_kv_heads",
    "deepspeed",
    "runtime/sequence_parallel/ulysses_sp.py:149",
    lambda s, x: (
        f"sp {s.sp} must divide the key-value heads, or they it: "
        + ", ".join(sorted({str(b.attention.kv_heads) for b in x.spec.blocks}))
    ),
    versions=">=0.17.6,<0.20",
)
def sequence_parallel_divides_kv_heads(c: Candidates, x: Context) -> Array:
    bad = np.zeros(len(c), bool)
    for kv_heads in {block.attention.kv_heads for block in x.spec.blocks}:
        bad |= (kv_heads % c.sp != 0) & (c.sp % max(kv_heads, 1) != 0)
    return bad


@rule(
    "expert_parallel_at_stage_3_alone",
    "deepspeed",
    "runtime/engine.py:2219: AutoEP with ZeRO Stage 3 does not support sequence parallelism yet",
    lambda s, x: f"ep {s.ep} with sp {s.sp} at ZeRO-3: expert parallel takes no Ulysses there",
    versions=">=0.19.4,<0.20",
)
def expert_parallel_at_stage_3_alone(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep > 1) & (c.zero == 3) & (c.sp > 1))

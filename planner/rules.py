"""What DeepSpeed 0.19.8 and the runner forbid, one function a rule, each with its evidence.

A rule marks the candidates that it forbids (the search's mask) and says why for one of them (a
person's message). Rules of arithmetic, of DeepSpeed, and of what `outlay run` does not do yet are
told apart by `kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

VERSIONS = ">=0.19.8,<0.20"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rule may look at besides the candidates."""

    spec: ModelSpec
    job: Job
    cluster: Cluster


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One constraint."""

    name: str
    kind: str
    """arithmetic | deepspeed | runner."""
    forbids: Callable[[Candidates, Context], Array]
    """True where the candidate is forbidden; [n]."""
    message: Callable[[Strategy, Context], str]
    evidence: str


RULES: list[Rule] = []


def _rule(
    name: str, kind: str, evidence: str, message: Callable[[Strategy, Context], str]
) -> Callable[[Callable[[Candidates, Context], Array]], Callable[[Candidates, Context], Array]]:
    def register(
        forbids: Callable[[Candidates, Context], Array],
    ) -> Callable[[Candidates, Context], Array]:
        RULES.append(
            Rule(name=name, kind=kind, forbids=forbids, message=message, evidence=evidence)
        )
        return forbids

    return register


@_rule(
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


@_rule(
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


@_rule(
    "zero_stage_exists",
    "arithmetic",
    "ZeRO has stages 0 to 3",
    lambda s, x: f"ZeRO-{s.zero} does not exist: the stages are 0, 1, 2 and 3",
)
def zero_stage_exists(c: Candidates, x: Context) -> Array:
    return np.asarray((c.zero < 0) | (c.zero > 3))


@_rule(
    "stages_have_blocks",
    "arithmetic",
    "each pipeline stage needs at least one block",
    lambda s, x: f"pp {s.pp} stages for {x.spec.layers} blocks",
)
def stages_have_blocks(c: Candidates, x: Context) -> Array:
    return np.asarray(c.pp > x.spec.layers)


@_rule(
    "pipeline_without_zero_2",
    "deepspeed",
    "runtime/pipe/engine.py:76",
    lambda s, x: f"ZeRO-{s.zero} with pp {s.pp}: DeepSpeed's pipeline engine takes ZeRO 0 or 1",
)
def pipeline_without_zero_2(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (c.zero >= 2))


@_rule(
    "pipeline_without_ulysses",
    "deepspeed",
    "__init__.py:582 (mpu must be None with a pipeline; Ulysses is passed as mpu)",
    lambda s, x: f"sp {s.sp} with pp {s.pp}: DeepSpeed's pipeline takes no Ulysses group",
)
def pipeline_without_ulysses(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (c.sp > 1))


@_rule(
    "tensor_parallel_divides_heads",
    "deepspeed",
    "module_inject/auto_tp.py: attention heads are split whole",
    lambda s, x: (
        f"tp {s.tp} does not divide the attention heads "
        + ", ".join(sorted({f"{b.attention.heads}/{b.attention.kv_heads}" for b in x.spec.blocks}))
    ),
)
def tensor_parallel_divides_heads(c: Candidates, x: Context) -> Array:
    bad = np.zeros(len(c), bool)
    for block in x.spec.blocks:
        bad |= (block.attention.heads % c.tp != 0) | (block.attention.kv_heads % c.tp != 0)
    return bad


@_rule(
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


@_rule(
    "expert_parallel_divides",
    "arithmetic",
    "ep divides dp and the number of experts",
    lambda s, x: f"ep {s.ep} must divide dp {s.dp} and the experts of the model",
)
def expert_parallel_divides(c: Candidates, x: Context) -> Array:
    experts = max(b.mlp.experts for b in x.spec.blocks)
    return np.asarray((c.dp % c.ep != 0) | ((c.ep > 1) & ((experts == 0) | (experts % c.ep != 0))))


@_rule(
    "precision_runs_on_cpu",
    "deepspeed",
    "accelerator/cpu_accelerator.py: is_fp16_supported is false; tf32 and fp8 are GPU formats",
    lambda s, x: f"{x.job.precision} does not run on CPU: use fp32 or bf16",
)
def precision_runs_on_cpu(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.cluster.kind == "cpu" and x.job.precision not in ("fp32", "bf16"))


@_rule(
    "flash_needs_gpu",
    "runner",
    "the flash-attn package has no CPU kernels; sdpa has a fused one of its own",
    lambda s, x: "attention flash does not run on CPU: use sdpa",
)
def flash_needs_gpu(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.cluster.kind == "cpu" and x.job.attention == "flash")


@_rule(
    "deepspeed_runs_there",
    "deepspeed",
    "DeepSpeed has no accelerator backend for it",
    lambda s, x: (
        f"DeepSpeed does not train on {x.cluster.accelerator.title}; it can be sized and priced only"
    ),
)
def deepspeed_runs_there(c: Candidates, x: Context) -> Array:
    return np.full(len(c), not x.cluster.accelerator.deepspeed)


@_rule(
    "offload_param_needs_stage_3",
    "deepspeed",
    "docs: offload_param is stage 3 only; at stage 2 it is accepted and ignored",
    lambda s, x: f"offload_param at ZeRO-{s.zero}: weights are offloaded at stage 3 only",
)
def offload_param_needs_stage_3(c: Candidates, x: Context) -> Array:
    return np.asarray((c.offload_param > 0) & (c.zero != 3))


@_rule(
    "offload_needs_zero",
    "deepspeed",
    "runtime/zero/config.py: offload_optimizer belongs to stages 1-3",
    lambda s, x: "offload_optimizer at ZeRO-0: there is no partition to offload",
)
def offload_needs_zero(c: Candidates, x: Context) -> Array:
    return np.asarray((c.offload_optimizer > 0) & (c.zero == 0))


@_rule(
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


@_rule(
    "recomputed_layers_exist",
    "arithmetic",
    "a layer is recomputed once",
    lambda s, x: f"recompute_layers {s.recompute_layers}: the model has {x.spec.layers} layers",
)
def recomputed_layers_exist(c: Candidates, x: Context) -> Array:
    return np.asarray(c.recompute_layers > x.spec.layers)


@_rule(
    "not_run_by_deepspeed",
    "deepspeed",
    "no interleaved schedule and no ring attention in 0.19.8",
    lambda s, x: f"vpp {s.vpp}, cp {s.cp}: estimated only, DeepSpeed does not run it",
)
def not_run_by_deepspeed(c: Candidates, x: Context) -> Array:
    return np.asarray((c.vpp > 1) | (c.cp > 1))


OFFLOADED = ("adam", "adamw")
"""Optimizers that DeepSpeed has a step on the host for, as `outlay run` uses it."""


@_rule(
    "runner_does_not_yet",
    "runner",
    "outlay run executes ZeRO 0-3, their offload to the host, data parallel and pipeline; the others are "
    "a later capability",
    lambda s, x: (
        "outlay run does not execute tensor, sequence or expert parallel, Megatron sequence parallel, offload "
        f"to NVMe, in a pipeline, of weights alone or of another optimizer than {' or '.join(OFFLOADED)}, "
        "selective or partial checkpointing, or a fused loss yet"
    ),
)
def runner_does_not_yet(c: Candidates, x: Context) -> Array:
    return np.asarray(
        (c.tp > 1) | (c.sp > 1) | (c.ep > 1) | (c.sequence_parallel > 0)
        | (c.offload_optimizer > 1) | (c.offload_param > c.offload_optimizer)
        | ((c.offload_optimizer > 0) & ((c.pp > 1) | (x.job.optimizer.name not in OFFLOADED)))
        | (c.activation_checkpointing == 1) | (c.recompute_layers >= 0) | (c.loss > 0)
    )  # fmt: skip


@_rule(
    "bf16_pipeline_resumes_from_zero_1",
    "runner",
    "DeepSpeed 0.19.8 cannot load its own checkpoint there: KeyError in runtime/bf16_optimizer.py (tried)",
    lambda s, x: (
        f"a bf16 pipeline (pp {s.pp}) at ZeRO-0 cannot resume from its checkpoints; use --zero 1"
    ),
)
def bf16_pipeline_resumes_from_zero_1(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (c.zero == 0) & (x.job.precision == "bf16"))


PIPELINE_FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Families that runner/pipeline.py cuts into stages; a test compares the two lists."""


@_rule(
    "runner_trains_causal_models",
    "runner",
    "the runner's one objective is causal language modelling",
    lambda s, x: f"outlay run trains causal language models only; {x.spec.family} is none",
)
def runner_trains_causal_models(c: Candidates, x: Context) -> Array:
    causal = all(block.attention.causal for block in x.spec.blocks)
    return np.full(len(c), x.spec.encoder_decoder or not causal or not x.spec.has_head)


@_rule(
    "runner_trains_all_weights",
    "runner",
    "runner/ builds no adapters and loads no quantized weights",
    lambda s, x: (
        "outlay run trains all weights: adapters are estimated for a trainer of one's own; "
        "`plan` and `size` take them with --for deepspeed"
    ),
)
def runner_trains_all_weights(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.job.finetune is not None)


ROWS = (".jsonl", ".ndjson", ".csv", ".parquet")


@_rule(
    "runner_trains_packed_text",
    "runner",
    "runner/data/prepare.py: text end to end, cut at the sequence length; a file is one document",
    lambda s, x: (
        "outlay run trains on packed tokens of text files: rows of "
        + ", ".join(ROWS)
        + " and padded rows (--no-packing) are estimated for a trainer of one's own; --for deepspeed takes them"
    ),
)
def runner_trains_packed_text(c: Candidates, x: Context) -> Array:
    rows = x.job.data is not None and x.job.data.path.lower().endswith(ROWS)
    return np.full(len(c), rows or not x.job.packing)


@_rule(
    "runner_pipelines_its_families",
    "runner",
    "runner/pipeline.py knows the layout of " + ", ".join(PIPELINE_FAMILIES),
    lambda s, x: f"outlay run does not cut {x.spec.family} into pipeline stages yet (pp {s.pp})",
)
def runner_pipelines_its_families(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (x.spec.family not in PIPELINE_FAMILIES))


def allowed(
    c: Candidates, x: Context, *, kinds: tuple[str, ...] = ("arithmetic", "deepspeed", "runner")
) -> Array:
    """True where no rule of these kinds forbids the candidate; [n]."""
    ok = np.ones(len(c), bool)
    for rule in RULES:
        if rule.kind in kinds:
            ok &= ~rule.forbids(c, x)
    return ok


def broken(
    strategy: Strategy,
    x: Context,
    *,
    kinds: tuple[str, ...] = ("arithmetic", "deepspeed", "runner"),
) -> list[tuple[Rule, str]]:
    """The rules that one strategy breaks, each with its message."""
    one = Candidates.of([strategy])
    return [
        (rule, rule.message(strategy, x))
        for rule in RULES
        if rule.kind in kinds and bool(rule.forbids(one, x)[0])
    ]

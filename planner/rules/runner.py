"""What `outlay run` does not execute yet, one function a rule."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.rules.core import Context, rule


@rule(
    "flash_needs_gpu",
    "runner",
    "the flash-attn package has no CPU kernels; sdpa has a fused one of its own",
    lambda s, x: "attention flash does not run on CPU: use sdpa",
)
def flash_needs_gpu(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.cluster.kind == "cpu" and x.job.attention == "flash")


OFFLOADED = ("adam", "adamw")
"""Optimizers that DeepSpeed has a step on the host for, as `outlay run` uses it."""


@rule(
    "runner_does_not_yet",
    "runner",
    "outlay run executes ZeRO 0-3, their offload to the host and to NVMe, data, tensor, sequence, expert parallel "
    "and pipeline; the others are a later capability",
    lambda s, x: (
        "outlay run does not execute Megatron sequence parallel, offload in a pipeline, of weights "
        f"farther away than the optimizer or of another optimizer than {' or '.join(OFFLOADED)}, selective "
        "checkpointing yet"
    ),
)
def runner_does_not_yet(c: Candidates, x: Context) -> Array:
    return np.asarray(
        (c.sequence_parallel > 0)
        | (c.offload_param > c.offload_optimizer)
        | ((c.offload_optimizer > 0) & ((c.pp > 1) | (x.job.optimizer.name not in OFFLOADED)))
        | (c.activation_checkpointing == 1)
    )  # fmt: skip


@rule(
    "bf16_pipeline_resumes_from_zero_1",
    "runner",
    "DeepSpeed 0.19.8 cannot load its own checkpoint there: KeyError in runtime/bf16_optimizer.py (tried)",
    lambda s, x: (
        f"a bf16 pipeline (pp {s.pp}) at ZeRO-0 cannot resume from its checkpoints; use --zero 1"
    ),
)
def bf16_pipeline_resumes_from_zero_1(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (c.zero == 0) & (x.job.precision == "bf16"))


PIPELINE_FAMILIES = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
    "starcoder2",
)  # fmt: skip
"""Families that runner/layouts.py cuts into stages; a test compares the two lists."""


@rule(
    "runner_trains_causal_models",
    "runner",
    "the runner's one objective is causal language modelling",
    lambda s, x: f"outlay run trains causal language models only; {x.spec.family} is none",
)
def runner_trains_causal_models(c: Candidates, x: Context) -> Array:
    causal = all(block.attention.causal for block in x.spec.blocks)
    return np.full(len(c), x.spec.encoder_decoder or not causal or not x.spec.has_head)


@rule(
    "qlora_without_zero_init",
    "runner",
    "bitsandbytes-foundation/bitsandbytes#1249: zero.Init does not split quantized weights; runner/engine.py "
    "builds every ZeRO-3 model inside it",
    lambda s, x: (
        f"QLoRA with ZeRO-{s.zero}: the frozen weights are quantized, and zero.Init cannot split them; use --zero 2"
    ),
)
def qlora_without_zero_init(c: Candidates, x: Context) -> Array:
    quantized = x.job.finetune is not None and x.job.finetune.quant != "none"
    return np.asarray((c.zero == 3) & quantized)


ROWS = (".jsonl", ".ndjson", ".csv", ".parquet")


@rule(
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


@rule(
    "runner_pipelines_its_families",
    "runner",
    "runner/layouts.py knows the layout of " + ", ".join(PIPELINE_FAMILIES),
    lambda s, x: f"outlay run does not cut {x.spec.family} into pipeline stages yet (pp {s.pp})",
)
def runner_pipelines_its_families(c: Candidates, x: Context) -> Array:
    return np.asarray((c.pp > 1) & (x.spec.family not in PIPELINE_FAMILIES))

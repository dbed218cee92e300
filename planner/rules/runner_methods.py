"""What `outlay run` does not execute of optimizers, adapters and losses, one function a rule."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.method_flags import CAPPED_FAMILY
from outlay.planner.rules.core import Context, rule

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "lion", "muon", "adafactor", "adamw_8bit")
"""Those that runner/optimizers.py and DeepSpeed build; a test trains each."""


@rule(
    "runner_builds_its_optimizers",
    "runner",
    "runner/optimizers.py builds " + ", ".join(OPTIMIZERS) + "; LAMB's and paged Adam's kernels are CUDA's "
    "alone and were never tried",
    lambda s, x: f"outlay run does not train with {x.job.optimizer.name}: use {', '.join(OPTIMIZERS)}",
)  # fmt: skip
def runner_builds_its_optimizers(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.job.optimizer.name not in OPTIMIZERS)


@rule(
    "adafactor_needs_whole_matrices",
    "runner",
    "runtime/zero/stage_1_and_2.py, stage3.py: ZeRO steps flat partitions, and Adafactor's rows, columns and "
    "clipping belong to whole matrices (arXiv 1804.04235)",
    lambda s, x: f"adafactor with ZeRO-{s.zero} would not be Adafactor: use --zero 0",
)
def adafactor_needs_whole_matrices(c: Candidates, x: Context) -> Array:
    return np.asarray((c.zero > 0) & (x.job.optimizer.name == "adafactor"))


@rule(
    "muon_steps_whole_matrices",
    "runner",
    "deepspeed/runtime/zero/muon: partitions are put together for data parallel alone; tried with dp",
    lambda s, x: (
        f"outlay run does not train with muon at tp {s.tp}, pp {s.pp}, sp {s.sp}, ep {s.ep}"
    ),
)
def muon_steps_whole_matrices(c: Candidates, x: Context) -> Array:
    spread = (c.tp > 1) | (c.pp > 1) | (c.sp > 1) | (c.ep > 1)
    return np.asarray(spread & (x.job.optimizer.name == "muon"))


@rule(
    "muon_is_not_clipped",
    "runner",
    "runtime/zero/stage3.py, `_apply_muon_to_accumulated_grads`: with ZeRO the norm is taken of Muon's update, not "
    "of the gradient; at a clipping of 1 and ZeRO-1 a step was 30 times too small (tried)",
    lambda s, x: (
        f"gradient_clipping {x.job.gradient_clipping:g} with muon at ZeRO-{s.zero} would clip Muon's update: use "
        "--gradient-clipping 0, or --zero 0"
    ),
)
def muon_is_not_clipped(c: Candidates, x: Context) -> Array:
    clips = x.job.optimizer.name == "muon" and x.job.gradient_clipping > 0
    return np.asarray((c.zero > 0) & clips)


@rule(
    "loss_of_whole_sequences",
    "runner",
    "runner/loss.py: a rank of tensor or sequence parallel has a part of the logits only",
    lambda s, x: f"outlay run does not execute the {s.loss} loss with tp {s.tp}, sp {s.sp}",
)
def loss_of_whole_sequences(c: Candidates, x: Context) -> Array:
    return np.asarray((c.loss > 0) & ((c.tp > 1) | (c.sp > 1)))


ADAPTED = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo", "olmo2", "opt", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
"""Families whose query and value projections runner/adapters.py finds; a test compares the two lists."""

QUANTIZED = tuple(f for f in ADAPTED if f not in ("gpt2", "mixtral", "qwen2_moe", "qwen3_moe"))
"""Of these, those whose blocks are linear layers that bitsandbytes quantizes (runner/quantized.py)."""


@rule(
    "runner_adapts_with_lora",
    "runner",
    "runner/adapters.py: peft's LoRA on the query and value projections; runner/quantized.py: NF4 of linear "
    "layers, not of transposed ones (GPT-2) nor of stacked experts",
    lambda s, x: (
        f"outlay run does not train {_method(x)} of {x.spec.family}: it trains lora and dora of {', '.join(ADAPTED)}, "
        f"qlora of the same but {', '.join(sorted({*ADAPTED} - {*QUANTIZED}))}; "
        "`plan` and `size` take the others with --for deepspeed"
    ),
)
def runner_adapts_with_lora(c: Candidates, x: Context) -> Array:
    how = x.job.finetune
    if how is None:
        return np.zeros(len(c), bool)
    families = {"none": ADAPTED, "nf4": QUANTIZED, "nf4-dq": QUANTIZED}.get(how.quant, ())
    known = how.method == "lora" or (how.method == "dora" and how.quant == "none")
    return np.full(len(c), not known or x.spec.family not in families)


def _method(x: Context) -> str:
    how = x.job.finetune
    if how is None:
        return "all weights"
    return how.method if how.quant == "none" else f"{how.method} over {how.quant} weights"


@rule(
    "dora_reads_whole_weights",
    "runner",
    "peft/tuners/lora/dora.py reads the frozen weight outside of its own module, where ZeRO-3 has not gathered it",
    lambda s, x: f"outlay run does not train dora at ZeRO-{s.zero}: use --zero 2, or lora",
)
def dora_reads_whole_weights(c: Candidates, x: Context) -> Array:
    how = x.job.finetune
    return np.asarray((c.zero == 3) & (how is not None and how.method == "dora"))


@rule(
    "adapters_with_data_parallel",
    "runner",
    "runner/adapters.py: peft wraps whole modules; stages, slices and experts are cut from the plain ones",
    lambda s, x: (
        f"outlay run trains adapters data parallel alone, not at tp {s.tp}, pp {s.pp}, sp {s.sp}, ep {s.ep}"
    ),
)
def adapters_with_data_parallel(c: Candidates, x: Context) -> Array:
    spread = (c.tp > 1) | (c.pp > 1) | (c.sp > 1) | (c.ep > 1)
    return np.asarray(spread & (x.job.finetune is not None))


@rule(
    "adapters_stay_on_the_device",
    "runner",
    "offload of adapters was not tried: their states are a thousandth of the weights'",
    lambda s, x: "outlay run trains adapters without offload",
)
def adapters_stay_on_the_device(c: Candidates, x: Context) -> Array:
    away = (c.offload_optimizer > 0) | (c.offload_param > 0)
    return np.asarray(away & (x.job.finetune is not None))


@rule(
    "sdpa_has_no_capped_scores",
    "runner",
    "transformers refuses it (Gemma2ForCausalLM): scaled_dot_product_attention caps no scores",
    lambda s, x: (
        f"attention {x.job.attention} does not exist for {x.spec.family}: use --attention eager"
    ),
)
def sdpa_has_no_capped_scores(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.spec.family == CAPPED_FAMILY and x.job.attention == "sdpa")


@rule(
    "compiles_whole_blocks",
    "runner",
    "runner/engine.py compiles blocks whose weights are there as a whole; ZeRO-3's hooks gather them inside of a "
    "block, slices and adapters replace its layers: those were not tried",
    lambda s, x: (
        f"outlay run does not compile at ZeRO-{s.zero}, tp {s.tp}, sp {s.sp}, ep {s.ep}, nor adapters or what is "
        "compressed: use --no-compile, or ZeRO 0 to 2 data parallel or in a pipeline"
    ),
)
def compiles_whole_blocks(c: Candidates, x: Context) -> Array:
    changed = x.job.finetune is not None or x.job.compress is not None
    spread = (c.zero == 3) | (c.tp > 1) | (c.sp > 1) | (c.ep > 1)
    return np.asarray(x.job.compile & (changed | spread))


METHOD_RULES = (
    "runner_builds_its_optimizers", "adafactor_needs_whole_matrices", "muon_steps_whole_matrices",
    "muon_is_not_clipped", "loss_of_whole_sequences", "runner_adapts_with_lora", "adapters_with_data_parallel",
    "adapters_stay_on_the_device", "sdpa_has_no_capped_scores", "qlora_without_zero_init",
    "compiles_whole_blocks", "dora_reads_whole_weights",
)  # fmt: skip
"""Rules of optimizers, losses and adapters: runner/refuse.py reads them again before an engine is built."""

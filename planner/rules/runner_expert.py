"""What `outlay run` does not execute of expert parallel and of mixtures of experts, one function a rule."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import LOSS, Array, Candidates
from outlay.planner.rules.core import Context, rule

EXPERT_PARALLEL_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Families whose experts runner/parallel/expert.py spreads; a test trains each."""
EXPERT_RULES = (
    "runner_spreads_its_families",
    "experts_without_zero_3",
    "experts_with_data_parallel_alone",
    "half_precision_experts_with_zero",
    "experts_are_not_compressed",
    "router_loss_of_whole_models",
    "capacity_of_spread_experts",
)
"""Those of this file; the runner refuses by them too (runner/refuse.py)."""


@rule(
    "runner_spreads_its_families",
    "runner",
    "runner/parallel/expert.py spreads the experts of " + ", ".join(EXPERT_PARALLEL_FAMILIES),
    lambda s, x: (
        f"outlay run does not train {x.spec.family} expert parallel (ep {s.ep}); it spreads "
        + ", ".join(EXPERT_PARALLEL_FAMILIES)
    ),
)
def runner_spreads_its_families(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep > 1) & (x.spec.family not in EXPERT_PARALLEL_FAMILIES))


@rule(
    "experts_without_zero_3",
    "runner",
    "runtime/engine.py, `_validate_zero3_moe_compatibility`: no experts at stage 3 but those of AutoEP, which "
    "builds every expert on every rank first",
    lambda s, x: f"outlay run does not execute ep {s.ep} at ZeRO-{s.zero}: use --zero 2",
)
def experts_without_zero_3(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep > 1) & (c.zero == 3))


@rule(
    "experts_with_data_parallel_alone",
    "runner",
    "runner/parallel/expert.py cuts whole blocks, on ranks with batches of their own",
    lambda s, x: (
        f"outlay run does not combine expert parallel (ep {s.ep}) with pp {s.pp}, tp {s.tp}, sp {s.sp}"
    ),
)
def experts_with_data_parallel_alone(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep > 1) & ((c.pp > 1) | (c.tp > 1) | (c.sp > 1)))


@rule(
    "half_precision_experts_with_zero",
    "runner",
    "runtime/fp16/unfused_optimizer.py knows no experts: its norm would be of one rank's alone",
    lambda s, x: f"ep {s.ep} in {x.job.precision} at ZeRO-0 is not run: use --zero 1",
)
def half_precision_experts_with_zero(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep > 1) & (c.zero == 0) & (x.job.precision in ("bf16", "fp16")))


@rule(
    "experts_are_not_compressed",
    "runner",
    "runner/compress reads whole matrices of whole layers; spread experts were not tried",
    lambda s, x: f"outlay run does not prune, quantize or distil at ep {s.ep}: use --ep 1",
)
def experts_are_not_compressed(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep > 1) & (x.job.compress is not None))


@rule(
    "router_loss_of_whole_models",
    "runner",
    "runner/loss.py reads it from the outputs of transformers' whole model: not from a stage's, not from a loss "
    "without logits, not in a distillation",
    lambda s, x: (
        f"{x.spec.name} asks for its router's load-balance loss (output_router_logits), which outlay run does not "
        f"add with pp {s.pp}, loss {s.loss} or a teacher: --pp 1 --loss plain"
    ),
)
def router_loss_of_whole_models(c: Candidates, x: Context) -> Array:
    teacher = x.job.compress is not None and x.job.compress.distill is not None
    spread = (c.pp > 1) | (c.loss == LOSS.index("chunked")) | teacher
    return np.asarray(spread & x.spec.router_loss)


@rule(
    "capacity_of_spread_experts",
    "runner",
    "runner/parallel/expert.py drops tokens where they are sent to other ranks; transformers' own experts take all",
    lambda s, x: (
        f"expert_capacity {x.job.expert_capacity} drops tokens of spread experts, and ep is {s.ep}: plan with --ep 2 "
        "or more, or without a capacity"
    ),
)
def capacity_of_spread_experts(c: Candidates, x: Context) -> Array:
    return np.asarray((c.ep == 1) & (x.job.expert_capacity is not None))

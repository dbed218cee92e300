"""What this runner does not run, refused before any memory is taken, with the difference."""

from __future__ import annotations

from outlay.planner.rules import OFFLOADED, Context, broken
from outlay.planner.rules.runner_compress import COMPRESS_RULES
from outlay.planner.rules.runner_distill import DISTILL_RULES
from outlay.planner.rules.runner_expert import EXPERT_RULES
from outlay.planner.rules.runner_methods import METHOD_RULES
from outlay.planner.rules.runner_parallel import PARALLEL_RULES
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.plan import Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError

_ONE_ONLY = {
    "cp": "context parallel",
    "vpp": "virtual pipeline stages",
}


def refuse(plan: Plan, world: int, accelerator: str) -> None:
    """Raise UsageError where the plan cannot be run by these ranks; `accelerator`: cpu, cuda …"""
    _refuse_strategy(plan, world)
    _refuse_precision(plan, accelerator)
    _refuse_mismatch(plan)


def _refuse_strategy(plan: Plan, world: int) -> None:
    strategy = plan.strategy
    if strategy.world != world:
        raise UsageError(
            f"the plan is for {strategy.world} ranks ({strategy.label()}), this run has {world}",
            do=f"start {strategy.world} ranks, or plan for {world}",
        )
    for key, what in _ONE_ONLY.items():
        if getattr(strategy, key) > 1:
            raise UsageError(
                f"{what} ({key}={getattr(strategy, key)}) is not run yet", do="plan with 1"
            )
    _refuse_parallel(plan)
    if strategy.sequence_parallel:
        raise UsageError("sequence_parallel (Megatron's) is estimated only", do="plan without it")
    if strategy.activation_checkpointing == "selective":
        raise UsageError(
            "selective activation checkpointing is estimated only",
            do="plan with activation_checkpointing: full or none",
        )
    _refuse_offload(strategy, plan.job.optimizer.name)
    if strategy.pp > 1 and strategy.zero > 1:
        raise UsageError(
            f"a pipeline of {strategy.pp} stages does not go with ZeRO-{strategy.zero}",
            why="DeepSpeed's pipeline accumulates whole gradients; it takes ZeRO 0 or 1",
            do="plan with zero: 1, or pp: 1",
        )


def _refuse_parallel(plan: Plan) -> None:
    """By the planner's own rules: what they let through must run."""
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=plan.model.source)
    context = Context(spec=spec, job=plan.job, cluster=plan.cluster)
    for rule, message in broken(plan.strategy, context, kinds=("runner",)):
        if rule.name in (*PARALLEL_RULES, *EXPERT_RULES):
            raise UsageError(message, why=rule.evidence, do="plan again: no plan has it")
        if rule.name in (*METHOD_RULES, *COMPRESS_RULES, *DISTILL_RULES):
            raise UsageError(
                message, why=f"{rule.name}: {rule.evidence}", do="plan again without it"
            )


def _refuse_offload(strategy: Strategy, name: str) -> None:
    """To the host run: the optimizer at ZeRO 1 to 3, the weights with it at ZeRO-3; to NVMe at ZeRO-3."""
    optimizer, weights = strategy.offload_optimizer, strategy.offload_param
    if "nvme" in (optimizer, weights) and strategy.zero != 3:
        raise UsageError(
            f"offload to NVMe is not run with ZeRO-{strategy.zero}",
            why="DeepSpeed keeps the states in memory below stage 3",
            do="plan with zero: 3, or with cpu",
        )
    if weights == "nvme" and optimizer != "nvme":
        raise UsageError(
            f"offload_param nvme is not run with offload_optimizer {optimizer}",
            do="plan with offload_optimizer: nvme",
        )
    if optimizer != "none" and (strategy.zero == 0 or strategy.pp > 1):
        raise UsageError(
            f"offload_optimizer {optimizer} is not run with ZeRO-{strategy.zero} and pp {strategy.pp}",
            do="plan with zero: 1, 2 or 3 and pp: 1",
        )
    if optimizer != "none" and name not in OFFLOADED:
        raise UsageError(
            f"offload_optimizer {optimizer} is not run with optimizer {name}",
            why="DeepSpeed steps Adam alone on the host",
            do="plan with adamw, or without offload",
        )
    if weights != "none" and (strategy.zero != 3 or optimizer == "none"):
        raise UsageError(
            f"offload_param {weights} is run at ZeRO-3 together with offload_optimizer, "
            f"not at ZeRO-{strategy.zero} with offload_optimizer {optimizer}",
            do="plan with zero: 3 and offload_optimizer: cpu",
        )


def _refuse_precision(plan: Plan, accelerator: str) -> None:
    precision = plan.job.precision
    if precision == "fp8":
        raise UsageError("precision fp8 is estimated only", do="plan with bf16")
    if accelerator == "cpu" and precision in ("fp16", "tf32"):
        raise UsageError(
            f"precision {precision} does not exist on CPU", do="plan with fp32 or bf16"
        )
    if accelerator == "cpu" and plan.job.attention == "flash":
        raise UsageError("attention flash needs a GPU", do="plan with attention: sdpa")
    for key in ("bf16", "fp16"):
        enabled = bool(plan.deepspeed.get(key, {}).get("enabled", False))
        if enabled != (precision == key):
            raise UsageError(
                f"the job says {precision}, the plan's deepspeed section has {key}.enabled: "
                f"{str(enabled).lower()}",
                do="plan again, or make both say the same",
            )


def _refuse_mismatch(plan: Plan) -> None:
    """A plan is a file that people edit: its two halves must say the same."""
    strategy, config = plan.strategy, plan.deepspeed
    expected = {
        "train_batch_size": strategy.global_batch,
        "train_micro_batch_size_per_gpu": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.grad_accum,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UsageError(
                f"deepspeed.{key} is {config[key]}, the strategy makes it {value}",
                why=f"{strategy.label()}: global batch = micro_batch·grad_accum·dp",
                do="plan again, or make both say the same",
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != strategy.zero:
        raise UsageError(
            f"deepspeed.zero_optimization.stage is {stage}, the strategy says ZeRO-{strategy.zero}",
            do="plan again, or make both say the same",
        )

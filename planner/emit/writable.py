"""What is refused before a plan is written for another program: what its format could not say."""

from __future__ import annotations

from outlay.planner.emit.optimizer import OWN
from outlay.planner.rules import Context, broken
from outlay.planner.rules.emitted import PRECISIONS
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError


def writable_spec(plan: Plan, where: str, nvme_path: str | None) -> ModelSpec:
    """The plan's model, once the plan is known to be one that DeepSpeed runs as its JSON says.

    Raises UsageError for a broken rule, an offload to NVMe without its folder, and a precision that
    the JSON has no words for.
    """
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=where)
    context = Context(spec=spec, job=plan.job, cluster=plan.cluster)
    problems = broken(plan.strategy, context, kinds=("arithmetic", "deepspeed"))
    if problems:
        rule, message = problems[0]
        raise UsageError(message, where=where, why=f"{rule.name}: {rule.evidence}")
    on_nvme = "nvme" in (plan.strategy.offload_optimizer, plan.strategy.offload_param)
    if on_nvme and nvme_path is None:
        raise UsageError(
            "the plan offloads to NVMe, and no folder on the drive is named",
            where=where,
            why="DeepSpeed needs nvme_path beside device: nvme",
            do="pass --nvme-path, a folder on the drive of every node",
        )
    if nvme_path is not None and not on_nvme:
        raise UsageError("the plan offloads nothing to NVMe", where="--nvme-path")
    if plan.job.optimizer.name in OWN:
        raise UsageError(
            f"DeepSpeed's JSON has no name for optimizer {plan.job.optimizer.name}", where=where,
            why="`outlay run` builds it itself", do="plan with adamw, or run the plan with `outlay run`",
        )  # fmt: skip
    if plan.job.precision not in PRECISIONS:
        raise UsageError(
            f"DeepSpeed's JSON has no words for {plan.job.precision}",
            where=where,
            do=f"plan with one of {', '.join(PRECISIONS)}",
        )
    return spec

"""Whether a plan can run here: looked at before any rank starts, refused with the numbers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from outlay.planner.compression import check_job
from outlay.planner.rules import VERSIONS, Context, broken
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import MissingExtra, NotFeasible, UsageError
from outlay.profiles.units import format_bytes
from outlay.runner.needs import check_needs

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "tensorboard")
DEEPSPEED = ((0, 19, 8), (0, 20))
"""From, below: the releases whose configuration and checkpoints this runner knows (planner/rules)."""


def check_software() -> None:
    """The right DeepSpeed, without importing it."""
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            raise MissingExtra(package, "run") from None
        first, beyond = DEEPSPEED
        if package == "deepspeed" and not first <= _release(found) < beyond:
            raise UsageError(
                f"DeepSpeed {found} is installed, and this runner knows {VERSIONS}",
                why="configuration keys and checkpoints differ between its releases",
                do="pip install 'outlay[run]'",
            )


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())


def _check_torchao(plan: Plan) -> None:
    if plan.job.compress is None or plan.job.compress.qat is None:
        return
    try:
        version("torchao")
    except PackageNotFoundError:
        raise MissingExtra("torchao", "compress") from None


def check_rules(plan: Plan) -> None:
    """Refuse a plan, edited by hand perhaps, that DeepSpeed or the runner would not execute."""
    spec = spec_from_config(plan.model.config, name=plan.model.name, source="plan.yaml")
    problems = broken(plan.strategy, Context(spec=spec, job=plan.job, cluster=plan.cluster))
    if problems:
        rule, message = problems[0]
        raise UsageError(message, where="strategy", why=f"{rule.name}: {rule.evidence}")
    check_job(plan.job, spec)
    _check_torchao(plan)
    check_needs(plan)
    stage = plan.deepspeed.get("zero_optimization", {}).get("stage")
    if stage != plan.strategy.zero:
        raise UsageError(
            f"deepspeed.zero_optimization.stage is {stage}, strategy.zero is {plan.strategy.zero}",
            do="edit both, or plan again with --zero",
        )
    if plan.job.seq_len > spec.max_positions > 0:
        raise UsageError(
            f"job.seq_len {plan.job.seq_len} exceeds the {spec.max_positions} positions of the model",
            do="shorten it, or raise max_position_embeddings in model.config",
        )


def check_machine(plan: Plan, here: Cluster) -> None:
    """Refuse a plan for other or more hardware than `here`, a fresh probe of this machine."""
    if plan.cluster.nodes > 1:
        raise NotFeasible(
            f"the plan is for {plan.cluster.nodes} nodes",
            why="this command starts ranks on one node",
            do="plan for one node, or start `python -m outlay.runner.rank RUN` with torchrun",
        )
    if (plan.cluster.kind == "gpu") != (here.kind == "gpu"):
        raise NotFeasible(
            f"the plan is for {plan.cluster.accelerator.name}, "
            f"this machine has {here.accelerator.name}",
            do="plan again with --hardware probe",
        )
    if here.kind == "gpu":
        _check_gpus(plan, here)
    else:
        _check_host(plan, here)


def _check_gpus(plan: Plan, here: Cluster) -> None:
    ranks, gpus = plan.strategy.world, here.gpus
    if ranks > len(gpus):
        raise NotFeasible(
            f"the plan needs {ranks} GPUs, this machine has {len(gpus)}",
            do="plan again with --hardware probe",
        )
    needed = _needed_bytes(plan)
    for gpu in gpus[:ranks]:
        if needed is not None and needed > gpu.free_bytes:
            raise NotFeasible(
                f"GPU {gpu.index} ({gpu.name}) has too little free memory for this plan",
                why=f"at least {format_bytes(needed)} are needed, "
                f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} are free",
                do="end what else uses it, or plan again with --hardware probe",
            )


def _check_host(plan: Plan, here: Cluster) -> None:
    ranks, host, needed = plan.strategy.world, here.host, _needed_bytes(plan)
    if host is None:
        return
    if ranks > host.cores:
        raise NotFeasible(
            f"the plan has {ranks} ranks, this machine has {host.cores} usable cores",
            do="plan again with --hardware probe",
        )
    if needed is not None and ranks * needed > host.available_bytes:
        raise NotFeasible(
            "this machine has too little free memory for this plan",
            why=f"{ranks} ranks of at least {format_bytes(needed)} are "
            f"{format_bytes(ranks * needed)}, {format_bytes(host.available_bytes)} are free",
            do="end what else uses it, or plan again with --hardware probe",
        )


def _needed_bytes(plan: Plan) -> float | None:
    """The low end of the estimate for one rank: with less it surely fails. Null: unknown."""
    value = plan.estimate.get("memory", {}).get("low_bytes")
    return None if value is None else float(value)

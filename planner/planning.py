"""Job + hardware → Plan: search, choose, explain, generate the DeepSpeed configuration."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.exported import require_export_size
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.reasons import by_search, gains, limited_by
from outlay.planner.search import SearchResult, alternatives, search
from outlay.planner.space import TARGETS
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import check_schema, parse, read_mapping
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import SCHEMA_PLAN, ModelSource, Plan
from outlay.profiles.errors import NotFeasible
from outlay.profiles.units import format_seconds


def make_plan(
    spec: ModelSpec,
    config: dict[str, Any],
    job: Job,
    cluster: Cluster,
    *,
    fixed: dict[str, int] | None = None,
    assumptions: list[dict[str, Any]] | None = None,
    weights: str | None = None,
    target: str = "runner",
    deadline_s: float | None = None,
    with_gains: bool = False,
) -> Plan:
    """The best strategy that fits. Raises NotFeasible. `with_gains`: search again for what more of
    each thing would give."""
    require_export_size(spec, job)
    result = search(spec, job, cluster, fixed, target=TARGETS[target])
    best = result.best_index
    check_deadline(result, job, cluster, deadline_s)
    more = gains(cluster, by_search(spec, job, fixed or {}, result.target)) if with_gains else ()
    estimate = estimate_dict(spec, job, cluster, result.estimates, best)
    estimate["assumptions"] = (assumptions or []) + estimate["assumptions"]
    strategy = result.best
    return Plan(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        outlay_version=version("outlay"),
        model=ModelSource(
            name=spec.name,
            source=spec.source,
            parameters=parameter_counts(spec).total,
            config=config,
            weights=weights,
        ),
        job=job,
        cluster=cluster,
        strategy=strategy,
        estimate=estimate,
        deepspeed=deepspeed_config(job, strategy, spec, cluster) if target != "megatron" else {},
        considered=result.considered,
        feasible=len(result.order),
        alternatives=alternatives(result, cluster),
        target=target,
        legal=result.legal,
        limited_by=limited_by(more) if more else None,
        gains=more,
    )


def check_deadline(
    result: SearchResult, job: Job, cluster: Cluster, deadline_s: float | None
) -> None:
    """Raise NotFeasible where even the fastest strategy is expected to end later."""
    e = result.estimates
    if deadline_s is None or e.step is None or e.step_high is None:
        return
    step_s, high_s = float(e.step.time_s[result.best_index]), float(e.step_high[result.best_index])
    whole_s = step_s * job.steps
    if whole_s > deadline_s:
        raise NotFeasible(
            f"the deadline of {format_seconds(deadline_s)} cannot be kept on {cluster.ranks} x "
            f"{cluster.accelerator.title}",
            where="--deadline",
            why=f"the fastest strategy ({result.best.label()}) takes {format_seconds(whole_s)} "
            f"(up to {format_seconds(high_s * job.steps)}) for {job.steps:,} steps",
            do=f"about {whole_s / deadline_s:.1f} times the hardware (`outlay size` finds it), fewer "
            "tokens, or a later deadline",
        )


def read_plan(path: str | Path) -> Plan:
    """A plan file. Raises FileError with the line and key of what is wrong."""
    value = read_mapping(path)
    check_schema(value, SCHEMA_PLAN, path)
    return parse(Plan, value, path=path)

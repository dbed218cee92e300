"""Job + hardware → Plan: search, choose, explain, generate the DeepSpeed configuration."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.estimator import estimate_dict
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.search import alternatives, search
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import check_schema, parse, read_mapping
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import SCHEMA_PLAN, ModelSource, Plan


def make_plan(
    spec: ModelSpec,
    config: dict[str, Any],
    job: Job,
    cluster: Cluster,
    *,
    fixed: dict[str, int] | None = None,
    assumptions: list[dict[str, Any]] | None = None,
    weights: str | None = None,
) -> Plan:
    """The best strategy that fits. Raises NotFeasible."""
    result = search(spec, job, cluster, fixed)
    best = int(result.order[0])
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
        deepspeed=deepspeed_config(job, strategy, spec, cluster),
        considered=result.considered,
        feasible=len(result.order),
        alternatives=alternatives(result, cluster),
    )


def read_plan(path: str | Path) -> Plan:
    """A plan file. Raises FileError with the line and key of what is wrong."""
    value = read_mapping(path)
    check_schema(value, SCHEMA_PLAN, path)
    return parse(Plan, value, path=path)

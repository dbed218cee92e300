"""Enumerate strategies → rules → estimate → rank → explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.estimator import Estimates, evaluate
from outlay.planner.estimate.interval import TIGHT_RISK, VERDICTS
from outlay.planner.rules import Context, allowed, broken
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Alternative
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Legal candidates, estimated; `order` lists those that fit, best first."""

    estimates: Estimates
    order: Array
    considered: int

    @property
    def best(self) -> Strategy:
        return self.estimates.candidates.strategy(int(self.order[0]))


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0] if n < 4096 else _divisors_large(n)


def _divisors_large(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def candidates_for(job: Job, cluster: Cluster, fixed: dict[str, int]) -> Candidates:
    """The whole space: dp and grad_accum follow from world and batch. ZeRO > 0 needs dp > 1."""
    axes = {
        "zero": [0, 1, 2, 3],
        "pp": divisors(cluster.ranks),
        "micro_batch": divisors(job.global_batch),
        "activation_checkpointing": [0, 2],
    }
    axes |= {k: [v] for k, v in fixed.items() if k not in ("dp", "grad_accum")}
    c = Candidates.grid(**axes)
    model_parallel = c.tp * c.pp * c.cp * c.sp
    dp = cluster.ranks // model_parallel
    accum = job.global_batch // np.maximum(c.micro_batch * dp, 1)
    c = Candidates(**(_columns(c) | {"dp": dp, "grad_accum": accum}))
    keep = (c.dp >= 1) & (c.micro_batch * accum * dp == job.global_batch)
    keep &= (c.zero == 0) | (c.dp > 1) | ("zero" in fixed)
    for key in ("dp", "grad_accum"):
        if key in fixed:
            keep &= getattr(c, key) == fixed[key]
    return c.take(keep)


def _columns(c: Candidates) -> dict[str, Array]:
    return {name: getattr(c, name) for name in Candidates.__dataclass_fields__}


def search(
    spec: ModelSpec, job: Job, cluster: Cluster, fixed: dict[str, int] | None = None
) -> SearchResult:
    """Best strategy first. Raises NotFeasible where nothing is legal or nothing fits."""
    context = Context(spec=spec, job=job, cluster=cluster)
    space = candidates_for(job, cluster, fixed or {})
    legal = space.take(allowed(space, context)) if len(space) else space
    if not len(legal):
        raise _nothing_legal(space, context, fixed or {})
    estimates = evaluate(spec, job, cluster, legal)
    if estimates.step is None:
        raise UsageError(
            f"no speed is known for {cluster.accelerator.name} in {job.precision}, so strategies cannot be ranked",
            do="measure it: `outlay probe --measure --out cluster.yaml`, then `--hardware cluster.yaml`",
        )
    fits = np.flatnonzero(estimates.risk <= TIGHT_RISK)
    if not fits.size:
        raise _nothing_fits(estimates, cluster)
    # Fastest first; of those within half a per cent, the one that leaves more memory.
    seconds = np.round(np.log(estimates.step.time_s[fits]) / 0.005)
    order = fits[np.lexsort((estimates.memory.device[fits], seconds))]
    return SearchResult(estimates=estimates, order=order, considered=len(space))


def _nothing_legal(
    space: Candidates, x: Context, fixed: dict[str, int]
) -> UsageError | NotFeasible:
    ranks, batch = x.cluster.ranks, x.job.global_batch
    if not len(space):
        return UsageError(
            f"no strategy closes: {ranks} ranks, global batch {batch}"
            + "".join(f", {k} {v}" for k, v in fixed.items()),
            why="world = dp·tp·pp·cp·sp, and global_batch = micro_batch·grad_accum·dp",
            do=f"use a global batch that {ranks} divides, or another number of ranks",
        )
    rule, message = broken(space.strategy(0), x)[0]
    return NotFeasible(
        f"all {len(space)} strategies break a rule; the first: {message}",
        why=f"{rule.name}: {rule.evidence}",
    )


def _nothing_fits(e: Estimates, cluster: Cluster) -> NotFeasible:
    least = int(np.argmin(e.memory.device))
    strategy = e.candidates.strategy(least)
    parts = sorted(e.memory.parts.items(), key=lambda kv: -float(kv[1][least]))[:3]
    biggest = ", ".join(f"{name} {format_bytes(float(v[least]))}" for name, v in parts)
    return NotFeasible(
        f"none of {len(e)} strategies fits with at most {TIGHT_RISK:.0%} risk of running out of memory",
        why=f"the smallest ({strategy.label()}) needs {format_bytes(float(e.memory.device[least]))} "
        f"({format_bytes(float(e.memory_low[least]))} to {format_bytes(float(e.memory_high[least]))}) "
        f"of {format_bytes(cluster.usable_bytes)} a rank: {biggest}",
        do="more ranks, a shorter --seq-len, or a smaller model",
    )


def explain(result: SearchResult, cluster: Cluster, i: int) -> str:
    """Why candidate `i` lost against the best: how much slower, mostly in which part."""
    e, best = result.estimates, int(result.order[0])
    if e.risk[i] > TIGHT_RISK:
        return (
            f"{VERDICTS[int(e.verdict[i])]}: needs {format_bytes(float(e.memory.device[i]))} "
            f"(to {format_bytes(float(e.memory_high[i]))}) of {format_bytes(cluster.usable_bytes)}, "
            f"{float(e.risk[i]):.0%} risk of running out of memory"
        )
    assert e.step is not None
    times, parts = e.step.time_s, e.step.parts
    slower = float(times[i] / times[best] - 1)
    if slower < 0.005:
        more = format_bytes(float(e.memory.device[i] - e.memory.device[best]))
        return f"as fast within 0.5 %, {more} more memory"
    part, values = max(parts.items(), key=lambda kv: float(kv[1][i] - kv[1][best]))
    extra = float(values[i] - values[best])
    return f"{slower:.1%} slower, mostly {part.replace('_', ' ')} (+{format_seconds(extra)} a step)"


def alternatives(
    result: SearchResult, cluster: Cluster, count: int = 12
) -> tuple[Alternative, ...]:
    """The next best that fit; then, of those that would be faster but do not fit, the smallest."""
    e = result.estimates
    assert e.step is not None
    others = [int(i) for i in result.order[1 : count + 1]]
    fastest = float(e.step.time_s[int(result.order[0])])
    refused = np.flatnonzero((e.risk > TIGHT_RISK) & (e.step.time_s < fastest))
    refused = refused[np.argsort(e.memory.device[refused])][:3]
    rows = []
    for i in [*others, *(int(i) for i in refused)]:
        rows.append(
            Alternative(
                strategy=e.candidates.strategy(i),
                verdict=VERDICTS[int(e.verdict[i])],
                step_s=float(e.step.time_s[i]),
                device_bytes=float(e.memory.device[i]),
                why=explain(result, cluster, i),
            )
        )
    return tuple(rows)

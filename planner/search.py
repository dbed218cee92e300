"""Enumerate strategies → rules → memory → time → rank → explain.

Memory comes before time: what would run out of memory with more than 5 % probability is dropped before
any second is computed, which changes nothing of the answer (tested against brute force).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.estimator import Estimates, evaluate_memory, host_of, with_step
from outlay.planner.estimate.interval import TIGHT_RISK, VERDICTS
from outlay.planner.rules import RULES, Context, Rule, broken
from outlay.planner.space import (
    TARGETS,
    Target,
    candidates_for,
    divisors,
    spread_of,
    with_small_buckets,
)
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Alternative
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_bytes, format_seconds

__all__ = ["SearchResult", "alternatives", "candidates_for", "divisors", "explain", "search"]

TIE = 0.005
"""Step times nearer than that (relative) are taken as equal: then the one that leaves more memory wins."""
_REFUSED_TIMED = 256
"""How many of those that do not fit, the smallest first, are timed for the table of alternatives."""
RUNNER_LACKS = "runner_does_not_yet"
OTHERS = "`--for deepspeed` or `--for megatron`"
_PLAIN = {"zero", "dp", "pp", "micro_batch", "grad_accum", "activation_checkpointing"}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Candidates that fit, and the smallest that do not, estimated; `order` lists those that fit, best first."""

    estimates: Estimates
    order: Array
    considered: int
    """All strategies that close over the ranks and the batch."""
    legal: int
    """Of these, what no rule of the target forbids."""
    target: Target = TARGETS["runner"]

    @property
    def best(self) -> Strategy:
        return self.estimates.candidates.strategy(int(self.order[0]))

    @property
    def best_index(self) -> int:
        return int(self.order[0])


def search(
    spec: ModelSpec,
    job: Job,
    cluster: Cluster,
    fixed: dict[str, int] | None = None,
    *,
    target: Target = TARGETS["runner"],
) -> SearchResult:
    """Best strategy first. Raises NotFeasible where nothing is legal or nothing fits."""
    fixed = fixed or {}
    legal, considered = candidates_for(spec, job, cluster, fixed, target=target)
    if not len(legal):
        raise _nothing_legal(spec, job, cluster, fixed, target)
    space, usual = with_small_buckets(spec, legal, fixed, target)
    memory = in_memory(spec, job, cluster, space, target)
    fits = np.flatnonzero(memory.risk <= TIGHT_RISK)
    if not fits.size:
        raise _nothing_fits(spec, job, memory, cluster, target)
    refused = np.flatnonzero(memory.risk > TIGHT_RISK)
    refused = refused[np.argsort(memory.memory.device[refused], kind="stable")][:_REFUSED_TIMED]
    fits = fits[~needless(memory.verdict[fits], fits, usual)]
    kept = np.concatenate([fits, refused])
    estimates = with_step(
        spec, job, cluster, memory.take(kept), software=target.software_on(cluster)
    )
    if estimates.step is None:
        raise UsageError(
            f"no speed is known for {cluster.accelerator.name} in {job.precision}, so strategies cannot be ranked",
            do="measure it: `outlay probe --measure --out cluster.yaml`, then `--hardware cluster.yaml`",
        )
    return SearchResult(
        estimates=estimates, order=ranked(estimates, fits.size), target=target,
        considered=considered + len(space) - len(legal), legal=len(space),
    )  # fmt: skip


def in_memory(
    spec: ModelSpec, job: Job, cluster: Cluster, c: Candidates, target: Target
) -> Estimates:
    """Memory and its risk; what needs more of a known host than it has carries a risk of 1."""
    return evaluate_memory(spec, job, cluster, c, software=target.software_on(cluster))


def needless(verdict: Array, rows: Array, usual: Array) -> Array:
    """Of the candidates `rows` with these verdicts, which have small buckets although the same with the usual
    ones (`usual`, of every candidate) surely fits: never faster, so never before it in `ranked`."""
    fine = np.zeros(len(usual), bool)
    fine[rows] = verdict == VERDICTS.index("ok")
    return np.asarray((usual[rows] != rows) & fine[usual[rows]])


def ranked(e: Estimates, fitting: int) -> Array:
    """The first `fitting` candidates, fastest first; within half a per cent, what stays on the accelerator
    first, then what surely fits, then the usual buckets, the plainer loss, then what takes less memory."""
    assert e.step is not None
    seconds = e.step.time_s[:fitting]
    tied = np.floor(np.log(seconds / seconds.min()) / TIE)
    c = e.candidates
    return np.lexsort((
        e.memory.device[:fitting], c.loss[:fitting], c.reduce_bucket_size[:fitting] >= 0,
        e.verdict[:fitting],
        c.offload_param[:fitting], c.offload_optimizer[:fitting], tied,
    ))  # fmt: skip


def first_of(e: Estimates) -> int:
    """The first of `ranked`, without an order of the others."""
    assert e.step is not None
    seconds = e.step.time_s
    near = np.flatnonzero(seconds <= seconds.min() * (1 + 2 * TIE))
    return int(near[ranked(e.take(near), len(near))[0]])


def fewest_broken(space: Candidates, x: Context, target: Target) -> list[tuple[Rule, str]]:
    """The rules that the nearest candidate breaks: the one that breaks the fewest."""
    if not len(space):
        return []
    rules = [rule for rule in RULES if rule.kind in target.kinds]
    count = np.sum([rule.forbids(space, x) for rule in rules], axis=0)
    return broken(space.strategy(int(np.argmin(count))), x, kinds=target.kinds)


def _nothing_legal(
    spec: ModelSpec, job: Job, cluster: Cluster, fixed: dict[str, int], target: Target
) -> UsageError | NotFeasible:
    x = Context(spec=spec, job=job, cluster=cluster)
    space = spread_of(spec, job, cluster, fixed, target)
    ranks, batch = cluster.ranks, job.global_batch
    least = fewest_broken(space, x, target)
    only_others = bool(least) and least[0][0].name == RUNNER_LACKS and not set(fixed) - _PLAIN
    if not len(space) or only_others:
        return UsageError(
            f"no strategy closes: {ranks} ranks, global batch {batch}"
            + "".join(f", {k} {v}" for k, v in fixed.items()),
            why="world = dp·tp·pp·cp·sp, and global_batch = micro_batch·grad_accum·dp",
            do=f"use a global batch that {ranks} divides, or another number of ranks"
            + (f", or plan for another trainer ({OTHERS})" if only_others else ""),
        )
    if not least:
        return UsageError(
            "no micro-batch closes"
            + "".join(f", {k} {v}" for k, v in fixed.items())
            + f" for global batch {batch}",
            why="global_batch = micro_batch·grad_accum·dp",
        )
    rule, message = least[0]
    return NotFeasible(
        f"all {len(space)} strategies break a rule; the nearest: {message}",
        why=f"{rule.name} ({rule.kind}): {rule.evidence}",
        do=f"{OTHERS} plans for another trainer" if rule.kind == "runner" else "",
    )


def _nothing_fits(
    spec: ModelSpec, job: Job, e: Estimates, cluster: Cluster, target: Target
) -> NotFeasible:
    least = int(np.argmin(e.memory.device))
    if e.memory.device[least] <= cluster.usable_bytes:
        software = target.software_on(cluster)
        need = host_of(spec, job, cluster, e.candidates, e.memory, software, e.figures)
        i = int(np.argmin(np.where(e.memory.device <= cluster.usable_bytes, need.total, np.inf)))
        return NotFeasible(
            f"none of {len(e)} strategies fits the host memory of the nodes",
            why=f"of those that the accelerators would hold, {e.candidates.strategy(i).label()} needs least: "
            f"{format_bytes(float(need.total[i]))} a node of {format_bytes(cluster.ram_bytes or 0)}",
            do="nodes with more host memory, more of them, or a smaller model",
        )
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


def _less_plain(e: Estimates, i: int, best: int) -> str:
    """Why candidate `i` is not the first although it needs less memory: in the order of `ranked`."""
    c = e.candidates
    if (
        c.offload_param[i] > c.offload_param[best]
        or c.offload_optimizer[i] > c.offload_optimizer[best]
    ):
        return "but the host holds part of it"
    if c.reduce_bucket_size[i] >= 0 > c.reduce_bucket_size[best]:
        return "but with small buckets where the usual ones fit"
    if c.loss[i] > c.loss[best]:
        return "but with a loss in pieces where a plain one fits"
    return "but slower"


def explain(result: SearchResult, cluster: Cluster, i: int) -> str:
    """Why candidate `i` lost against the best: how much slower, mostly in which part."""
    e, best = result.estimates, result.best_index
    if e.risk[i] > TIGHT_RISK:
        return (
            f"{VERDICTS[int(e.verdict[i])]}: needs {format_bytes(float(e.memory.device[i]))} "
            f"(to {format_bytes(float(e.memory_high[i]))}) of {format_bytes(cluster.usable_bytes)}, "
            f"{float(e.risk[i]):.0%} risk of running out of memory"
        )
    assert e.step is not None
    times, parts = e.step.time_s, e.step.parts
    slower = float(times[i] / times[best] - 1)
    if slower < TIE:
        more = float(e.memory.device[i] - e.memory.device[best])
        if more < 0:
            return f"as fast within 0.5 %, {format_bytes(-more)} less memory, {_less_plain(e, i, best)}"
        return f"as fast within 0.5 %, {format_bytes(more)} more memory"
    part, values = max(parts.items(), key=lambda kv: float(kv[1][i] - kv[1][best]))
    extra = float(values[i] - values[best])
    return f"{slower:.1%} slower, mostly {part.replace('_', ' ')} (+{format_seconds(extra)} a step)"


def _unlike(result: SearchResult, count: int) -> list[int]:
    """The next best, leaving out what takes the same time and memory as one already listed (a loss or an
    offload that changes nothing)."""
    e = result.estimates
    assert e.step is not None
    rows: list[int] = []
    seen = {
        (
            round(float(e.step.time_s[result.best_index]), 9),
            round(float(e.memory.device[result.best_index])),
        )
    }
    for i in result.order[1:]:
        key = (round(float(e.step.time_s[i]), 9), round(float(e.memory.device[i])))
        if key not in seen:
            seen.add(key)
            rows.append(int(i))
        if len(rows) == count:
            break
    return rows


def alternatives(
    result: SearchResult, cluster: Cluster, count: int = 12
) -> tuple[Alternative, ...]:
    """The next best that fit; then, of those that would be faster but do not fit, the smallest."""
    e = result.estimates
    assert e.step is not None
    others = _unlike(result, count)
    fastest = float(e.step.time_s[result.best_index])
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

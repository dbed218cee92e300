"""Every offer × count × strategy: what fits, how fast, with bounds that cannot lose the answer.

1. Memory first. It does not depend on who sells the accelerator, so it is computed once for a number of
   ranks and compared with what each accelerator has.
2. A bound on time: the compute of the whole model on one accelerator, at the best shape there is, shared
   by all of them without loss. Whatever is sent, recomputed or waited for comes on top.
3. Points in the order of their bounds. One whose bound is already beaten in time and money by something
   found, or breaks a limit, is not timed. What is left out is never on the front (tested).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.communication import link_domain
from outlay.planner.estimate.efficiency import Efficiency, efficiency_for
from outlay.planner.estimate.estimator import (
    Estimates,
    evaluate_memory,
    host_of,
    lacks,
    with_step,
)
from outlay.planner.estimate.interval import (
    TIGHT_RISK,
    VERDICTS,
    interval,
    risk_above,
    verdict_index,
)
from outlay.planner.estimate.tables import distinct
from outlay.planner.jobs import default_precision
from outlay.planner.rules import Context
from outlay.planner.search import fewest_broken, first_of, needless
from outlay.planner.size.offers import Offer, cluster_of_offer, node_counts, shape_of
from outlay.planner.space import (
    Target,
    candidates_for,
    divisors,
    spread_of,
    with_small_buckets,
)
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_bytes

_OF_THE_HOST = (
    "tp", "pp", "cp", "sp", "ep", "dp", "zero", "offload_optimizer", "offload_param", "reduce_bucket_size",
)  # fmt: skip
"""What the memory of a node depends on, with whether gradients are added up (estimate/host.py)."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is sized, and within what."""

    spec: ModelSpec
    job: Job
    """Its precision holds where `precision_given`; else each accelerator has its own default."""
    target: Target
    fixed: dict[str, int] = field(default_factory=dict)
    most_ranks: int
    deadline_s: float | None = None
    precision_given: bool = False


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The best strategy of one piece of hardware."""

    cluster: Cluster
    job: Job
    strategy: Strategy
    step_s: float
    step_low_s: float
    step_high_s: float
    device_bytes: float
    low_bytes: float
    high_bytes: float
    risk: float
    parts: dict[str, float]
    fitting: int
    considered: int


@dataclass(frozen=True, kw_only=True)
class TooSmall:
    """Nothing fits there: the smallest strategy that is allowed, with its numbers."""

    cluster: Cluster
    job: Job
    strategy: Strategy | None
    """Null = no strategy is allowed at all."""
    device_bytes: float
    high_bytes: float
    risk: float
    considered: int
    parts: dict[str, float] = field(default_factory=dict)
    why: str = ""
    """What binds, where it is not the accelerator's memory: a rule, or the host."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A shape of hardware at one size, and who sells it."""

    offers: tuple[Offer, ...]
    nodes: int
    cluster: Cluster
    job: Job
    bound_s: float
    """No strategy ends the whole run in less."""


class Sizer:
    """Remembers what several points share."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.considered = 0
        self.fitting = 0
        self._legal: dict[tuple[object, ...], tuple[Candidates, Array, int]] = {}
        self._memory: dict[tuple[object, ...], Estimates] = {}
        self._others: dict[tuple[str, str], Sizer] = {}
        self._floor: dict[tuple[str, str], float] = {}
        self._figures: dict[str, Efficiency] = {}

    def forget(self) -> None:
        """What was remembered holds for one batch size."""
        self._legal.clear()
        self._memory.clear()
        self._others.clear()
        self._floor.clear()

    def other(self, what: str, ask: Ask) -> Sizer:
        """Of the same question with one change, remembered under its name."""
        return self._others.setdefault((what, ask.job.precision), Sizer(ask))

    def job_on(self, cluster: Cluster) -> Job:
        if self.ask.precision_given:
            return self.ask.job
        precision = default_precision(cluster)[0]
        return dataclasses.replace(self.ask.job, precision=precision)  # type: ignore[arg-type]

    def figures(self, cluster: Cluster) -> Efficiency:
        name = cluster.accelerator.name
        if name not in self._figures:
            self._figures[name] = efficiency_for(cluster.accelerator)
        return self._figures[name]

    def _space(
        self, key: tuple[object, ...], cluster: Cluster, job: Job
    ) -> tuple[Candidates, Array, int]:
        """(every strategy that is allowed, of each the one with the usual buckets, how many were looked at)."""
        if key not in self._legal:
            ask = self.ask
            legal, looked = candidates_for(ask.spec, job, cluster, ask.fixed, target=ask.target)
            space, usual = with_small_buckets(ask.spec, legal, ask.fixed, ask.target)
            self._legal[key] = space, usual, looked + len(space) - len(legal)
        return self._legal[key]

    def memory(self, cluster: Cluster, job: Job) -> tuple[Estimates | None, Array, int]:
        """(memory of every strategy that is allowed, of each the one with the usual buckets, how many were
        looked at)."""
        ask, a = self.ask, cluster.accelerator
        key = (cluster.ranks, link_domain(cluster), cluster.kind, a.deepspeed, job.precision)
        legal, usual, looked = self._space(key, cluster, job)
        if not len(legal):
            return None, usual, looked
        figures = self.figures(cluster)
        sizes = tuple(figures[k] for k in sorted(figures) if k.startswith("memory."))
        whole = (*key, sizes)
        if whole not in self._memory:
            # Without the host: nodes that differ in it alone share this.
            bare = dataclasses.replace(
                cluster, host=None, node_ram_bytes=None, node_nvme_bytes=None
            )
            self._memory[whole] = evaluate_memory(
                ask.spec, job, bare, legal, software=ask.target.software_on(cluster)
            )
        return self._memory[whole], usual, looked

    def _hosted(self, e: Estimates, cluster: Cluster, job: Job) -> Estimates:
        """A risk of 1 for what needs more of the host than a node is known to have."""
        if cluster.kind == "cpu" or (cluster.ram_bytes is None and cluster.node_nvme_bytes is None):
            return e
        software = self.ask.target.software_on(cluster)
        added = (e.candidates.grad_accum > 1).astype(np.int64)
        first, which = distinct(e.candidates, _OF_THE_HOST, added)
        few = e.candidates.take(first)
        need = host_of(self.ask.spec, job, cluster, few, e.memory.take(first), software, e.figures)
        short = lacks(need, cluster)[which]
        risk = np.where(short, 1.0, e.risk)
        return dataclasses.replace(
            e, risk=risk, verdict=np.where(short, VERDICTS.index("no"), e.verdict)
        )

    def best(self, cluster: Cluster, job: Job) -> Timed | TooSmall | None:
        """The fastest strategy that fits with at most 5 % risk; None where the speed is unknown."""
        e, usual, looked = self.memory(cluster, job)
        if e is None:
            return TooSmall(
                cluster=cluster, job=job, strategy=None, device_bytes=0.0, high_bytes=0.0, risk=1.0,
                considered=looked, why=self._refused(cluster, job),
            )  # fmt: skip
        rows = self._inside(e, cluster)
        if not rows.size:
            smallest = self._risked(e.take(np.array([np.argmin(e.memory.device)])), cluster)
            return _too_small(self._hosted(smallest, cluster, job), cluster, job, looked)
        inside = self._risked(e.take(rows), cluster)
        hosted = self._hosted(inside, cluster, job)
        fits = np.flatnonzero(hosted.risk <= TIGHT_RISK)
        if not fits.size:
            return self._short_host(inside, cluster, job, looked)
        fits = fits[~needless(hosted.verdict[fits], rows[fits], usual)]
        software = self.ask.target.software_on(cluster)
        timed = with_step(self.ask.spec, job, cluster, hosted.take(fits), software=software)
        if timed.step is None:
            return None
        return _timed(timed, first_of(timed), cluster, job, looked)

    def _inside(self, e: Estimates, cluster: Cluster) -> Array:
        """Which of these the accelerators hold with at most 5 % risk. An expected footprint above what there
        is has a risk above a half, so only the others' is worked out."""
        width = self.figures(cluster)["interval.memory_fraction"]
        limit, least = float(cluster.usable_bytes), e.memory.least
        near = np.flatnonzero(least <= limit)
        return np.asarray(near[risk_above(least[near], limit, width) <= TIGHT_RISK])

    def _risked(self, e: Estimates, cluster: Cluster) -> Estimates:
        """The same memory against what this accelerator has."""
        figures = self.figures(cluster)
        width, limit = figures["interval.memory_fraction"], float(cluster.usable_bytes)
        risk = risk_above(e.memory.least, limit, width)
        low, high = interval(e.memory.device, width)
        return dataclasses.replace(
            e, risk=risk, memory_low=low, memory_high=high, figures=figures,
            verdict=verdict_index(risk, risk_above(e.memory.device, limit, width)),
        )  # fmt: skip

    def _short_host(self, e: Estimates, cluster: Cluster, job: Job, looked: int) -> TooSmall:
        """Of those that the accelerators would hold, the one that asks least of the host."""
        software = self.ask.target.software_on(cluster)
        need = host_of(self.ask.spec, job, cluster, e.candidates, e.memory, software, e.figures)
        i = int(np.argmin(need.total))
        there = "" if cluster.ram_bytes is None else f" of {format_bytes(cluster.ram_bytes)}"
        disks = (
            f", {format_bytes(float(need.nvme[i]))} of NVMe of {format_bytes(cluster.node_nvme_bytes)}"
            if need.nvme[i] and cluster.node_nvme_bytes is not None
            else ""
        )
        return dataclasses.replace(
            _too_small(e.take(np.array([i])), cluster, job, looked),
            why=f"{e.candidates.strategy(i).label()} on {cluster.ranks} needs "
            f"{format_bytes(float(need.total[i]))} of host memory a node{there}{disks}",
        )

    def _refused(self, cluster: Cluster, job: Job) -> str:
        """The rule that forbids everything."""
        ask = self.ask
        x = Context(spec=ask.spec, job=job, cluster=cluster)
        space = spread_of(ask.spec, job, cluster, ask.fixed, ask.target)
        found = fewest_broken(space, x, ask.target)
        if found:
            return found[0][1]
        fixed = ", ".join(f"{k} {v}" for k, v in ask.fixed.items())
        return (
            f"no strategy closes over {cluster.ranks} ranks and the global batch {job.global_batch}"
            + (f" with {fixed}" if fixed else "")
        )

    def floor_s(self, cluster: Cluster, job: Job) -> float | None:
        """Seconds of one accelerator for one token at the best shape: kernels of forward and backward
        alone, nothing sent, recomputed or waited for. Null where the speed is unknown."""
        key = (cluster.accelerator.name, job.precision)
        if cluster.rates is not None or cluster.kind == "cpu":
            return 0.0
        if key not in self._floor:
            found = _floor_s(self.ask, job, cluster, self.figures(cluster))
            if found is None:
                return None
            self._floor[key] = found
        return self._floor[key]


def _floor_s(ask: Ask, job: Job, cluster: Cluster, figures: Efficiency) -> float | None:
    experts = max(b.mlp.experts for b in ask.spec.blocks)
    alone = dataclasses.replace(cluster, nodes=1, inter=None)
    heads = [b.attention.kv_heads for b in ask.spec.blocks]
    shapes = Candidates.grid(
        tp=[t for t in divisors(int(np.gcd.reduce(heads))) if t <= link_domain(cluster)],
        ep=divisors(experts) if experts else [1],
        micro_batch=divisors(job.global_batch),
    )
    shapes = dataclasses.replace(shapes, dp=shapes.ep, grad_accum=np.ones(len(shapes), np.int64))
    e = evaluate_memory(ask.spec, job, alone, shapes, software=ask.target.software_on(cluster))
    timed = with_step(ask.spec, job, alone, e, software=ask.target.software_on(cluster))
    if timed.step is None:
        return None
    kernels = timed.step.parts["forward"] + timed.step.parts["backward"]
    tokens = shapes.micro_batch * job.seq_len
    a_token: Array = kernels * shapes.tp / tokens
    return float(a_token.min())


def _timed(e: Estimates, i: int, cluster: Cluster, job: Job, looked: int) -> Timed:
    assert e.step is not None
    assert e.step_low is not None
    assert e.step_high is not None
    return Timed(
        cluster=cluster, job=job, strategy=e.candidates.strategy(i),
        step_s=float(e.step.time_s[i]), step_low_s=float(e.step_low[i]), step_high_s=float(e.step_high[i]),
        device_bytes=float(e.memory.device[i]), low_bytes=float(e.memory_low[i]),
        high_bytes=float(e.memory_high[i]), risk=float(e.risk[i]), parts=_parts_of(e, i),
        fitting=len(e), considered=looked,
    )  # fmt: skip


def _parts_of(e: Estimates, i: int) -> dict[str, float]:
    """Of one candidate: those of all take as long as their times."""
    return {k: float(v[0]) for k, v in e.memory.take(np.array([i])).parts.items()}


def _too_small(e: Estimates, cluster: Cluster, job: Job, looked: int) -> TooSmall:
    i = int(np.argmin(e.memory.device))
    return TooSmall(
        cluster=cluster, job=job, strategy=e.candidates.strategy(i),
        device_bytes=float(e.memory.device[i]), high_bytes=float(e.memory_high[i]),
        risk=float(e.risk[i]), considered=looked, parts=_parts_of(e, i),
    )  # fmt: skip


def points_of(sizer: Sizer, offers: list[Offer]) -> tuple[list[Point], dict[str, str]]:
    """(shapes of hardware with their bounds, least first; accelerators left out → why)."""
    ask = sizer.ask
    by_shape: dict[tuple[object, ...], list[Offer]] = {}
    for offer in offers:
        by_shape.setdefault(shape_of(offer), []).append(offer)
    points, left_out = [], {}
    for group in by_shape.values():
        one = group[0]
        for nodes in node_counts(one, ask.most_ranks):
            cluster = cluster_of_offer(one, nodes)
            if isinstance(cluster, str):
                left_out[one.accelerator.name] = cluster
                break
            try:
                job = sizer.job_on(cluster)
            except UsageError as error:
                left_out[one.accelerator.name] = error.what
                break
            floor = sizer.floor_s(cluster, job)
            if floor is None:
                left_out[one.accelerator.name] = f"no {job.precision} rate is known"
                break
            points.append(
                Point(
                    offers=tuple(group), nodes=nodes, cluster=cluster, job=job,
                    bound_s=floor * job.tokens / cluster.ranks,
                )
            )  # fmt: skip
    return points, left_out

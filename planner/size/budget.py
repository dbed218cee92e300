"""The largest model that a budget trains: which size, on how many tokens, on which hardware."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.scaling import FLOPS_A_PARAMETER_TOKEN, batch_tokens, loss, optimum
from outlay.planner.size.choose import STEADY, Limits
from outlay.planner.size.engine import Ask, Sizer, Timed, TooSmall
from outlay.planner.size.models import LEAST_PARAMETERS, MOST_PARAMETERS, llama_of
from outlay.planner.size.money import totals
from outlay.planner.size.offers import Offer, cluster_of_offer, node_counts, shape_of
from outlay.planner.space import Target
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.profiles.errors import NotFeasible

_SIZES_A_DECADE = 16
"""Of the grid of model sizes. Near the optimum the loss is flat: half a grid step off changes it by less
than 0.001 nats."""
_START_MFU = 0.4
"""Only where the search for the fixed point begins; the answer does not depend on it."""
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Largest:
    """What the budget trains."""

    parameters: int
    tokens: float
    loss: float
    offer: Offer
    nodes: int
    terms: str
    job: Job


@dataclass(kw_only=True)
class _Sizes:
    """Models of the grid, each with what was computed for it."""

    target: Target
    seq_len: int
    most_ranks: int
    sizers: dict[int, Sizer] = field(default_factory=dict)
    found: dict[tuple[object, ...], Timed | TooSmall | None] = field(default_factory=dict)
    """By hardware, size and batch: who sells it does not matter."""

    def near(self, parameters: float) -> int:
        wanted = min(max(parameters, LEAST_PARAMETERS), MOST_PARAMETERS)
        return round(math.log10(wanted) * _SIZES_A_DECADE)

    def sizer(self, index: int) -> Sizer:
        if index not in self.sizers:
            spec, _ = llama_of(
                min(max(10 ** (index / _SIZES_A_DECADE), LEAST_PARAMETERS), MOST_PARAMETERS),
                seq_len=self.seq_len,
            )
            job = Job(
                model=spec.name, seq_len=self.seq_len, global_batch=1, steps=1, precision="bf16"
            )
            self.sizers[index] = Sizer(
                Ask(spec=spec, job=job, target=self.target, most_ranks=self.most_ranks)
            )
        return self.sizers[index]

    def best(self, t: _Try, index: int, job: Job) -> Timed | TooSmall | None:
        key = (shape_of(t.offer), t.nodes, index, job.global_batch)
        if key not in self.found:
            self.found[key] = _of_batch(self.sizer(index), job).best(t.cluster, job)
        return self.found[key]


def batch_of(flops: float, seq_len: int) -> int:
    """Sequences a step for so much compute: the power of two nearest to the law's."""
    return int(2 ** max(0, round(math.log2(max(batch_tokens(flops) / seq_len, 1.0)))))


@dataclass(frozen=True, kw_only=True)
class _Try:
    """One piece of hardware at one price."""

    offer: Offer
    nodes: int
    terms: str
    cluster: Cluster
    hours: float
    """That money and deadline leave."""
    most_flops: float
    """At the datasheet's peak: a bound."""


def _tries(offers: Sequence[Offer], limits: Limits, most_ranks: int) -> Iterator[_Try]:
    for offer in offers:
        for nodes in node_counts(offer, most_ranks):
            cluster = cluster_of_offer(offer, nodes)
            if isinstance(cluster, str):
                break
            peak = max(
                (v for k, v in cluster.accelerator.flops.items() if k in ("bf16", "fp16")),
                default=None,
            )
            if peak is None:
                break
            for terms, usd in offer.usd_per_h.items():
                if terms not in STEADY:
                    continue
                hours = min(
                    limits.hours or math.inf,
                    math.inf if limits.usd is None or not usd else limits.usd / (usd * nodes),
                    math.inf if limits.gpu_hours is None else limits.gpu_hours / cluster.ranks,
                )
                if hours < math.inf:
                    yield _Try(
                        offer=offer, nodes=nodes, terms=terms, cluster=cluster, hours=hours,
                        most_flops=peak * cluster.ranks * hours * 3600,
                    )  # fmt: skip


def _fixed_point(t: _Try, sizes: _Sizes, overtrain: float, limits: Limits) -> Largest | None:
    """Size → speed → compute → the size that is optimal for it, until it stays; smaller where it does
    not fit."""
    index = sizes.near(optimum(t.most_flops * _START_MFU, overtrain=overtrain).parameters)
    ceiling, best = math.inf, None
    for _ in range(_ROUNDS):
        sizer = sizes.sizer(index)
        parameters = parameter_counts(sizer.ask.spec).total
        batch = batch_of(t.most_flops * _START_MFU, sizes.seq_len)
        job = dataclasses.replace(sizer.job_on(t.cluster), global_batch=batch)
        timed = sizes.best(t, index, job)
        if not isinstance(timed, Timed):
            ceiling = index - 1
            index -= 2
            continue
        filled = _filled(timed, t, limits)
        if filled is None:
            break
        job, tokens = filled
        best = Largest(
            parameters=parameters, tokens=tokens, loss=loss(parameters, tokens), offer=t.offer,
            nodes=t.nodes, terms=t.terms, job=job,
        )  # fmt: skip
        flops = FLOPS_A_PARAMETER_TOKEN * parameters * tokens
        wanted = min(sizes.near(optimum(flops, overtrain=overtrain).parameters), ceiling)
        if wanted == index:
            break
        index = int(wanted)
    return best


def _of_batch(sizer: Sizer, job: Job) -> Sizer:
    """A sizer for that batch; the remembered one where it is the same."""
    if sizer.ask.job.global_batch != job.global_batch:
        sizer.ask = dataclasses.replace(
            sizer.ask, job=dataclasses.replace(sizer.ask.job, global_batch=job.global_batch)
        )
        sizer.forget()
    return sizer


def _filled(timed: Timed, t: _Try, limits: Limits) -> tuple[Job, float] | None:
    """The job with as many steps as the limits hold, set-up and the rest included; null where failures leave
    no time for any."""
    steps = max(1, int(t.hours * 3600 / timed.step_s))
    for _ in range(4):
        job = dataclasses.replace(timed.job, steps=steps)
        found = totals(dataclasses.replace(timed, job=job), t.offer, t.nodes, only=t.terms)
        if not found:
            return None
        total = found[0]
        over = [
            value / limit
            for value, limit in (
                (total.hours.expected, limits.hours),
                (None if total.usd is None else total.usd.expected, limits.usd),
                (total.accelerator_hours, limits.gpu_hours),
            )
            if value is not None and limit is not None
        ]
        if max(over, default=0.0) <= 1.0:
            break
        steps = max(1, int(steps / max(over) * 0.9995))
    return job, float(job.tokens)


def largest(
    offers: Sequence[Offer],
    limits: Limits,
    *,
    target: Target,
    seq_len: int,
    most_ranks: int,
    overtrain: float,
) -> Largest:
    """Least expected loss within the limits. A piece of hardware whose peak could not beat what was found
    is not tried; that loses nothing."""
    sizes = _Sizes(target=target, seq_len=seq_len, most_ranks=most_ranks)
    best: Largest | None = None
    for t in sorted(_tries(offers, limits, most_ranks), key=lambda t: -t.most_flops):
        if best is not None and optimum(t.most_flops, overtrain=overtrain).loss >= best.loss:
            break
        found = _fixed_point(t, sizes, overtrain, limits)
        if found is not None and (best is None or found.loss < best.loss):
            best = found
    if best is None:
        raise NotFeasible(
            "no hardware of the catalog trains anything within these limits",
            do="a larger budget or a later deadline",
        )
    return best

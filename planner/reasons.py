"""What limits a plan, found by asking again with more of each thing: never by looking at the parts.

Each row is a whole new search on hardware that has twice as much of one thing, so what it says is what
the planner would choose there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from outlay.planner.search import search
from outlay.planner.space import Target
from outlay.planner.spec.cluster import Cluster, Link
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Gain
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, UsageError

WORTH = 0.02
"""A gain below that is nothing: the model of time is not that sharp."""


@dataclass(frozen=True, kw_only=True)
class _More:
    """One change of the hardware."""

    what: str
    """compute | memory speed | memory | links | network | host link | accelerators."""
    change: str
    cluster: Cluster


def _faster(link: Link) -> Link:
    return dataclasses.replace(link, bytes_per_s=2 * link.bytes_per_s)


def _twice(cluster: Cluster, *, offloads: bool) -> Iterator[_More]:
    """The cluster with twice as much of one thing; what is not known is left out."""
    a, rates = cluster.accelerator, cluster.rates
    if rates is not None:
        quick = {k: 2 * v for k, v in rates.gemm_flops.items()}
        sized = tuple((p, n, 2 * v) for p, n, v in rates.gemm_by_size)
        faster = dataclasses.replace(rates, gemm_flops=quick, gemm_by_size=sized)
        wider = dataclasses.replace(rates, memory_bytes_per_s=2 * rates.memory_bytes_per_s)
        yield _More(what="compute", change="twice the FLOP/s",
                    cluster=dataclasses.replace(cluster, rates=faster))  # fmt: skip
        yield _More(what="memory speed", change="twice the memory bandwidth",
                    cluster=dataclasses.replace(cluster, rates=wider))  # fmt: skip
        if rates.all_reduce:
            table = tuple((size, seconds / 2) for size, seconds in rates.all_reduce)
            linked = dataclasses.replace(rates, all_reduce=table)
            yield _More(what="links", change="twice the speed between ranks",
                        cluster=dataclasses.replace(cluster, rates=linked))  # fmt: skip
    else:
        quick = {k: 2 * v for k, v in a.flops.items()}
        stronger = dataclasses.replace(a, flops=quick)
        yield _More(what="compute", change="twice the FLOP/s",
                    cluster=dataclasses.replace(cluster, accelerator=stronger))  # fmt: skip
        if a.memory_bytes_per_s:
            wide = dataclasses.replace(a, memory_bytes_per_s=2 * a.memory_bytes_per_s)
            yield _More(what="memory speed", change="twice the memory bandwidth",
                        cluster=dataclasses.replace(cluster, accelerator=wide))  # fmt: skip
        if cluster.ranks_per_node > 1:
            yield _More(what="links", change="twice the links in a node",
                        cluster=dataclasses.replace(cluster, intra=_faster(cluster.intra)))  # fmt: skip
    yield _More(what="memory", change="twice the memory a rank",
                cluster=dataclasses.replace(cluster, usable_bytes=2 * cluster.usable_bytes))  # fmt: skip
    if cluster.inter is not None and cluster.nodes > 1:
        yield _More(what="network", change="twice the network",
                    cluster=dataclasses.replace(cluster, inter=_faster(cluster.inter)))  # fmt: skip
    if offloads and a.pcie_bytes_per_s:
        host = dataclasses.replace(a, pcie_bytes_per_s=2 * a.pcie_bytes_per_s)
        yield _More(what="host link", change="twice the host link",
                    cluster=dataclasses.replace(cluster, accelerator=host))  # fmt: skip
    yield from _twice_as_many(cluster)


def _twice_as_many(cluster: Cluster) -> Iterator[_More]:
    """More accelerators, where what joins them is known; a measured machine stays as it is."""
    if cluster.rates is not None:
        return
    if cluster.inter is not None:
        more = dataclasses.replace(cluster, nodes=2 * cluster.nodes)
    elif 2 * cluster.ranks_per_node <= 8 and cluster.ranks_per_node > 1:
        more = dataclasses.replace(cluster, ranks_per_node=2 * cluster.ranks_per_node)
    else:
        return
    yield _More(what="accelerators", change=f"{more.ranks:,} of them", cluster=more)


Solve = Callable[[Cluster], "tuple[float, Strategy] | None"]
"""The best step time on other hardware, and its strategy; null where nothing fits."""


def gains(cluster: Cluster, solve: Solve) -> tuple[Gain, ...]:
    """What twice as much of each thing would give, the largest gain first."""
    now = solve(cluster)
    if now is None:
        return ()
    step_s, strategy = now
    offloads = strategy.offload_optimizer != "none" or strategy.offload_param != "none"
    rows = []
    for more in _twice(cluster, offloads=offloads):
        found = solve(more.cluster)
        if found is not None:
            then, other = found
            label = other.label() if other != strategy else None
            rows.append(
                Gain(what=more.what, change=more.change, step_s=then, faster=step_s / then - 1,
                     strategy=label)
            )  # fmt: skip
    return tuple(sorted(rows, key=lambda g: -g.faster))


def by_search(spec: ModelSpec, job: Job, fixed: dict[str, int], target: Target) -> Solve:
    """A whole search for each piece of hardware."""

    def solve(cluster: Cluster) -> tuple[float, Strategy] | None:
        try:
            found = search(spec, job, cluster, fixed, target=target)
        except (NotFeasible, UsageError):
            return None
        assert found.estimates.step is not None
        return float(found.estimates.step.time_s[found.best_index]), found.best

    return solve


def limited_by(rows: tuple[Gain, ...]) -> str:
    """The one thing of which more would help most, more accelerators apart; `the trainer's own work`
    where nothing helps."""
    own = [g for g in rows if g.what != "accelerators"]
    if not own or own[0].faster < WORTH:
        return "the trainer's own work"
    return own[0].what

"""Money, energy and hours of a run from its step time. Low / expected / high throughout."""

from __future__ import annotations

from dataclasses import dataclass

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Budget


@dataclass(frozen=True, kw_only=True)
class Range:
    """A quantity with its 90 % interval."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """All of one run on one cluster."""

    time_s: Range
    gpu_hours: float
    energy_kwh: float | None
    """Accelerators at their power limit: an upper end, since nothing was metered. Null = TDP unknown."""
    cost_usd: Range | None
    """Null where no price is known."""


def budget_s(budget: Budget, cluster: Cluster) -> float | None:
    """Wall seconds of all of the cluster that a budget pays for; null where that is not known."""
    if budget.kind == "hours":
        return budget.amount * 3600
    if budget.kind == "gpu_hours":
        return budget.amount * 3600 / cluster.ranks
    price = cluster.price_usd_per_h
    if budget.kind == "money" and price:
        return budget.amount / price * 3600
    return None


def run_cost(
    cluster: Cluster, step_low_s: float, step_s: float, step_high_s: float, steps: int
) -> RunCost:
    """`steps` steps on all of the cluster. Set-up, evaluation and saving are not in it."""
    time = Range(low=step_low_s * steps, expected=step_s * steps, high=step_high_s * steps)
    hours = time.expected / 3600
    price = cluster.price_usd_per_h
    cost = None
    if price is not None:
        cost = Range(
            low=time.low / 3600 * price, expected=hours * price, high=time.high / 3600 * price
        )
    tdp = cluster.accelerator.tdp_w
    devices = len(cluster.gpus) or cluster.ranks
    energy = tdp * devices * hours / 1e3 if tdp is not None else None
    return RunCost(time_s=time, gpu_hours=hours * cluster.ranks, energy_kwh=energy, cost_usd=cost)

"""Money, energy, CO2e and hours of a run from its step time. Low / expected / high throughout."""

from __future__ import annotations

from dataclasses import dataclass

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Budget, Job
from outlay.profiles.errors import UnknownName


@dataclass(frozen=True, kw_only=True)
class Range:
    """A quantity with its 90 % interval."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """All of one run on one cluster. Null = not known, never zero."""

    time_s: Range
    gpu_hours: float
    energy_kwh: Range | None
    """Rated power × average load × server × cooling, by profiles/assumptions.yaml; null = TDP unknown."""
    co2e_kg: Range | None
    """Null where the electricity's region is not known."""
    region: str | None
    """What the CO2e is of: region, basis, year and source."""
    cost_usd: Range | None
    """Null where no price is known."""


def kw_of(cluster: Cluster, job: Job) -> float | None:
    """Expected power of all of the cluster, servers and cooling included; null = TDP unknown."""
    from outlay.planner.assumed import with_set

    tdp = cluster.accelerator.tdp_w
    if tdp is None:
        return None
    taken = with_set(job.assume)
    load = taken["tdp_fraction"].expected * taken["server_power_factor"].expected
    devices = len(cluster.gpus) or cluster.ranks
    return tdp / 1e3 * devices * load * taken["pue"].expected


def budget_s(budget: Budget, cluster: Cluster, job: Job) -> float | None:
    """Wall seconds of all of the cluster that a budget pays for; null where that is not known."""
    if budget.kind in ("energy", "carbon"):
        kw, carbon = kw_of(cluster, job), carbon_of(job.region)
        each = 1.0 if budget.kind == "energy" else None if carbon is None else carbon[0]
        return budget.amount / kw / each * 3600 if kw and each else None
    if budget.kind == "hours":
        return budget.amount * 3600
    if budget.kind == "gpu_hours":
        return budget.amount * 3600 / cluster.ranks
    price = cluster.price_usd_per_h
    if budget.kind == "money" and price:
        return budget.amount / price * 3600
    return None


def carbon_of(region: str | None) -> tuple[float, str] | None:
    """(kg CO2e a kWh, what it is) of a region; null where none is named or known for it. Raises UnknownName
    for what is neither in carbon.csv nor in electricity.csv."""
    from outlay.profiles.offers import (
        carbon_in,
        carbon_intensities,
        electricity_in,
        electricity_prices,
    )

    if region is None:
        return None
    row = carbon_in(region)
    if row is not None:
        return row.gco2e_per_kwh / 1e3, f"{row.region}, {row.basis}, {row.year}: {row.source}"
    if electricity_in(region) is None:
        known = [*carbon_intensities(), *electricity_prices()]
        raise UnknownName("region", region, known, where="--region")
    return None


def ranged(what: str, unit: str, value: Range | None) -> dict[str, float | None]:
    """`energy_kwh`, `energy_low_kwh`, `energy_high_kwh`, as files have them; null = not known."""
    return {
        f"{what}_{unit}": None if value is None else value.expected,
        f"{what}_low_{unit}": None if value is None else value.low,
        f"{what}_high_{unit}": None if value is None else value.high,
    }


def run_cost(
    cluster: Cluster, step_low_s: float, step_s: float, step_high_s: float, job: Job
) -> RunCost:
    """The job's steps on all of the cluster. Set-up, evaluation and saving are not in it."""
    from outlay.planner.assumed import with_set
    from outlay.planner.project_cost import in_quadrature, kw_an_accelerator, one_at_a_time

    steps = job.steps
    time = Range(low=step_low_s * steps, expected=step_s * steps, high=step_high_s * steps)
    hours, price, tdp = time.expected / 3600, cluster.price_usd_per_h, cluster.accelerator.tdp_w
    cost = energy = co2e = None
    if price is not None:
        low, high = time.low / 3600 * price, time.high / 3600 * price
        cost = Range(low=low, expected=hours * price, high=high)
    carbon = carbon_of(job.region)
    if tdp is not None:
        taken = with_set(job.assume)
        names = ("tdp_fraction", "server_power_factor", "pue")
        seconds, *columns = one_at_a_time([time, *(taken[n] for n in names)])
        v = dict(zip(names, columns, strict=True))
        devices = len(cluster.gpus) or cluster.ranks
        kwh = in_quadrature(seconds / 3600 * devices * kw_an_accelerator(tdp, v) * v["pue"])
        energy = Range(low=float(kwh.low), expected=float(kwh.expected), high=float(kwh.high))
        if carbon is not None:
            kg = carbon[0]
            co2e = Range(low=energy.low * kg, expected=energy.expected * kg, high=energy.high * kg)
    return RunCost(
        time_s=time, gpu_hours=hours * cluster.ranks, energy_kwh=energy, co2e_kg=co2e,
        region=None if carbon is None else carbon[1], cost_usd=cost,
    )  # fmt: skip

"""What an option costs in all, by planner/project_cost.py: set-up, evaluation, saves, failures and
preemptions around the steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from outlay.planner.assumed import END, Assumption, as_asked, with_set
from outlay.planner.cost import Range, carbon_of
from outlay.planner.estimate.interval import risk_above
from outlay.planner.ownership import FIGURES, with_region
from outlay.planner.project_cost import (
    OF_TOTALS,
    CostAssumptions,
    Terms,
    billed_h,
    lost_fraction,
    may_never_end,
    project_cost,
    years_owned,
)
from outlay.planner.size.engine import Timed
from outlay.planner.size.offers import Offer
from outlay.planner.spec.job import Assume, Job
from outlay.profiles.offers import carbon_in

MOST_LOST = 0.9
"""A machine that is taken away so often that less than a tenth of the time is work is no option."""
INCLUDED = (
    "set-up and download", "evaluation and saves", "failures and spot preemptions", "hourly minimum",
)  # fmt: skip
NOT_INCLUDED = ("storage", "egress", "tax", "attempts that fail for other reasons")


@dataclass(frozen=True, kw_only=True)
class Total:
    """The whole project on one piece of hardware under one kind of price."""

    terms: str
    """on_demand | spot | reserved | owned | unpriced | buy."""
    usd_per_h: float | None
    """Of all the hardware."""
    hours: Range
    usd: Range | None
    energy: Range | None
    """kWh."""
    co2e: Range | None
    """kg."""
    accelerator_hours: float

    @property
    def energy_kwh(self) -> float | None:
        return None if self.energy is None else self.energy.expected

    @property
    def co2e_kg(self) -> float | None:
        return None if self.co2e is None else self.co2e.expected


def assumptions_of(job: Job) -> CostAssumptions:
    """The defaults, with what the job sets of them, its attempts and its pilot."""
    return _assumptions(job.assume, job.attempts, job.pilot_fraction)


@lru_cache(maxsize=64)
def _assumptions(rows: tuple[Assume, ...], attempts: int, pilot: float) -> CostAssumptions:
    taken = {name: a for name, a in with_set(rows).items() if name in OF_TOTALS}
    return CostAssumptions(
        **taken,
        attempts=as_asked(attempts, "--attempts"),
        pilot_fraction=as_asked(pilot, "--pilot"),
    )


@lru_cache(maxsize=64)
def _expected(assumptions: CostAssumptions) -> dict[str, float]:
    return {name: a.expected for name, a in vars(assumptions).items()}


def owning(job: Job) -> dict[str, Assumption]:
    """What a bought machine takes for granted; electricity by the job's region where it is known."""
    return with_region(with_set(job.assume), job.region)


def included_in(job: Job) -> list[str]:
    """What a total holds besides the steps, in words."""
    if job.attempts == 1 and not job.pilot_fraction:
        return list(INCLUDED)
    runs = f"{job.attempts} attempt{'s' * (job.attempts != 1)}"
    pilot = f" and a pilot of {job.pilot_fraction:.1%} of one" if job.pilot_fraction else ""
    return [runs + pilot, *INCLUDED]


def least_hours(
    steps_h: float, terms: str, nodes: int, accelerators: int, job: Job
) -> tuple[float, float]:
    """(hours, hours billed) of a project of `job` of which one run's steps take no less than `steps_h`, at
    expected figures."""
    bare = Terms(kind=terms, price_usd_per_h=None)  # type: ignore[arg-type]
    taken = _expected(assumptions_of(job))
    lost = float(lost_fraction(bare, nodes, accelerators, taken))
    if lost > MOST_LOST:
        return math.inf, math.inf
    starts = taken["attempts"] + (taken["pilot_fraction"] > 0)
    work = steps_h * (taken["attempts"] + taken["pilot_fraction"])
    hours = taken["setup_h"] * starts + work * (1.0 + taken["evaluation_fraction"]) / (1.0 - lost)
    return hours, float(billed_h(bare.kind, hours, taken["minimum_h"] * starts))


def region_of(offer: Offer, job: Job) -> str | None:
    """Where its electricity is from: what the job says, else the offer's own region."""
    return job.region or (offer.node.region if offer.node is not None else None)


def kg_a_kwh(offer: Offer, job: Job) -> tuple[float, str] | None:
    """(what electricity emits where the node stands, what that is of); null where no figure is known."""
    region = region_of(offer, job)
    if region is None:
        return None
    return _carbon(region, None if job.region or offer.node is None else offer.node.provider)


@lru_cache(maxsize=512)
def _carbon(region: str, provider: str | None) -> tuple[float, str] | None:
    """Regions of two clouds may share a name: an offer's own is looked up under its provider alone."""
    row = carbon_in(region)
    if row is None or (provider is not None and row.provider != provider):
        return None
    return carbon_of(region)


@lru_cache(maxsize=4096)
def _no_option(kind: str, nodes: int, ranks: int, assumed: CostAssumptions) -> bool:
    """Too much time is lost under such terms, or all of it may be."""
    terms = Terms(kind=kind, price_usd_per_h=None)  # type: ignore[arg-type]
    lost = float(lost_fraction(terms, nodes, ranks, _expected(assumed)))
    return lost > MOST_LOST or may_never_end(terms, nodes, ranks, assumed)


def totals(
    timed: Timed, offer: Offer, nodes: int, assumed: CostAssumptions | None = None, *,
    interval: bool = False, only: str | None = None,
) -> list[Total]:  # fmt: skip
    """One for each kind of price that the offer has, or for `only` one; one without money where it has none.
    Prices under which interruptions may leave no time for work are left out. With `interval`, the 90 %."""
    job, ranks = timed.job, timed.cluster.ranks
    assumed = assumed or assumptions_of(job)
    carbon = kg_a_kwh(offer, job)
    training = Range(
        low=timed.step_low_s * job.steps, expected=timed.step_s * job.steps,
        high=timed.step_high_s * job.steps,
    )  # fmt: skip
    rows = []
    for kind in offer.terms if only is None else (only,):
        if _no_option(kind, nodes, ranks, assumed):
            continue
        price = offer.price(kind, nodes)
        terms = Terms(
            kind=kind, price_usd_per_h=price,  # type: ignore[arg-type]
            fixed_usd_a_year=offer.fixed(kind, nodes),
            kgco2e_per_kwh=None if carbon is None else carbon[0],
        )  # fmt: skip
        cost = project_cost(
            terms, training, accelerators=ranks, nodes=nodes, tdp_w=timed.cluster.accelerator.tdp_w,
            assumptions=assumed, interval=interval,
        )  # fmt: skip
        hours = {k: float(getattr(cost.wall_s, k)) / 3600.0 for k in END}
        rows.append(
            Total(
                terms=kind, usd_per_h=None if price is None else price.expected, hours=Range(**hours),
                usd=_plain(cost.cost_usd), energy=_plain(cost.energy_kwh), co2e=_plain(cost.co2e_kg),
                accelerator_hours=float(cost.gpu_hours.expected),
            )
        )  # fmt: skip
    return rows


def least_usd(offer: Offer, terms: str, nodes: int, hours: float, billed: float) -> float | None:
    """Money of at least so many hours; null = no price is known."""
    price, fixed = offer.price(terms, nodes), offer.fixed(terms, nodes)
    if price is None:
        return None
    return price.expected * billed + (fixed.expected * float(years_owned(hours)) if fixed else 0.0)


def purchase_usd(offer: Offer, terms: str, nodes: int) -> float:
    """What has to be paid before anything runs; 0 for what is rented."""
    if terms != "buy" or offer.bought is None:
        return 0.0
    return offer.bought.purchase_usd.expected * nodes


def kept(value: Range | None, limit: float | None) -> float | None:
    """Probability that a limit is kept, with log-normal error; null = no limit, or nothing known."""
    if value is None or limit is None:
        return None
    if value.low == value.high:
        return float(value.expected <= limit)
    above = limit > value.expected
    width = value.high / value.expected if above else value.expected / value.low
    if width <= 1.0:
        return float(above)
    return round(1.0 - float(risk_above(np.array(value.expected), limit, width - 1.0)), 4)


def _plain(value: Range | None) -> Range | None:
    if value is None:
        return None
    return Range(low=float(value.low), expected=float(value.expected), high=float(value.high))


def project_assumptions(job: Job, *, bought: bool) -> list[dict[str, Any]]:
    """Each assumption with its ends and its source; those of owning where something is bought."""
    taken: dict[str, Assumption] = dict(vars(assumptions_of(job)))
    if bought:
        taken |= {k: v for k, v in owning(job).items() if k in FIGURES}
    return [{"what": name, **dataclasses.asdict(a)} for name, a in taken.items()]


def changes_most(timed: Timed, offer: Offer, nodes: int, terms: str) -> list[dict[str, Any]]:
    """How much each assumption changes the total between its ends, the largest first."""

    def usd(t: Timed, assumed: CostAssumptions | None = None) -> float | None:
        found = totals(t, offer, nodes, assumed, only=terms)
        return found[0].usd.expected if found and found[0].usd else None

    now = usd(timed)
    if now is None:
        return []
    ends = [
        usd(dataclasses.replace(timed, step_s=s)) for s in (timed.step_low_s, timed.step_high_s)
    ]
    rows = [_change("step time", "step time within its 90 % interval", ends, now)]
    taken = assumptions_of(timed.job)
    for name, a in vars(taken).items():
        fixed = [as_asked(v, a.source) for v in (a.low, a.high)]
        ends = [usd(timed, dataclasses.replace(taken, **{name: f})) for f in fixed]
        words = name.replace("_", " ")
        rows.append(
            _change(name, f"{words} {a.expected:.3g} ({a.low:.3g} to {a.high:.3g})", ends, now)
        )
    known = [r for r in rows if r is not None and r["high_usd"] / r["low_usd"] - 1 >= 0.005]
    return sorted(known, key=lambda r: r["low_usd"] - r["high_usd"])


def _change(what: str, text: str, ends: list[float | None], now: float) -> dict[str, Any] | None:
    known = sorted(v for v in ends if v is not None)
    if len(known) < 2:
        return None
    low, high = known
    return {
        "what": what, "low_usd": low, "high_usd": high,
        "says": f"{text}: {low / now - 1:+.0%} {high / now - 1:+.0%}",
    }  # fmt: skip

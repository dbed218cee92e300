"""What an option costs in all, by planner/project_cost.py: set-up, evaluation, saves, failures and
preemptions around the steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from outlay.planner.cost import Range
from outlay.planner.project_cost import (
    CostAssumptions,
    Terms,
    as_asked,
    lost_fraction,
    project_cost,
    usual,
)
from outlay.planner.size.engine import Timed
from outlay.planner.size.offers import Offer
from outlay.planner.spec.job import Job
from outlay.profiles.offers import carbon_intensities

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
    """on_demand | spot | reserved | owned."""
    usd_per_h: float | None
    """Of all the hardware."""
    hours: Range
    usd: Range | None
    energy_kwh: float | None
    co2e_kg: float | None
    accelerator_hours: float


@cache
def _expected() -> dict[str, float]:
    return {name: a.expected for name, a in vars(usual()).items()}


def assumptions_of(job: Job) -> CostAssumptions:
    """The defaults, with the attempts and the pilot that the job asks for."""

    return dataclasses.replace(
        usual(), attempts=as_asked(job.attempts, "--attempts"),
        pilot_fraction=as_asked(job.pilot_fraction, "--pilot"),
    )  # fmt: skip


def included_in(job: Job) -> list[str]:
    """What a total holds besides the steps, in words."""
    if job.attempts == 1 and not job.pilot_fraction:
        return list(INCLUDED)
    runs = f"{job.attempts} attempt{'s' * (job.attempts != 1)}"
    pilot = f" and a pilot of {job.pilot_fraction:.1%} of one" if job.pilot_fraction else ""
    return [runs + pilot, *INCLUDED]


def _terms(kind: str, usd_per_h: float | None, offer: Offer) -> Terms:
    price = None if usd_per_h is None else Range(low=usd_per_h, expected=usd_per_h, high=usd_per_h)
    return Terms(
        kind=kind, price_usd_per_h=price, kgco2e_per_kwh=kg_a_kwh(offer)  # type: ignore[arg-type]
    )  # fmt: skip


def least_hours(steps_h: float, terms: str, nodes: int, accelerators: int) -> tuple[float, float]:
    """(hours, hours billed) of a project whose steps take no less than `steps_h`, at expected figures."""
    bare = Terms(kind=terms, price_usd_per_h=None)  # type: ignore[arg-type]
    taken = _expected()
    lost = float(lost_fraction(bare, nodes, accelerators, taken))
    if lost > MOST_LOST:
        return math.inf, math.inf
    work = steps_h * (1.0 + taken["evaluation_fraction"]) / (1.0 - lost)
    hours = taken["setup_h"] + work
    return hours, max(hours, taken["minimum_h"])


def kg_a_kwh(offer: Offer) -> float | None:
    """What electricity emits where the node stands; null where its region has no figure."""
    region = offer.node.region if offer.node is not None else None
    found = carbon_intensities().get(region) if region else None
    return None if found is None else found.gco2e_per_kwh / 1e3


def totals(
    timed: Timed, offer: Offer, nodes: int, assumed: CostAssumptions | None = None
) -> list[Total]:
    """One for each kind of price that the offer has; one without money where it has none. Prices under
    which interruptions may leave no time for work are left out."""
    steps, ranks = timed.job.steps, timed.cluster.ranks
    training = Range(
        low=timed.step_low_s * steps, expected=timed.step_s * steps, high=timed.step_high_s * steps
    )
    rows = []
    for kind, usd in offer.usd_per_h.items() or [("owned", None)]:
        whole = None if usd is None else usd * nodes
        terms = _terms(kind, whole, offer)
        cost = project_cost(
            terms, training, accelerators=ranks, nodes=nodes, tdp_w=timed.cluster.accelerator.tdp_w,
            assumptions=assumed or assumptions_of(timed.job),
        )  # fmt: skip
        if not math.isfinite(float(cost.wall_s.high)):
            continue
        if float(lost_fraction(terms, nodes, ranks, _expected())) > MOST_LOST:
            continue
        hours = {k: float(v) / 3600.0 for k, v in dataclasses.asdict(cost.wall_s).items()}
        rows.append(
            Total(
                terms=kind, usd_per_h=whole, hours=Range(**hours), usd=_plain(cost.cost_usd),
                energy_kwh=_middle(cost.energy_kwh), co2e_kg=_middle(cost.co2e_kg),
                accelerator_hours=float(cost.gpu_hours.expected),
            )
        )  # fmt: skip
    return rows


def _plain(value: Range | None) -> Range | None:
    if value is None:
        return None
    return Range(low=float(value.low), expected=float(value.expected), high=float(value.high))


def _middle(value: Range | None) -> float | None:
    return None if value is None else float(value.expected)


def project_assumptions(job: Job) -> list[dict[str, Any]]:
    """Each assumption with its ends and its source."""
    taken = assumptions_of(job)
    return [{"what": name, **dataclasses.asdict(a)} for name, a in vars(taken).items()]


def changes_most(timed: Timed, offer: Offer, nodes: int, terms: str) -> list[dict[str, Any]]:
    """How much each assumption changes the total between its ends, the largest first."""

    def usd(t: Timed, assumed: CostAssumptions | None = None) -> float | None:
        found = [x for x in totals(t, offer, nodes, assumed) if x.terms == terms]
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

"""The answer of `outlay size` (schema outlay/size@1): options, losers, what limits, what would change it."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from outlay.planner.cost import ranged
from outlay.planner.estimate.compute import model_flops_per_token
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.nearest import nearest
from outlay.planner.ownership import times
from outlay.planner.project_cost import STALE_DAYS
from outlay.planner.reasons import gains, limited_by
from outlay.planner.size.buy import Bought, bought, bought_dict, cheapest_purchase
from outlay.planner.size.choose import (
    STEADY,
    Found,
    Limits,
    Option,
    explore,
    front,
    weight,
)
from outlay.planner.size.chosen import SCHEMA_SIZE
from outlay.planner.size.engine import Ask, Sizer, Timed, points_of
from outlay.planner.size.losers import Loser, losers_of, refusal
from outlay.planner.size.money import (
    NOT_INCLUDED,
    changes_most,
    included_in,
    kept,
    kg_a_kwh,
    project_assumptions,
)
from outlay.planner.size.offers import Offer, unpriced
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import plain
from outlay.planner.spec.job import Job
from outlay.planner.spec.plan import Gain
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_seconds, format_usd

MOST_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found, ready to be shown or written."""

    ask: Ask
    found: Found
    shown: tuple[Option, ...]
    """A first."""
    tags: dict[int, tuple[str, ...]]
    """Index into `shown` → recommended, cheapest, fastest …"""
    losers: tuple[Loser, ...]
    limited: tuple[str, ...]
    gains: tuple[tuple[Gain, ...], ...]
    limits: Limits
    objective: str
    references: tuple[str, ...] = ()
    assumptions: tuple[dict[str, Any], ...] = ()
    buy: tuple[tuple[int, Bought], ...] = ()
    """(index into `shown`, the bought option beside rent)."""
    buy_refused: str | None = None
    """Buying was asked for, and nothing bought keeps the limits: what would be the least."""
    extra: dict[str, Any] = field(default_factory=dict)


def answer(
    ask: Ask,
    offers: Sequence[Offer],
    limits: Limits,
    objective: str,
    *,
    references: Sequence[str] = (),
    assumptions: Sequence[dict[str, Any]] = (),
    prune: bool = True,
    extra: dict[str, Any] | None = None,
) -> Answer:
    """Search, choose, explain. Raises NotFeasible with what comes nearest."""
    sizer = Sizer(ask)
    points, left_out = points_of(sizer, list(offers))
    if not points:
        raise UsageError(
            "no hardware is left to look at",
            why="; ".join(f"{k}: {v}" for k, v in left_out.items()) or "no offer matches",
        )
    # A bound on time and money says nothing of energy: there, everything is timed.
    whole = explore(sizer, points, limits, prune=prune and objective not in ("energy", "carbon"))
    whole.unknown |= left_out
    if not whole.options:
        # The bounds left out what breaks a limit: look again without any, for numbers to say it with.
        free = explore(sizer, points, Limits())
        whole.over += free.options
        raise _nothing(sizer, whole, limits)
    if all(weight(objective, o) == float("inf") for o in _first_choice(whole.options)):
        raise NotFeasible(
            f"{objective} is unknown for all {len(whole.options)} options",
            why="no carbon intensity is known for their regions, or no power limit for their accelerators"
            if objective in ("energy", "carbon") else "no price is known",
            do="another --objective, or --hardware whose figures are known"
            + ("" if objective in ("energy", "carbon") else "; --price-usd-per-h says what all of it costs"),
        )  # fmt: skip
    shown, tags = _shown(whole.options, objective)
    shown = [o.with_interval() for o in shown]
    # Options that differ in price alone have the same reasons.
    each = {id(o.timed): o for o in shown}
    found = {key: _reasons(sizer, o) for key, o in each.items()}
    reasons = [found[id(o.timed)] for o in shown]
    return Answer(
        ask=ask, found=whole, shown=tuple(shown), tags=tags,
        losers=tuple(losers_of(sizer, points, whole, shown, limits, objective)),
        limited=tuple(limited for limited, _ in reasons), gains=tuple(g for _, g in reasons),
        limits=limits, objective=objective, references=tuple(references),
        buy_refused=None if any(o.total.terms == "buy" for o in whole.options)
        else cheapest_purchase(sizer, points),
        buy=tuple((i, bought(o, offers)) for i, o in enumerate(shown) if o.total.terms == "buy"),
        assumptions=tuple(assumptions), extra=extra or {},
    )  # fmt: skip


_UNITS = {
    "gpu_hours": "{:,.4g} accelerator-hours", "energy_kwh": "{:,.4g} kWh",
    "co2e_kg": "{:,.4g} kg CO2e",
}  # fmt: skip


def _nothing(sizer: Sizer, found: Found, limits: Limits) -> NotFeasible:
    """Nothing keeps the limits: what comes nearest, in money and in time."""
    if found.over:
        cheap = min(found.over, key=lambda o: o.usd if o.usd is not None else float("inf"))
        quick = min(found.over, key=lambda o: o.hours)
        same = cheap is quick or _brief(cheap, limits) == _brief(quick, limits)
        why = f"the cheapest is {_brief(cheap, limits)}; the fastest is {_brief(quick, limits)}"
        if same:
            why = f"the cheapest and fastest is {_brief(cheap, limits)}"
        asked = [
            format_seconds(v * 3600)
            if k == "hours"
            else format_usd(v)
            if k == "usd"
            else _UNITS[k].format(v)
            for k, v in dataclasses.asdict(limits).items()
            if v is not None
        ]
        return NotFeasible(
            f"nothing that was looked at keeps {' and '.join(asked)}",
            why=why,
            do=", ".join([*_room(limits), "fewer tokens, or a smaller model"]),
        )
    said = refusal(sizer, found)
    if said is None:
        rule = found.small[0][1].why if found.small else "; ".join(
            f"{k}: {v}" for k, v in found.unknown.items()
        )  # fmt: skip
        return NotFeasible("no hardware can run it", why=rule)
    why, change = said
    return NotFeasible(
        "nothing fits in memory with at most 5 % risk",
        why=why,
        do=f"{change}"
        if change
        else "a smaller model, adapters instead of all weights, or more accelerators",
    )


def _room(limits: Limits) -> list[str]:
    """What would help of the limits that were asked for."""
    later = ["a later deadline"] if limits.hours is not None else []
    others = (limits.usd, limits.gpu_hours, limits.energy_kwh, limits.co2e_kg)
    return (["a larger budget"] if any(v is not None for v in others) else []) + later


def _brief(o: Option, limits: Limits) -> str:
    money = "price unknown" if o.usd is None else format_usd(o.usd)
    text = f"{o.offer.name} x{o.nodes} {o.total.terms}: {money}, {format_seconds(o.hours * 3600)}"
    if limits.energy_kwh is not None:
        kwh = o.total.energy_kwh
        text += ", energy unknown" if kwh is None else f", {kwh:,.4g} kWh"
    if limits.co2e_kg is not None:
        kg = o.total.co2e_kg
        text += ", CO2e unknown (--region)" if kg is None else f", {kg:,.4g} kg CO2e"
    return text


def _first_choice(options: list[Option]) -> list[Option]:
    """What A is chosen from: steady rent; where none keeps the limits, what is bought, else spot."""
    for terms in (STEADY, ("buy",)):
        if found := [o for o in options if o.total.terms in terms]:
            return found
    return options


def _shown(
    options: list[Option], objective: str
) -> tuple[list[Option], dict[int, tuple[str, ...]]]:
    """The recommended one first, then the cheapest, the fastest, and others of the front."""
    steady = _first_choice(options)
    best = min(steady, key=lambda o: (weight(objective, o), o.hours))
    priced = [o for o in options if o.usd is not None] or options
    # Without a limit on money, the fastest to buy is the whole catalog's largest cluster: nobody asks that.
    rented = [o for o in options if o.total.terms != "buy"] or options
    named = {
        "recommended": best,
        "cheapest": min(priced, key=lambda o: (o.usd or 0.0, o.hours)),
        "fastest": min(rented, key=lambda o: (o.hours, o.usd or 0.0)),
    }
    steady_cheap = min(
        (o for o in priced if o.steady), key=lambda o: (o.usd or 0.0, o.hours), default=best
    )
    rest = _spread(front(steady), MOST_SHOWN)
    chosen: list[Option] = []
    same_spot = [
        o for o in options if not o.steady and o.offer is best.offer and o.nodes == best.nodes
    ]
    tagged = [named["cheapest"], named["fastest"], steady_cheap]
    for o in [best, *same_spot[:1], *_to_buy(options, best, objective), *tagged, *rest]:
        if not any(o is c for c in chosen) and len(chosen) < MOST_SHOWN:
            chosen.append(o)
    tags = {i: tuple(name for name, o in named.items() if o is c) for i, c in enumerate(chosen)}
    return chosen, tags


def _to_buy(options: list[Option], best: Option, objective: str) -> list[Option]:
    """Of what is bought: what A is, and the best by the objective."""
    found = [o for o in options if o.total.terms == "buy"]
    if not found:
        return []
    a, ranks = best.timed.cluster.accelerator.name, best.timed.cluster.ranks
    same = [
        o for o in found if (o.timed.cluster.accelerator.name, o.timed.cluster.ranks) == (a, ranks)
    ]
    first = min(found, key=lambda o: (weight(objective, o), o.hours))
    return [*sorted(same, key=lambda o: o.usd or 0.0)[:1], first]


def _spread(rows: list[Option], count: int) -> list[Option]:
    """Some of the front, evenly, so that a table shows its whole length."""
    if len(rows) <= count:
        return rows
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def _reasons(sizer: Sizer, o: Option) -> tuple[str, tuple[Gain, ...]]:
    """(what limits this option, what more of each thing would give)."""

    def solve(cluster: Cluster) -> tuple[float, Strategy] | None:
        same = cluster is o.timed.cluster
        found = o.timed if same else sizer.best(cluster, o.timed.job)
        return (found.step_s, found.strategy) if isinstance(found, Timed) else None

    rows = gains(o.timed.cluster, solve)
    return limited_by(rows), rows


def age_days(iso: str | None, today: date) -> int | None:
    """Null = undated."""
    if not iso:
        return None
    try:
        return (today - date.fromisoformat(iso[:10])).days
    except ValueError:
        return None


def stale(iso: str | None, today: date) -> bool:
    """Undated, or older than 90 days: to be marked wherever it is shown."""
    days = age_days(iso, today)
    return days is None or days > STALE_DAYS


def _of_carbon(o: Option, job: Job) -> str | None:
    """What its CO2e is of: region, basis, year, source."""
    found = kg_a_kwh(o.offer, job)
    return None if found is None else found[1]


def option_dict(a: Answer, i: int, today: date) -> dict[str, Any]:
    """One option in the published format."""
    o = a.shown[i]
    t, total, job = o.timed, o.total, o.timed.job
    rate = job.tokens_per_step / t.step_s
    peak = t.cluster.accelerator.flops.get(job.precision)
    flops = model_flops_per_token(a.ask.spec, job.seq_len) * rate / t.cluster.ranks
    price_date = o.offer.dates.get(total.terms)
    return {
        "option": string.ascii_uppercase[i],
        "tags": list(a.tags[i]),
        "offer": o.offer.name,
        "region": o.offer.node.region if o.offer.node else None,
        "accelerator": t.cluster.accelerator.name,
        "accelerators": t.cluster.ranks,
        "nodes": o.nodes,
        "terms": total.terms,
        "usd_per_h": total.usd_per_h,
        "price_date": price_date,
        "price_age_days": age_days(price_date, today),
        "price_source": o.offer.node.source if o.offer.node else o.offer.provider,
        "purchase_usd": None if o.offer.bought is None else plain(times(o.offer.bought.purchase_usd, o.nodes)),
        "precision": job.precision,
        "strategy": plain(t.strategy),
        "label": t.strategy.label(),
        "memory": {
            "device_bytes": round(t.device_bytes), "low_bytes": round(t.low_bytes),
            "high_bytes": round(t.high_bytes), "usable_bytes": t.cluster.usable_bytes,
        },
        "oom_probability": round(t.risk, 4),
        "step_s": {"low": t.step_low_s, "expected": t.step_s, "high": t.step_high_s},
        "tokens_per_s": rate,
        "mfu": flops / peak if peak else None,
        "hours": plain(total.hours),
        "usd": plain(total.usd),
        "keeps": {"hours": kept(total.hours, a.limits.hours), "usd": kept(total.usd, a.limits.usd)},
        "accelerator_hours": total.accelerator_hours,
        **ranged("energy", "kwh", total.energy),
        **ranged("co2e", "kg", total.co2e),
        "co2e_of": _of_carbon(o, job),
        "limited_by": a.limited[i],
        "gains": [plain(g) for g in a.gains[i]],
        "notes": list(dict.fromkeys((*o.offer.notes, *t.cluster.notes))),
        "cluster": plain(
            dataclasses.replace(
                t.cluster, price_usd_per_h=total.usd_per_h,
                price_source=f"{o.offer.name} {total.terms.replace('_', ' ')}, {price_date or 'undated'}",
            )
        ),
    }  # fmt: skip


def answer_dict(a: Answer, *, reference: str, weights: str | None, today: date) -> dict[str, Any]:
    """Everything, under the published keys."""
    counts = parameter_counts(a.ask.spec)
    options = [option_dict(a, i, today) for i in range(len(a.shown))]
    by_tag = {tag: options[i]["option"] for i, tags in a.tags.items() for tag in tags}
    pareto = front(a.found.options)
    return {
        "schema": SCHEMA_SIZE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": a.ask.target.name,
        "objective": a.objective,
        "limits": dataclasses.asdict(a.limits),
        "hardware": list(a.references),
        "most_accelerators": a.ask.most_ranks,
        "model": {
            "name": a.ask.spec.name, "reference": reference, "parameters": counts.total,
            "active_parameters": counts.active, "weights": weights,
        },
        "job": plain(a.ask.job),
        "looked": {
            "points": a.found.points,
            "sized": a.found.timed + len(a.found.small), "timed": a.found.timed, "strategies": a.found.considered,
            "fitting": a.found.fitting,
        },
        "options": options,
        "recommended": by_tag.get("recommended"),
        "cheapest": by_tag.get("cheapest"),
        "fastest": by_tag.get("fastest"),
        "pareto": [
            {
                "offer": o.offer.name, "accelerator": o.timed.cluster.accelerator.name,
                "accelerators": o.timed.cluster.ranks, "nodes": o.nodes, "terms": o.total.terms,
                "hours": o.hours, "usd": o.usd,
            }
            for o in pareto
        ],
        "buy_refused": a.buy_refused,
        "buy": [bought_dict(b, options[i]["option"]) for i, b in a.buy],
        "losers": [plain(row) for row in a.losers],
        "unpriced": unpriced(a.references),
        "nearest": nearest(
            a.ask.spec, a.shown[0].timed.job, a.shown[0].timed.cluster, a.shown[0].timed.strategy,
            software=a.ask.target.software_on(a.shown[0].timed.cluster).family,
        ),
        "assumptions": list(a.assumptions),
        "scaling": a.extra.get("scaling"),
        "changes_most": changes_most(
            a.shown[0].timed, a.shown[0].offer, a.shown[0].nodes, a.shown[0].total.terms
        ),
        "included": included_in(a.ask.job),
        "not_included": list(NOT_INCLUDED),
        "project": project_assumptions(a.ask.job, bought=bool(a.buy)),
    }  # fmt: skip

"""Why the other accelerators lost: the constraint that binds, its numbers, and the nearest change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate_memory, host_of
from outlay.planner.estimate.interval import TIGHT_RISK
from outlay.planner.size.choose import Found, Limits, Option, bounds, weight
from outlay.planner.size.engine import Ask, Point, Sizer, Timed, TooSmall
from outlay.planner.size.money import totals
from outlay.planner.space import TARGETS
from outlay.profiles.units import GIB, format_bytes, format_seconds, format_usd

MEMORY_PARTS = 2
"""How many of the largest parts a reason names."""


@dataclass(frozen=True, kw_only=True)
class Loser:
    """One accelerator that is not among the options shown."""

    accelerator: str
    offer: str
    accelerators: int
    """How many, at the size that comes nearest."""
    constraint: str
    """memory | deadline | budget | gpu_hours | energy | carbon | trainer | unknown | beaten."""
    why: str
    change: str | None
    """The nearest change that would make it fit, with its numbers; null = none was found."""
    device_bytes: float | None = None
    usable_bytes: int | None = None
    risk: float | None = None
    hours: float | None = None
    usd: float | None = None


def refusal(sizer: Sizer, found: Found) -> tuple[str, str] | None:
    """(the nearest that does not fit, with its numbers; what would make it fit), where nothing fits."""
    rows = [(p, s) for p, s in found.small if s.strategy is not None]
    if not rows:
        return None
    p, s = min(rows, key=lambda row: row[1].device_bytes / row[1].cluster.usable_bytes)
    assert s.strategy is not None
    if s.why:
        where = f"the nearest, {s.cluster.ranks} x {p.cluster.accelerator.name}: {s.why}"
        return where, nearest_change(sizer, p, s) or ""
    parts = sorted(s.parts.items(), key=lambda kv: -kv[1])[:MEMORY_PARTS]
    biggest = ", ".join(f"{k.replace('_', ' ')} {v / GIB:.3g} GiB" for k, v in parts)
    why = (
        f"the nearest, {s.cluster.ranks} x {p.cluster.accelerator.name} ({s.strategy.label()}), needs "
        f"{s.device_bytes / GIB:.1f} GiB of {s.cluster.usable_bytes / GIB:.1f} on each: {biggest}"
    )
    return why, nearest_change(sizer, p, s) or ""


def losers_of(
    sizer: Sizer,
    points: list[Point],
    found: Found,
    shown: list[Option],
    limits: Limits,
    objective: str,
) -> list[Loser]:
    """One row an accelerator that no option shown has, the one with the cheapest bound first."""
    have = {o.timed.cluster.accelerator.name for o in shown}
    groups: dict[str, list[Point]] = {}
    for p in sorted(points, key=_bound):
        if p.cluster.accelerator.name not in have:
            groups.setdefault(p.cluster.accelerator.name, []).append(p)
    rows = [_loser(sizer, group, found, shown[0], limits, objective) for group in groups.values()]
    rows += [
        Loser(
            accelerator=name, offer="", accelerators=0, constraint="unknown", why=why, change=None
        )
        for name, why in sorted(found.unknown.items())
        if name not in have and name not in groups
    ]
    return rows


def _bound(p: Point) -> float:
    prices = [usd * p.nodes for o in p.offers for usd in o.usd_per_h.values()]
    return p.bound_s * (min(prices) if prices else 1e9)


def _loser(
    sizer: Sizer, group: list[Point], found: Found, best: Option, limits: Limits, objective: str
) -> Loser:
    name = group[0].cluster.accelerator.name
    mine = [o for o in [*found.options, *found.over] if o.timed.cluster.accelerator.name == name]
    small = [(p, s) for p, s in found.small if p.cluster.accelerator.name == name]
    if not mine:
        mine, more = _time_best(sizer, group, limits, objective)
        small = small or more
    if not mine:
        return _too_small(sizer, small, group[0])
    # A spot price is compared with nothing but spot prices.
    mine = [o for o in mine if o.steady] or mine
    inside = [o for o in mine if not limits.broken(o)]
    if inside:
        return _beaten(min(inside, key=lambda o: weight(objective, o)), best, objective)
    return _beyond(min(mine, key=lambda o: _rank(o, limits, objective)), limits)


def _time_best(
    sizer: Sizer, group: list[Point], limits: Limits, objective: str
) -> tuple[list[Option], list[tuple[Point, TooSmall]]]:
    """The accelerator's best option, in the order of `_rank`: the bound left it out, so its numbers are not
    known yet. A point whose bound ranks behind what was found is not timed."""
    steady = any(kind == "steady" for p in group for kind, _, _ in bounds(p))
    ranked = sorted(
        ((_least_rank(p, limits, objective, steady=steady), i) for i, p in enumerate(group))
    )
    best: Option | None = None
    small = []
    for rank, i in ranked:
        if best is not None and rank >= _rank(best, limits, objective):
            break
        p = group[i]
        found = sizer.best(p.cluster, p.job)
        if isinstance(found, TooSmall):
            small.append((p, found))
        elif isinstance(found, Timed):
            options = [
                Option(offer=o, nodes=p.nodes, timed=found, total=t)
                for o in p.offers for t in totals(found, o, p.nodes)
            ]  # fmt: skip
            options = [o for o in options if o.steady or not steady] + ([best] if best else [])
            best = min(options, key=lambda o: _rank(o, limits, objective), default=None)
    return ([best] if best else []), small


_Rank = tuple[int, float, float]


def _rank(o: Option, limits: Limits, objective: str) -> _Rank:
    """Fewest limits broken, then the least excess, then the objective."""
    return len(limits.broken(o)), _excess(o.hours, o.paid_usd, limits), weight(objective, o)


def _least_rank(p: Point, limits: Limits, objective: str, *, steady: bool) -> _Rank:
    """No option of the point ranks before that: hours and money are bounds, other limits may be kept."""
    rows = [(h, m) for kind, h, m in bounds(p) if kind == "steady" or not steady]

    def rank(hours: float, usd: float | None) -> _Rank:
        broken = (limits.hours is not None and hours > limits.hours) + (
            limits.usd is not None and usd is not None and usd > limits.usd
        )
        least = {
            "fastest": hours,
            "cheapest": usd,
            "balanced": None if usd is None else usd * hours,
        }
        unknown = float("inf") if objective in ("cheapest", "balanced") else 0.0
        value = least.get(objective)
        return broken, _excess(hours, usd, limits), unknown if value is None else value

    return min((rank(h, m) for h, m in rows), default=(0, 0.0, 0.0))


def _excess(hours: float, usd: float | None, limits: Limits) -> float:
    pairs = ((hours, limits.hours), (usd, limits.usd))
    return sum(max(0.0, v / limit - 1) for v, limit in pairs if v is not None and limit)


def _row(o: Option, constraint: str, why: str, change: str | None = None) -> Loser:
    return Loser(
        accelerator=o.timed.cluster.accelerator.name, offer=o.offer.name,
        accelerators=o.timed.cluster.ranks, constraint=constraint, why=why, change=change,
        device_bytes=o.timed.device_bytes, usable_bytes=o.timed.cluster.usable_bytes,
        risk=o.timed.risk, hours=o.hours, usd=o.usd,
    )  # fmt: skip


def _beaten(o: Option, best: Option, objective: str) -> Loser:
    texts = []
    if o.usd is not None and best.usd:
        texts.append(f"{o.usd / best.usd:.2g} times the money ({format_usd(o.usd)})")
    texts.append(f"{o.hours / best.hours:.2g} times as long ({format_seconds(o.hours * 3600)})")
    if objective in ("energy", "carbon") and o.total.energy_kwh and best.total.energy_kwh:
        texts.append(f"{o.total.energy_kwh / best.total.energy_kwh:.2g} times the energy")
    terms = "" if o.steady else ", at a spot price"
    return _row(o, "beaten", " and ".join(texts) + " of A" + terms)


def _beyond(o: Option, limits: Limits) -> Loser:
    broken = limits.broken(o)
    says = {
        "deadline": f"takes {format_seconds(o.hours * 3600)}, the limit is "
        f"{format_seconds((limits.hours or 0) * 3600)}",
        "budget": f"costs {format_usd(o.paid_usd or 0)}{' to buy' if o.total.terms == 'buy' else ''}, "
        f"the limit is {format_usd(limits.usd or 0)}",
        "gpu_hours": f"needs {o.total.accelerator_hours:,.0f} accelerator-hours of {limits.gpu_hours or 0:,.0f}",
        "energy": f"needs {o.total.energy_kwh or 0:,.0f} kWh of {limits.energy_kwh or 0:,.0f}",
        "carbon": "its emissions are unknown"
        if o.total.co2e_kg is None
        else f"emits {o.total.co2e_kg:,.0f} kg CO2e of {limits.co2e_kg or 0:,.0f}",
    }
    more = None
    if broken == ["deadline"] and o.offer.gbps is None and o.offer.cluster is None:
        more = "several nodes, if their network is known (--inter-node-gbps)"
    return _row(o, broken[0], "; ".join(says[b] for b in broken), more)


def _too_small(sizer: Sizer, small: list[tuple[Point, TooSmall]], point: Point) -> Loser:
    a = point.cluster.accelerator
    if not small:
        return Loser(accelerator=a.name, offer=point.offers[0].name, accelerators=point.cluster.ranks,
                     constraint="unknown", why="its speed is unknown", change=None)  # fmt: skip
    p, s = min(small, key=lambda row: row[1].device_bytes or float("inf"))
    base = Loser(
        accelerator=a.name, offer=p.offers[0].name, accelerators=s.cluster.ranks, constraint="memory",
        why="", change=None, device_bytes=s.device_bytes or None, usable_bytes=s.cluster.usable_bytes,
        risk=s.risk,
    )  # fmt: skip
    if s.strategy is None:
        return dataclasses.replace(base, constraint="trainer", why=s.why, device_bytes=None)
    if s.why:
        change = nearest_change(sizer, p, s)
        return dataclasses.replace(base, constraint="host", why=s.why, change=change)
    parts = sorted(s.parts.items(), key=lambda kv: -kv[1])[:MEMORY_PARTS]
    biggest = ", ".join(f"{k.replace('_', ' ')} {v / GIB:.3g}" for k, v in parts)
    why = (
        f"{s.strategy.label()} on {s.cluster.ranks} needs {s.device_bytes / GIB:.3g} GiB "
        f"(to {s.high_bytes / GIB:.3g}) of {s.cluster.usable_bytes / GIB:.3g}, risk {s.risk:.0%}: {biggest}"
    )
    return dataclasses.replace(base, why=why, change=nearest_change(sizer, p, s))


def nearest_change(sizer: Sizer, p: Point, s: TooSmall) -> str | None:
    """The first of these that fits, by planning again: another trainer's offload, shorter sequences."""
    ask = sizer.ask
    for text, other in _changes(ask):
        job = dataclasses.replace(other.job, precision=s.job.precision)
        found = sizer.other(text, dataclasses.replace(other, job=job)).best(p.cluster, job)
        if not isinstance(found, Timed) or found.risk > TIGHT_RISK:
            continue
        label = f"{text}: {found.strategy.label()}, {found.device_bytes / GIB:.3g} GiB"
        if found.strategy.offload_optimizer != "none":
            software = other.target.software_on(p.cluster)
            one = Candidates.of([found.strategy])
            e = evaluate_memory(ask.spec, job, p.cluster, one, software=software)
            need = host_of(ask.spec, job, p.cluster, one, e.memory, software, e.figures).total
            label += f", host RAM ≥ {format_bytes(float(need[0]))} a node"
            ram = p.offers[0].ram_bytes
            if ram is not None and ram < float(need[0]):
                continue
        hours = found.step_s * job.steps / 3600
        return f"{label}; {format_seconds(hours * 3600)}"
    return None


def _changes(ask: Ask) -> list[tuple[str, Ask]]:
    rows = []
    offload = {"offload_optimizer": 1}
    if "offload_optimizer" not in ask.fixed and ask.target.name != "megatron":
        rows.append(("optimizer on the CPU", dataclasses.replace(ask, fixed=ask.fixed | offload)))
        if ask.target.name == "runner":
            deepspeed = dataclasses.replace(ask, target=TARGETS["deepspeed"])
            rows.append(("--for deepspeed", deepspeed))
    for part in (2, 4, 8):
        if ask.job.seq_len // part >= 512:
            job = dataclasses.replace(
                ask.job, seq_len=ask.job.seq_len // part, global_batch=ask.job.global_batch * part
            )
            rows.append((f"--seq-len {job.seq_len}", dataclasses.replace(ask, job=job)))
    return rows

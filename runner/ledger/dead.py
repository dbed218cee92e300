"""Attempts whose process died without closing them: charged, and their reservations freed."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace

from outlay.planner.spec.job import Budget, BudgetKind
from outlay.runner.budget import Spent, amount_of
from outlay.runner.events import utc_now
from outlay.runner.ledger.lease import Owner, Watch

SPENT = ("wall_s", "cost_usd", "gpu_hours", "energy_kwh", "co2e_kg")


def bury(db: sqlite3.Connection) -> None:
    """End the attempts whose process is dead, charge what they may have used, free their rest."""
    now_s = time.monotonic()
    for row in db.execute("SELECT * FROM attempts WHERE state = 'running'").fetchall():
        owner = Owner(space=row["space"], pid=row["pid"], ticks=row["ticks"])
        dead = owner.known_dead()
        if dead is None:
            mapping = json.loads(row["watch"] or "null") or {
                "watcher": "", "beats": -1, "since_s": 0.0,
            }  # fmt: skip
            dead, watch = Watch(**mapping).over(row["beats"], now_s)
            note = json.dumps(vars(watch))
            db.execute("UPDATE attempts SET watch = ? WHERE id = ?", (note, row["id"]))
            age_s = row["next_s"]
        else:
            age_s = max(0.0, now_s - row["beat_s"])
        if dead:
            _charge_dead(db, row, min(age_s, row["next_s"]))


def _charge_dead(db: sqlite3.Connection, row: sqlite3.Row, silent_s: float) -> None:
    """All amounts grow as they did, but not above what was reserved."""
    before = Spent(fraction=None, **{name: row[name] for name in SPENT})
    held = db.execute("SELECT * FROM reservations WHERE attempt = ?", (row["id"],)).fetchall()
    grown = _after(before, silent_s, row)
    ratios = [
        (h["amount"] - amount_of(_of(h["kind"]), before)) / more
        for h in held
        if (more := amount_of(_of(h["kind"]), grown) - amount_of(_of(h["kind"]), before)) > 0
    ]
    charged = _after(before, silent_s * max(0.0, min([1.0, *ratios])), row)
    sets = ", ".join(f"{name} = ?" for name in SPENT)
    db.execute(
        f"UPDATE attempts SET {sets}, state = 'lost', ended_at = ?, reason = ? WHERE id = ?",
        (
            *(getattr(charged, name) for name in SPENT),
            utc_now(),
            f"its process died; up to {silent_s:.3g} s after its last entry are charged",
            row["id"],
        ),
    )
    db.execute("DELETE FROM reservations WHERE attempt = ?", (row["id"],))


def _after(spent: Spent, more_s: float, row: sqlite3.Row) -> Spent:
    """Time that the shortest bill holds already costs nothing more. Energy at the highest power that
    was known at the start, or else as it was used before."""
    wall_s, price = spent.wall_s + more_s, row["price_usd_per_h"]
    billed_s = max(0.0, wall_s - max(spent.wall_s, row["minimum_s"]))
    factor, kwh, kg = more_s / max(spent.wall_s, 1.0), spent.energy_kwh, spent.co2e_kg
    if row["upper_kw"] is not None:
        more_kwh = row["upper_kw"] * more_s / 3600
        kwh = (kwh or 0.0) + more_kwh
        if row["kgco2e_per_kwh"] is not None:
            kg = (kg or 0.0) + more_kwh * row["kgco2e_per_kwh"]
    else:
        kwh = None if kwh is None else kwh * (1 + factor)
        kg = None if kg is None else kg * (1 + factor)
    return replace(
        spent,
        wall_s=wall_s,
        cost_usd=spent.cost_usd
        if price is None
        else (spent.cost_usd or 0) + price * billed_s / 3600,
        gpu_hours=spent.gpu_hours + row["accelerators"] * more_s / 3600,
        energy_kwh=kwh,
        co2e_kg=kg,
    )


def _of(kind: BudgetKind) -> Budget:
    return Budget(kind=kind, amount=1.0)

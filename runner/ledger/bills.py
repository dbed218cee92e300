"""What others say was used: a provider's bill beside the ledger, Slurm's accounting into it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlay.profiles.errors import FileError
from outlay.runner.ledger.period import Period, of_row, parse_time, spanned
from outlay.runner.ledger.store import Ledger, insert

COST_COLUMNS = ("cost_usd", "BilledCost", "lineItem/UnblendedCost", "Cost", "cost", "amount")
"""First that is there: ours, FOCUS, AWS, others."""
CURRENCY_COLUMNS = ("BillingCurrency", "lineItem/CurrencyCode", "currency", "Currency")
SACCT = ("JobID", "User", "ElapsedRaw", "State", "Start")
"""Columns that are needed; Account, End, AllocTRES, NodeList, ConsumedEnergyRaw are used if there."""
DONE = {"COMPLETED": "done", "TIMEOUT": "stopped", "CANCELLED": "stopped", "PREEMPTED": "stopped"}
ENDED = (
    *DONE, "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
)  # fmt: skip
"""States of jobs that use nothing more."""
NO_VALUE = float(2**64 - 2)
"""Slurm writes it for what it does not know."""
MOST_S, MOST_J, MOST_GPUS = 100 * 366 * 86400.0, 1e15, 1_000_000
"""A century, 280 GWh, a million: more is not a job but a broken line."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key of a bill. Null = on one side only."""

    key: str
    billed_usd: float | None
    ledger_usd: float | None

    @property
    def difference_usd(self) -> float:
        """Billed and not in the ledger."""
        return (self.billed_usd or 0.0) - (self.ledger_usd or 0.0)


def _read(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of a table with commas, or with bars as `sacct --parsable` writes it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError("this file cannot be read", where=str(path), why=str(error)) from None
    lines = text.splitlines()
    if not lines:
        raise FileError("this file is empty", where=str(path))
    if len(lines) == 1:
        raise FileError(
            "this file has no line below its first",
            where=str(path),
            why=f"that is {lines[0][:60]!r}",
        )
    reader = csv.DictReader(lines, delimiter="|" if "|" in lines[0] else ",")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise FileError("this line has more or fewer fields than the first", where=where)
        yield where, row


def _column(row: dict[str, str], names: Iterable[str], where: str, *, do: str) -> str:
    for name in names:
        if name in row:
            return name
    raise FileError(
        f"none of the columns {', '.join(names)} is there",
        where=where,
        why=f"it has {', '.join(row)}",
        do=do,
    )


def _number(text: str, where: str) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        raise FileError(f"{text!r} is not a number", where=where) from None
    if value != value or abs(value) == float("inf"):
        raise FileError(f"{text!r} is not a finite number", where=where)
    return value


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a file charges."""

    usd: dict[str, float]
    """By key; everything under '' without a key."""
    period: Period | None
    """From its dates, or as asked; null = it has none, and none was asked for."""
    left_out: int
    """Lines outside the period."""


def read_bill(
    path: Path, *, key_column: str | None, cost_column: str | None, asked: Period | None = None
) -> Bill:
    """Lines that begin within `asked`, or all. Other currencies are refused, not converted."""
    billed: dict[str, float] = {}
    asked = asked or Period()
    dates, left_out = [], 0
    for where, row in _read(path):
        costs = [cost_column] if cost_column else COST_COLUMNS
        cost = _column(row, costs, where, do="name the one that is meant: --cost-column")
        currency = next((row[c] for c in CURRENCY_COLUMNS if row.get(c)), "USD")
        if currency.upper() != "USD":
            raise FileError(
                f"this bill is in {currency}",
                where=where,
                do="convert it to USD, the ledger's unit",
            )
        charged = of_row(row, where)
        if charged is not None and not asked.holds(charged[0]):
            left_out += 1
            continue
        dates += [] if charged is None else [charged]
        key = ""
        if key_column is not None:
            key = row[
                _column(row, [key_column], where, do="name the one that is meant: --key-column")
            ]
        billed[key] = billed.get(key, 0.0) + _number(row[cost], f"{where}: {cost}")
    return Bill(usd=billed, period=asked.or_else(spanned(dates)), left_out=left_out)


def reconcile(billed: dict[str, float], booked: dict[str, float | None]) -> list[Difference]:
    """Both sides of each key, the largest difference first."""
    rows = [
        Difference(key=key, billed_usd=billed.get(key), ledger_usd=booked.get(key))
        for key in {**billed, **booked}
    ]
    return sorted(rows, key=lambda row: (-abs(row.difference_usd), row.key))


def gpus_of(tres: str) -> int:
    """`billing=8,cpu=8,gres/gpu=2,gres/gpu:a100=2,mem=64G` → 2; `gres/gpu:a100=4,gres/gpu:h100=2` → 6."""
    whole = re.search(r"(?:^|,)gres/gpu=(\d+)", tres)
    if whole:
        return int(whole.group(1))
    return sum(int(count) for count in re.findall(r"(?:^|,)gres/gpu:[^=,]+=(\d+)", tres))


def import_sacct(ledger: Ledger, path: Path, *, usd_per_gpu_h: float | None) -> tuple[int, int]:
    """(new attempts, those that are there already or go on). Of a job's steps only the energy."""
    rows = list(_read(path))
    for name in SACCT:
        if rows:
            _column(
                rows[0][1], [name], rows[0][0], do="sacct --parsable2 --format …: see the guide"
            )
    energy_j: dict[str, float] = {}
    for where, row in rows:
        job = row["JobID"].partition(".")[0]
        used = _number(row.get("ConsumedEnergyRaw", ""), f"{where}: ConsumedEnergyRaw")
        if used == NO_VALUE:
            used = 0.0
        if not 0 <= used < MOST_J:
            raise FileError(f"{used:g} J cannot be", where=f"{where}: ConsumedEnergyRaw")
        energy_j[job] = max(energy_j.get(job, 0.0), used)
    new = passed = 0
    with ledger.change() as db:
        for where, row in rows:
            if "." in row["JobID"]:
                continue
            values = _attempt(where, row, energy_j[row["JobID"]], usd_per_gpu_h)
            known = db.execute("SELECT 1 FROM runs WHERE id = ?", (values["run"],)).fetchone()
            if known or not row["State"].startswith(ENDED):
                passed += 1
                continue
            insert(db, "runs", id=values["run"], tool="slurm", created_at=values["started_at"])
            insert(db, "attempts", **values)
            new += 1
    return new, passed


def _attempt(
    where: str, row: dict[str, str], energy_j: float, usd_per_gpu_h: float | None
) -> dict[str, Any]:
    """A job's allocation as a row of the ledger. Its time in the queue is not in ElapsedRaw."""
    wall_s = _number(row["ElapsedRaw"], f"{where}: ElapsedRaw")
    if not 0 <= wall_s < MOST_S:
        raise FileError(f"{wall_s:g} s cannot be", where=f"{where}: ElapsedRaw")
    if row["Start"] not in ("Unknown", "None", ""):
        parse_time(row["Start"], f"{where}: Start")
    gpus = gpus_of(row.get("AllocTRES", ""))
    if gpus > MOST_GPUS:
        raise FileError(f"{gpus} GPUs cannot be", where=f"{where}: AllocTRES")
    price = None if usd_per_gpu_h is None else usd_per_gpu_h * gpus
    state = row["State"].split()[0] if row["State"].split() else ""
    return {
        "run": f"slurm:{row['JobID']}:{row['Start']}", "user": row["User"],
        "project": row.get("Account") or None, "tags": json.dumps([]), "started_at": row["Start"],
        "ended_at": row.get("End"), "state": DONE.get(state, "failed"), "reason": row["State"],
        "machine": row.get("NodeList") or "slurm", "accelerators": gpus, "price_usd_per_h": price,
        "price_source": None if price is None else "--usd-per-gpu-h", "wall_s": wall_s,
        "cost_usd": None if price is None else price * wall_s / 3600,
        "gpu_hours": gpus * wall_s / 3600,
        "energy_kwh": energy_j / 3.6e6 if energy_j > 0 else None,
        "beats": 0, "beat_s": 0.0, "next_s": 0.0,
    }  # fmt: skip

"""Which part of the ledger a bill is about: from its own columns of dates, or as a person says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from outlay.profiles.errors import FileError, UsageError

COLUMNS = (
    ("ChargePeriodStart", "ChargePeriodEnd"),
    ("BillingPeriodStart", "BillingPeriodEnd"),
    ("lineItem/UsageStartDate", "lineItem/UsageEndDate"),
    ("bill/BillingPeriodStartDate", "bill/BillingPeriodEndDate"),
    ("started_at", "ended_at"),
    ("start", "end"),
)
"""Start and end of what a line charges, the first pair that is there: FOCUS, AWS, ours, others."""
YEARS = range(1980, 2200)
"""In which something was rented."""
_AMOUNTS = ("wall_s", "cost_usd", "gpu_hours", "energy_kwh", "co2e_kg")


@dataclass(frozen=True, kw_only=True)
class Period:
    """From, and until but without; UTC. Null = open."""

    start: datetime | None = None
    end: datetime | None = None

    def __post_init__(self) -> None:
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise UsageError(f"no time is in the period {self}", do="give --from before --until")

    def __str__(self) -> str:
        start, end = (
            "…" if t is None else t.isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
            for t in (self.start, self.end)
        )
        return f"{start} to {end} UTC"

    def or_else(self, other: Period | None) -> Period | None:
        """Its open ends from the other; null where all is open."""
        if other is None:
            return self if self.start or self.end else None
        try:
            return Period(start=self.start or other.start, end=self.end or other.end)
        except UsageError:  # the other lies wholly outside
            return self

    def within(self, other: Period) -> Period | None:
        """What both hold; null where that is nothing."""
        starts = [t for t in (self.start, other.start) if t is not None]
        ends = [t for t in (self.end, other.end) if t is not None]
        start, end = max(starts, default=None), min(ends, default=None)
        if start is not None and end is not None and start >= end:
            return None
        return Period(start=start, end=end)

    def holds(self, moment: datetime) -> bool:
        return (self.start is None or self.start <= moment) and (
            self.end is None or moment < self.end
        )

    def share(self, began: datetime, ended: datetime) -> float:
        """Part of an attempt's time that lies within."""
        whole_s = (ended - began).total_seconds()
        if whole_s <= 0:
            return float(self.holds(began))
        first = began if self.start is None else max(began, self.start)
        last = ended if self.end is None else min(ended, self.end)
        return max(0.0, (last - first).total_seconds()) / whole_s


def parse_time(text: str, where: str) -> datetime:
    """ISO 8601, a day or a moment; without a zone it is UTC, as providers bill."""
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise FileError(
            f"{text!r} is not a date", where=where, do="give it as in 2026-11-24 or with a time"
        ) from None
    if found.year not in YEARS:
        raise FileError(
            f"{text!r} cannot be meant", where=where, why=f"the year {found.year} is far away"
        )
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def asked(start: str | None, until: str | None) -> Period:
    """Of --from and --until."""
    return Period(
        start=None if start is None else parse_time(start, "--from"),
        end=None if until is None else parse_time(until, "--until"),
    )


def of_row(row: Mapping[str, str], where: str) -> tuple[datetime, datetime] | None:
    """What a line of a bill charges for; null where it has no dates."""
    for start, end in COLUMNS:
        if row.get(start):
            began = parse_time(row[start], f"{where}: {start}")
            if row.get(end):
                return began, parse_time(row[end], f"{where}: {end}")
            is_day = len(row[start].strip()) == len("2026-11-24")
            return began, began + timedelta(days=1) if is_day else began
    return None


def spanned(found: Iterable[tuple[datetime, datetime]]) -> Period | None:
    """From the first start to the last end; null where nothing has dates."""
    both = list(found)
    if not both:
        return None
    start, end = min(b for b, _ in both), max(e for _, e in both)
    return Period(start=start, end=end if end > start else start + timedelta(days=1))


def within(
    rows: Sequence[dict[str, Any]], period: Period, *, months: bool = False
) -> list[dict[str, Any]]:
    """Attempts of the ledger, each with the part of its amounts that the period's share of its time has,
    and as started where that part begins. With `months` a part for each month (UTC) that it ran in."""
    parts = []
    for row in rows:
        if not row["started_at"] or row["started_at"] in ("Unknown", "None"):
            continue  # a job of Slurm that never began: it has used nothing
        began = parse_time(row["started_at"], f"the ledger's {row['run']}")
        try:
            ended = began + timedelta(seconds=row["wall_s"] or 0.0)
        except OverflowError:
            raise FileError(
                f"{row['wall_s']:g} s from {row['started_at']} cannot be",
                where=f"the ledger's {row['run']}",
            ) from None
        for part in _months(began, ended) if months else [Period()]:
            if (both := part.within(period)) is None:
                continue
            share = both.share(began, ended)
            if share > 0:
                scaled = {k: None if row[k] is None else row[k] * share for k in _AMOUNTS}
                first = began if both.start is None else max(began, both.start)
                parts.append({**row, **scaled, "started_at": first.isoformat()})
    return parts


def _months(began: datetime, ended: datetime) -> list[Period]:
    """From the one that something began in to the one that it ended in."""
    found, first = [], began.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    while first <= ended:
        following = (first + timedelta(days=32)).replace(day=1)
        found.append(Period(start=first, end=following))
        first = following
    return found

"""The ledger as rows and sums, for people and for other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from outlay.profiles.errors import UnknownName, UsageError
from outlay.runner.ledger.store import Ledger

SCHEMA = "outlay/ledger@1"
KEYS = ("user", "project", "tag", "machine", "run", "tool", "state", "month")
"""What sums may be made by."""
ATTEMPT = (
    "run", "tool", "user", "project", "tags", "started_at", "ended_at", "state", "reason", "machine",
    "accelerator", "accelerators", "price_usd_per_h", "price_source", "steps", "wall_s", "cost_usd",
    "gpu_hours", "energy_kwh", "co2e_kg", "predicted_low_s", "predicted_s", "predicted_high_s",
    "predicted_usd",
)  # fmt: skip
SUM = ("runs", "attempts", "wall_s", "cost_usd", "gpu_hours", "energy_kwh", "co2e_kg")
RUN = (
    "run", "user", "project", "state", "attempts", "wall_s", "cost_usd", "gpu_hours",
    "predicted_usd", "cost_over_predicted",
)  # fmt: skip
_AMOUNTS = ("wall_s", "cost_usd", "gpu_hours", "energy_kwh", "co2e_kg")


def attempts(ledger: Ledger) -> list[dict[str, Any]]:
    """Every attempt, the oldest first, with what was predicted for its run."""
    ledger.totals()  # those whose process died are charged first
    rows = ledger.rows("SELECT * FROM attempts a JOIN runs r ON r.id = a.run ORDER BY a.id")
    return [
        {key: json.loads(row[key]) if key == "tags" else row[key] for key in ATTEMPT}
        for row in rows
    ]


def budgets(ledger: Ledger) -> list[dict[str, Any]]:
    """How each project budget stands, in its unit."""
    projects = ledger.rows("SELECT DISTINCT project FROM budgets ORDER BY project")
    return [
        {
            "project": row["project"], "kind": t.budget.kind, "budget": t.budget.amount,
            "spent": t.spent, "reserved": max(0.0, t.charged - t.spent), "left": t.left,
            "alive": t.alive,
        }
        for row in projects
        for t in ledger.totals(row["project"])
    ]  # fmt: skip


def by_run(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run: its attempts together, predicted beside measured."""
    runs = []
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        total, last = _sums(mine), mine[-1]
        predicted = last["predicted_usd"]
        ratio = total["cost_usd"] / predicted if predicted and total["cost_usd"] else None
        both = {**last, **total, "predicted_usd": predicted, "cost_over_predicted": ratio}
        runs.append({key: both[key] for key in RUN})
    return runs


def by_keys(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Sums by user, project, tag …; a run with two tags counts under each, one with none under ''."""
    for key in keys:
        if key not in KEYS:
            raise UnknownName("column", key, KEYS, where="--by")
    if len(set(keys)) != len(keys):
        raise UsageError(f"{','.join(keys)} names a column twice", where="--by")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        for tag in (row["tags"] or [""]) if "tag" in keys else [""]:
            found = {**row, "tag": tag, "month": row["started_at"][:7]}
            groups.setdefault(tuple(found[key] or "" for key in keys), []).append(row)
    return [
        {**dict(zip(keys, group, strict=True)), **_sums(mine)}
        for group, mine in sorted(groups.items())
    ]


def _sums(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Null where nothing of it is known: not zero."""
    total: dict[str, Any] = {"runs": len({row["run"] for row in rows}), "attempts": len(rows)}
    for key in _AMOUNTS:
        known = [row[key] for row in rows if row[key] is not None]
        total[key] = sum(known) if known else None
    return total


def to_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """With a header, also where there are no rows."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    for row in rows:
        tags = {"tags": " ".join(row["tags"])} if "tags" in row else {}
        writer.writerow({**row, **tags})
    return out.getvalue()


def to_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Plain columns, numbers to the right; a dash for what is not known."""
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [
        all(row[column] is None or isinstance(row[column], int | float) for row in rows)
        for column in columns
    ]
    lines = []
    for line in [list(columns), *cells]:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""`outlay compare RUN`: what the plan predicted, beside what the run measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.options import format_option
from outlay.profiles.units import format_bytes, format_seconds, format_usd

if TYPE_CHECKING:
    from rich.console import Console

    from outlay.runner.memory_probe import MemoryReading

SCHEMA_COMPARISON = "outlay/comparison@1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity. `error` is predicted/measured − 1; null where there is no measurement."""

    quantity: str
    unit: str
    predicted: float | None
    low: float | None
    high: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        if self.measured is None or self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high


def comparison(run_dir: Path, memory: list[MemoryReading] | None = None) -> list[Row]:
    """Rows of a run's folder. `memory`: readings of a separate memory run, where it was made."""
    from outlay.planner.spec.files import check_schema, parse, read_mapping
    from outlay.planner.spec.measurement import SCHEMA_MEASUREMENT, Measurement
    from outlay.profiles.errors import UsageError
    from outlay.runner.folder import RunFolder

    folder = RunFolder(run_dir)
    folder.require_run()
    if not folder.measurement.exists():
        raise UsageError("this run has no measurement yet", where=str(folder.measurement))
    plan = folder.read_plan()
    value = read_mapping(folder.measurement)
    check_schema(value, SCHEMA_MEASUREMENT, folder.measurement)
    m = parse(Measurement, value, path=folder.measurement)
    e = plan.estimate
    rows = _memory_rows(e, m, memory)
    step = e["step"]
    rows.append(_row("step time", "s", step, "time_s", "low_s", "high_s", m.step_s))
    batch = plan.job.tokens_per_step
    rows.append(
        Row(
            quantity="throughput",
            unit="tokens/s",
            predicted=None if step is None else batch / step["time_s"],
            low=None if step is None else batch / step["high_s"],
            high=None if step is None else batch / step["low_s"],
            measured=m.tokens_per_s,
        )
    )
    rows.append(_cost_row(folder.root, plan, e))
    return rows


def _row(
    name: str, unit: str, source: Any, key: str, low: str, high: str, measured: float | None
) -> Row:
    if source is None:
        return Row(quantity=name, unit=unit, predicted=None, low=None, high=None, measured=measured)
    return Row(
        quantity=name, unit=unit, predicted=source[key], low=source[low], high=source[high],
        measured=measured,
    )  # fmt: skip


def _memory_rows(e: dict[str, Any], m: Any, memory: list[MemoryReading] | None) -> list[Row]:
    parts = e["memory"]
    if memory:
        kind, measured = memory[0].kind, max(r.growth_bytes for r in memory)
    elif m.memory_bytes:
        kind, measured = m.memory_kind, max(m.memory_bytes)
    else:
        return [
            Row(
                quantity="peak memory a rank",
                unit="bytes",
                predicted=parts["device_bytes"],
                low=parts["low_bytes"],
                high=parts["high_bytes"],
                measured=None,
            )
        ]
    # The interval of the whole holds for what is compared: its runtime part is known apart.
    predicted = parts["device_bytes"] if kind == "device" else parts["allocated_bytes"]
    scale = predicted / parts["device_bytes"]
    return [
        Row(
            quantity=f"peak memory a rank ({kind})", unit="bytes", predicted=predicted,
            low=parts["low_bytes"] * scale, high=parts["high_bytes"] * scale, measured=measured,
        )
    ]  # fmt: skip


def _cost_row(root: Path, plan: Any, e: dict[str, Any]) -> Row:
    """Cost of the steps: predicted and measured step time × steps done × price, the same extent."""
    import json

    from outlay.runner.folder import RunFolder

    folder = RunFolder(root)
    steps = 0
    if folder.outcome.exists():
        steps = int(json.loads(folder.outcome.read_text())["steps"])
    price, step = plan.cluster.price_usd_per_h, e["step"]
    measured_s = json.loads(folder.measurement.read_text())["step_s"]
    if price is None or step is None or not steps:
        return Row(
            quantity="cost of the steps",
            unit="USD",
            predicted=None,
            low=None,
            high=None,
            measured=None,
        )
    usd = price / 3600 * steps
    return Row(
        quantity=f"cost of {steps} steps", unit="USD", predicted=step["time_s"] * usd,
        low=step["low_s"] * usd, high=step["high_s"] * usd,
        measured=None if measured_s is None else measured_s * usd,
    )  # fmt: skip


def print_comparison(console: Console, rows: list[Row]) -> None:
    """A table for a person."""
    from outlay.planner.report.terminal import between, table

    show: dict[str, Any] = {
        "bytes": format_bytes,
        "s": format_seconds,
        "tokens/s": lambda v: f"{v:,.0f}",
        "USD": format_usd,
    }
    grid = table("", "predicted (90 % interval)", "measured", "error", "inside")
    for row in rows:
        f = show[row.unit]
        predicted = "unknown"
        if row.predicted is not None and row.low is not None and row.high is not None:
            predicted = between(row.low, row.predicted, row.high, f)
        grid.add_row(
            row.quantity + (" (tokens/s)" if row.unit == "tokens/s" else ""),
            predicted,
            "not measured" if row.measured is None else f(row.measured),
            "" if row.error is None else f"{row.error:+.1%}",
            {None: "", True: "yes", False: "no"}[row.inside],
        )
    console.print(grid)


@click.command()
@click.argument("what", nargs=-1, required=True)
@format_option("table", "json")
def compare(what: tuple[str, ...], format_: str) -> None:
    """Predicted against measured, for a run; or several plans side by side.

    WHAT is the folder of one run, or two and more plan files or run folders.
    """
    if len(what) > 1 or Path(what[0]).is_file():
        _compare_plans(what, format_)
        return
    rows = comparison(Path(what[0]))
    if format_ == "json":
        from outlay.planner.spec.files import to_json

        click.echo(
            to_json({
                "schema": SCHEMA_COMPARISON,
                "rows": [
                    {**dataclasses.asdict(r), "error": r.error, "inside": r.inside} for r in rows
                ],
            }),
            nl=False,
        )  # fmt: skip
        return
    from outlay.planner.commands.question import console

    print_comparison(console(), rows)


def _compare_plans(what: tuple[str, ...], format_: str) -> None:
    """Side by side; the first is what the others are measured against."""
    from outlay.planner.commands.question import console
    from outlay.planner.planning import read_plan
    from outlay.planner.report.plans import compare_plans, print_plans
    from outlay.planner.spec.files import to_json
    from outlay.profiles.errors import UsageError
    from outlay.runner.folder import RunFolder

    if len(what) < 2:
        raise UsageError(
            f"{what[0]} is one plan", do="give two or more to compare, or the folder of a run"
        )
    plans = []
    for name in what:
        if Path(name).is_file():
            plans.append((name, read_plan(name)))
            continue
        folder = RunFolder(Path(name))
        folder.require_run()
        plans.append((name, folder.read_plan()))
    value = compare_plans(plans)
    if format_ == "json":
        click.echo(to_json(value), nl=False)
    else:
        print_plans(console(), value)

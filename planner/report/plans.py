"""Several plans side by side: what each needs, and whether they answer the same question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from outlay.planner.report.terminal import table
from outlay.planner.spec.plan import Plan
from outlay.profiles.units import format_bytes, format_count, format_seconds, format_usd

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_PLANS = "outlay/plans@1"

QUESTION: dict[str, Callable[[Plan], Any]] = {
    "model": lambda p: p.model.name,
    "tokens": lambda p: p.job.tokens,
    "seq_len": lambda p: p.job.seq_len,
    "global_batch": lambda p: p.job.global_batch,
    "precision": lambda p: p.job.precision,
    "optimizer": lambda p: p.job.optimizer.name,
    "method": lambda p: "all weights" if p.job.finetune is None else p.job.finetune.method,
}
"""What must be the same for two plans to be two answers to one question."""


def plan_row(name: str, plan: Plan) -> dict[str, Any]:
    """The figures of one plan."""
    e = plan.estimate
    run, step, throughput = e["run"], e["step"], e["throughput"]
    return {
        "plan": name,
        "hardware": f"{plan.cluster.ranks} x {plan.cluster.accelerator.name}",
        "strategy": plan.strategy.label(),
        "device_bytes": e["memory"]["device_bytes"],
        "usable_bytes": plan.cluster.usable_bytes,
        "oom_probability": e["oom_probability"],
        "step_s": None if step is None else step["time_s"],
        "tokens_per_s": None if throughput is None else throughput["tokens_per_s"],
        "mfu": None if throughput is None else throughput["mfu"],
        "time_s": run["time_s"],
        "usd": None if run["cost_usd"] is None else run["cost_usd"]["expected"],
        "energy_kwh": run["energy_kwh"],
        "limited_by": plan.limited_by,
    }


def compare_plans(plans: Sequence[tuple[str, Plan]]) -> dict[str, Any]:
    """Rows by plan, and in which points the questions differ."""
    differ = {
        key: {name: get(plan) for name, plan in plans}
        for key, get in QUESTION.items()
        if len({get(plan) for _, plan in plans}) > 1
    }
    return {
        "schema": SCHEMA_PLANS,
        "plans": [plan_row(name, plan) for name, plan in plans],
        "questions_differ": differ,
    }


_SHOW: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("hardware", "hardware", str),
    ("strategy", "strategy", str),
    ("device_bytes", "memory a rank", format_bytes),
    ("usable_bytes", "of usable", format_bytes),
    ("oom_probability", "risk of running out", lambda v: f"{v:.1%}"),
    ("step_s", "step time", format_seconds),
    ("tokens_per_s", "tokens/s", lambda v: f"{v:,.0f}"),
    ("mfu", "MFU", lambda v: f"{v:.1%}"),
    ("time_s", "the run", format_seconds),
    ("usd", "cost", format_usd),
    ("energy_kwh", "energy", lambda v: f"{v:,.4g} kWh"),
    ("limited_by", "limited by", str),
)
_BETTER_LESS = ("step_s", "time_s", "usd", "energy_kwh")


def print_plans(console: Console, value: dict[str, Any]) -> None:
    """One column a plan; behind a figure, how it stands to the first plan's."""
    rows = value["plans"]
    grid = table("", *(row["plan"] for row in rows))
    first = rows[0]
    for key, title, show in _SHOW:
        cells = []
        for row in rows:
            text = "unknown" if row[key] is None else show(row[key])
            comparable = key in _BETTER_LESS and row is not first and row[key] and first[key]
            cells.append(f"{text} ({row[key] / first[key] - 1:+.0%})" if comparable else text)
        grid.add_row(title, *cells)
    console.print(grid)
    for key, values in value["questions_differ"].items():
        shown = ", ".join(
            f"{name} {format_count(v) if key == 'tokens' else v}" for name, v in values.items()
        )
        console.print(f"Not the same question: {key} is {shown}.", highlight=False)

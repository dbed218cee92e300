"""Before a run: the flags of its limits, what it will cost, and whether to start it at all."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_seconds, format_usd, parse_seconds

if TYPE_CHECKING:
    from outlay.planner.spec.plan import Plan
    from outlay.runner.budget import Meter
    from outlay.runner.limits import Limits

F = TypeVar("F", bound=Callable[..., Any])


def limit_options(function: F) -> F:
    """How a run is metered, and what it does at its limits."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--when-over",
            type=click.Choice(["anneal", "cut", "stop", "ask"]),
            help="When the forecast exceeds the budget: end the learning rate within it (anneal, the "
            "default), keep the planned rate and end at the budget (cut), stop at once, or ask and go on "
            "as with anneal until there is an answer.",
        ),
        click.option("--rate", multiple=True,
                     help="USD for one of a currency, for --budget 5000eur: eur=1.08; repeatable."),
        click.option("--walltime", help="Of this start, e.g. 24h: stop, save and exit 75 in time."),
        click.option("--minimum-billing", help="Shortest time that is billed, e.g. 1h."),
        click.option("--power-w", type=float, help="Most that all of this machine draws, watts."),
        click.option("--pue", type=float, help="Power of the building over that of the machine."),
        click.option("--region", help="Where the electricity is from, for CO2e; a cloud's region."),
        click.option("--kgco2e-per-kwh", type=float, help="Of the electricity, instead of --region."),
        click.option("--project", help="Project budget to draw on and to book to (outlay ledger)."),
        click.option("--tag", multiple=True, help="For the ledger; repeatable."),
        click.option("--ledger", help="The ledger's file, or `off`."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def limits_from(before: Limits, flags: dict[str, Any]) -> Limits:
    """The flags of this call over the limits that a run has."""
    from outlay.runner.limits import carbon_of_region

    new: dict[str, Any] = {"walltime_s": None}  # of one start: not that of the one before
    for name in ("when_over", "power_w", "pue", "kgco2e_per_kwh", "project", "ledger"):
        if flags[name] is not None:
            new[name] = flags[name]
    if flags["walltime"] is not None:
        new["walltime_s"] = parse_seconds(flags["walltime"], where="--walltime")
    if flags["minimum_billing"] is not None:
        new["minimum_s"] = parse_seconds(flags["minimum_billing"], where="--minimum-billing")
    if flags["tag"]:
        new["tags"] = tuple(flags["tag"])
    if flags["region"] is not None:
        if flags["kgco2e_per_kwh"] is not None:
            raise UsageError("--region and --kgco2e-per-kwh say the same thing", do="give one")
        new["kgco2e_per_kwh"], new["carbon_source"] = carbon_of_region(flags["region"])
    elif flags["kgco2e_per_kwh"] is not None:
        new["carbon_source"] = "--kgco2e-per-kwh"
    return dataclasses.replace(before, **new)


def require_affordable(plan: Plan, meter: Meter, startup_s: float, *, done: int = 0) -> None:
    """Refuse a run whose optimistic end is above its budget, and name what would fit."""
    from outlay.runner.refusal import how_to_raise, limit_name, require_minimum

    require_minimum(meter)
    low_s, step_s, high_s = _step_s(plan)
    remaining_s = meter.remaining_s()
    left = plan.job.steps - done
    if remaining_s is None or low_s is None or step_s is None or high_s is None:
        return
    optimistic_s = startup_s + left * low_s
    if optimistic_s <= remaining_s:
        return
    fits = int((remaining_s - startup_s) / high_s)
    now_s = meter.spent().wall_s
    raised = how_to_raise(meter, now_s + startup_s + left * step_s)
    do = f"{raised} (expected; {_range(plan, meter, startup_s, left)} in all)"
    if fits > 0:
        do += f", or plan --steps {done + fits:,} (fits even at the slow end of the estimate)"
    raise NotFeasible(
        f"{limit_name(meter)} is too small for {left:,} steps",
        why=f"even at the fast end of the estimate they take {format_seconds(optimistic_s)}, "
        f"{meter.in_words(now_s + optimistic_s)}",
        do=do + ", or give --when-over anneal: as many steps as the money buys",
    )


def _step_s(plan: Plan) -> tuple[float | None, float | None, float | None]:
    step = plan.estimate.get("step", {})
    return step.get("low_s"), step.get("time_s"), step.get("high_s")


def _range(plan: Plan, meter: Meter, startup_s: float, steps: int) -> str:
    low_s, _, high_s = _step_s(plan)
    assert low_s is not None and high_s is not None
    now_s = meter.spent().wall_s + startup_s
    return f"{meter.in_words(now_s + steps * low_s)} to {meter.in_words(now_s + steps * high_s)}"


def summary(plan: Plan, meter: Meter, limits: Limits, run_dir: str = "RUN") -> str:
    """What is about to be started, for a person who pays."""
    low_s, step_s, high_s = _step_s(plan)
    lines = [f"{plan.model.name}, {plan.job.steps:,} steps, {plan.strategy.label()}"]
    if low_s is not None and step_s is not None and high_s is not None:
        steps, price = plan.job.steps, plan.cluster.price_usd_per_h
        low, mid, high = (format_seconds(steps * s) for s in (low_s, step_s, high_s))
        lines.append(f"predicted {mid} ({low} to {high}) of steps")
        if price:
            low, mid, high = (format_usd(steps * s * price / 3600) for s in (low_s, step_s, high_s))
            lines[-1] += f", {mid} ({low} to {high})"
    budgets = " and ".join([str(b) for b in plan.job.budget] + _from_project(meter)) or "none"
    lines.append(f"budget {budgets}; when it is too small for all steps: {limits.when_over}")
    if limits.when_over == "ask":
        from outlay.runner.question import how_asked

        lines.append(how_asked(run_dir))
    if meter.energy is not None:
        pue, source = limits.used_pue()
        lines.append(f"energy {meter.energy.source} ({source})" if pue > 1 else meter.energy.source)
    return "\n".join(lines)


def _from_project(meter: Meter) -> list[str]:
    """What the project allows, where that ends before the run's own budgets."""
    if meter.binding is None or not meter.bound_by_project:
        return []
    return [f"{meter.binding} (what project {meter.project!r} has left)"]


def confirm(text: str, *, yes: bool) -> None:
    """Show, and ask where there is a person; Ctrl-C and no end without a start."""
    click.echo(text, err=True)
    if yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    if not click.confirm("Start it?", default=True, err=True):
        raise click.exceptions.Exit(0)

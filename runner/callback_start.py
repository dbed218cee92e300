"""What a guard is given, looked at before anything of it counts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.money import parse_rates
from outlay.profiles.units import format_seconds, format_usd
from outlay.runner.budget import SHUTDOWN_S, Bounds, Meter, measure_write_rate
from outlay.runner.refusal import how_to_raise, limit_name

if TYPE_CHECKING:
    from outlay.runner.reshape import Reshaper

WHEN_OVER = (None, "anneal", "cut", "stop")
_METERING = ("energy", "kgco2e_per_kwh", "minimum_s")
_FIGURES = {
    "price_usd_per_h": "a price of {} USD an hour",
    "minimum_s": "a minimum bill of {} s",
    "save_s": "a save of {} s",
    "keep_s": "keeping {} s",
    "kgco2e_per_kwh": "an intensity of {} kg CO2e a kWh",
}


def parse_budgets(budget: str | Sequence[str], rate: str | Sequence[str]) -> tuple[Budget, ...]:
    """A wrong one is told before anything is trained."""
    budgets, rates = texts("budget", budget), texts("rate", rate)
    known = parse_rates(rates)
    return tuple(Budget.parse(text, where="budget", rates=known) for text in budgets)


def texts(where: str, given: Any) -> list[str]:
    """One text, or several."""
    found = [given] if isinstance(given, str) else given
    if isinstance(found, dict) or not isinstance(found, Sequence):
        raise UsageError(
            f"{given!r} is no text", where=where, do='give it as in "2usd", or a list of texts'
        )
    for text in found:
        if not isinstance(text, str):
            raise UsageError(f"{text!r} is no text", where=where, do='give it as in "2usd"')
    return list(found)


def check_names(tags: Sequence[str], **names: Any) -> None:
    """Raises UsageError for a name that is no text, or empty, and for tags that are one word."""
    for where, name in names.items():
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise UsageError(f"{name!r} is no name", where=where)
    if isinstance(tags, str):
        raise UsageError(f"{tags!r} is one text", where="tags", do=f"give a list: [{tags!r}]")
    texts("tags", tags)


def check_options(
    when_over: str | None, started_s: float | None, now_s: float, steps: int | None
) -> None:
    """Raises UsageError for a policy that a guard has not, a start that is still to come, no steps."""
    if when_over not in WHEN_OVER:
        known = ", ".join(str(word) for word in WHEN_OVER[1:])
        raise UsageError(f"{when_over!r} is none of {known}", where="when_over")
    if started_s is not None and not _number("started_s", started_s) <= now_s:
        raise UsageError(
            f"a start at {started_s} s is not in the past (now: {now_s:.1f} s)", where="started_s"
        )
    if steps is not None and _whole("steps", steps) < 1:
        raise UsageError(f"a loop of {steps} steps has nothing to guard", where="steps")


def check_figures(accelerators: int, metering: dict[str, Any], **figures: float | None) -> None:
    """Raises UsageError for what would make money out of time, and for options that are none."""
    if unknown := sorted(set(metering) - set(_METERING)):
        raise UsageError(f"unknown option {', '.join(unknown)}", where="Guard")
    if _whole("accelerators", accelerators) < 1:
        raise UsageError(f"{accelerators} accelerators make no sense", where="accelerators")
    energy = metering.get("energy")
    if energy is not None and not callable(getattr(energy, "kwh", None)):
        raise UsageError(f"{energy!r} is no meter of energy", where="energy")
    figures |= {k: v for k, v in metering.items() if k != "energy"}
    for where, value in figures.items():
        if value is not None and not 0 <= _number(where, value) < 1e9:
            raise UsageError(f"{_FIGURES[where].format(value)} makes no sense", where=where)


def check_calls(**calls: Any) -> None:
    """Raises UsageError for what is to be called and cannot be."""
    for where, given in calls.items():
        if given is not None and not callable(given):
            raise UsageError(f"{given!r} cannot be called", where=where)


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{value!r} is no number", where=where)
    return float(value)


def _whole(where: str, value: Any) -> int:
    if _number(where, value) % 1 != 0:  # of nan and infinity it is nan
        raise UsageError(f"{value!r} is no whole number", where=where)
    return int(value)


def path_text(where: str, given: Any) -> str | None:
    """A path as text; null stays null."""
    if given is None or isinstance(given, str | os.PathLike):
        return None if given is None else str(given)
    raise UsageError(f"{given!r} is no path", where=where)


def of_plan(
    plan: str | Path | None, price_usd_per_h: float | None
) -> tuple[float | None, tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """(price, predicted seconds a step, predicted seconds of all steps)."""
    if plan is None:
        return price_usd_per_h, None, None
    from outlay.planner.planning import read_plan

    found = read_plan(str(plan))
    step = found.estimate.get("step") or {}
    price = found.cluster.price_usd_per_h if price_usd_per_h is None else price_usd_per_h
    if step.get("time_s") is None:
        return price, None, None
    low, mid, high = (float(step[key]) for key in ("low_s", "time_s", "high_s"))
    steps = found.job.steps
    return price, (low, mid, high), (low * steps, mid * steps, high * steps)


def meter_of(budgets: list[Budget], drawn: list[Budget], **metering: Any) -> Meter:
    """Raises UsageError without a budget, NotFeasible where nothing of it is left."""
    if not budgets and not drawn:
        raise UsageError("there is no budget to keep", do="give budget, or a project that has one")
    meter = Meter(budgets, drawn=drawn, **metering)
    if short := next((b for b in meter.budgets if meter.below_minimum(b)), None):
        price = meter.price_usd_per_h or 0.0
        raise NotFeasible(
            f"what is left of the budget of {short} is below the minimum bill of "
            f"{format_usd(price * meter.minimum_s / 3600)}",
            why=f"each start is billed for at least {format_seconds(meter.minimum_s)} (minimum_s) at "
            f"{format_usd(price)} an hour",
            do="raise the budget, or give another run",
        )
    left_s = meter.remaining_s()
    if left_s is not None and left_s <= 0:
        raise NotFeasible(
            f"nothing is left of {limit_name(meter)}",
            why=f"{meter.spent().wall_s:.1f} s are spent, those before this start included",
            do="raise the budget, or give another run",
        )
    return meter


def require_room(meter: Meter, bounds: Bounds, step_s: float | None, save_source: str) -> None:
    """Raises NotFeasible where what is left does not hold one step and the end, as far as known."""
    left_s, end_s = meter.remaining_s(), bounds.finish_s()
    if left_s is None or left_s >= (step_s or 0.0) + end_s:
        return
    parts = ["a step is not known" if step_s is None else f"a step takes {format_seconds(step_s)}"]
    if (save_s := bounds.save.upper_s()) > 0:
        parts.append(f"a save {format_seconds(save_s)} ({save_source})")
    if bounds.export.upper_s() + bounds.after_s > 0:
        parts.append(f"the rest {format_seconds(bounds.export.upper_s() + bounds.after_s)}")
    parts.append(f"the end {format_seconds(SHUTDOWN_S)}")
    total_s = meter.spent().wall_s + (step_s or 0.0) + end_s
    raised = how_to_raise(meter, total_s, "above")
    do = f"{raised}, and add the time to train in"
    if save_s > 0:
        do += "; or give save_s=, where a save takes less"
    earlier_s = meter.earlier_s
    rest = "what is left of " if earlier_s > 0 and not meter.bound_by_project else ""
    raise NotFeasible(
        f"{rest}{limit_name(meter)} is too small to train anything",
        why=(f"{format_seconds(earlier_s)} were used by earlier starts; " if earlier_s > 0 else "")
        + f"{format_seconds(left_s)} of it are left; {', '.join(parts)}",
        do=do,
    )


def reshaper(
    schedulers: Sequence[Any], steps: int | None, say: Callable[[str], None]
) -> Reshaper | None:
    """For the policy `anneal`; null, said, where these schedulers cannot end earlier than planned."""
    from outlay.runner.reshape import Reshaper, unfit

    why = "the number of steps is not known" if steps is None else unfit(schedulers)
    if why is None and steps is not None:
        return Reshaper(schedulers, steps)
    say(
        f"outlay: the learning rate cannot be made to end within the budget: {why}; "
        "a training that is longer stops there, with the rate that it has then"
    )
    return None


def expected_save(folder: Path, parameters: int) -> dict[str, Any]:
    """Options of a guard: what a save of so many parameters takes at the rate of this disk."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Bounds(
        step_guess_s=0.0, parameters=parameters, write_bytes_per_s=measure_write_rate(folder)
    )
    return {
        "save_s": written.save.upper_s(),
        "save_source": "by the model's size and the rate of the disk, none is timed yet",
    }


def check_known(options: dict[str, Any], guard: Callable[..., object]) -> None:
    """Raises UsageError for an option that a guard inside a Trainer has not, before it is built."""
    trainers = {"steps", "save", "scheduler"}
    if given := sorted(trainers & set(options)):
        raise UsageError(
            f"{', '.join(given)} is the Trainer's own", where="Guard", do="leave it out"
        )
    known = {*inspect.signature(guard).parameters, *_METERING} - {"metering"}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"unknown option {', '.join(unknown)}", where="Guard")

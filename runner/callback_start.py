"""What a guard is given, looked at before anything of it counts."""

from __future__ import annotations

import inspect
from typing import Any

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.runner.budget import Meter

WHEN_OVER = (None, "anneal", "cut", "stop")


def check_options(when_over: str | None, started_s: float | None, now_s: float) -> None:
    """Raises UsageError for a policy that a guard has not, or a start that is still to come."""
    if when_over not in WHEN_OVER:
        known = ", ".join(str(word) for word in WHEN_OVER[1:])
        raise UsageError(f"{when_over!r} is none of {known}", where="when_over")
    if started_s is not None and not started_s <= now_s:
        raise UsageError(
            f"a start at {started_s} s is not in the past (now: {now_s:.1f} s)", where="started_s"
        )


def check_figures(price: float | None, accelerators: int, minimum_s: float) -> None:
    """Raises UsageError for what would make money out of time."""
    if price is not None and not 0 <= price < 1e9:
        raise UsageError(f"a price of {price} USD an hour makes no sense", where="price_usd_per_h")
    if accelerators < 1:
        raise UsageError(f"{accelerators} accelerators make no sense", where="accelerators")
    if not 0 <= minimum_s < 1e9:
        raise UsageError(f"a minimum bill of {minimum_s} s makes no sense", where="minimum_s")


def meter_of(budgets: list[Budget], **metering: Any) -> Meter:
    """Raises UsageError without a budget, NotFeasible where nothing of it is left."""
    if not budgets:
        raise UsageError("there is no budget to keep", do="give budget, or a project that has one")
    known = inspect.signature(Meter.__init__).parameters
    unknown = sorted(set(metering) - set(known))
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}", where="Guard")
    meter = Meter(budgets, **metering)
    left_s = meter.remaining_s()
    if left_s is not None and left_s <= 0:
        raise NotFeasible(
            f"nothing is left of the budget of {meter.limit_text()}",
            why=f"{meter.spent().wall_s:.1f} s are spent, those before this start included",
            do="raise the budget, or give another run",
        )
    return meter

"""A start that its limits cannot hold is refused: whose limit it is, and what would do."""

from __future__ import annotations

from outlay.profiles.errors import NotFeasible
from outlay.profiles.units import format_seconds, format_usd
from outlay.runner.amounts import in_unit
from outlay.runner.budget import SHUTDOWN_S, Meter, amount_of


def require_start(
    meter: Meter, startup_s: float, *, source: str, walltime_s: float | None = None
) -> None:
    """Refuse, before anything is started, limits that even the start would use up."""
    require_minimum(meter)
    least_s, remaining_s = startup_s + SHUTDOWN_S, meter.remaining_s()
    takes = f"starting and ending takes at least {format_seconds(least_s)} ({source})"
    if remaining_s is not None and remaining_s < least_s:
        total_s = meter.spent().wall_s + least_s
        raise NotFeasible(
            f"{limit_name(meter)} is too small to train anything",
            why=f"{format_seconds(max(0.0, remaining_s))} of it are left; {takes}",
            do=f"{how_to_raise(meter, total_s, 'above')}, and add the time to train in",
        )
    if walltime_s is not None and walltime_s < meter.elapsed_s() + least_s:
        raise NotFeasible(
            f"a wall time of {format_seconds(walltime_s)} is too short to train anything",
            where="--walltime",
            why=f"{format_seconds(meter.elapsed_s())} have passed; {takes}",
            do=f"give more than {format_seconds(meter.elapsed_s() + least_s)}, and add the time "
            "to train in",
        )


def require_minimum(meter: Meter) -> None:
    """Refuse a budget of money that is below the shortest bill of one start."""
    short = next((b for b in meter.budgets if meter.below_minimum(b)), None)
    if short is None:
        return
    assert meter.price_usd_per_h is not None
    spent_usd = meter.earlier.cost_usd or 0.0
    least_usd = meter.price_usd_per_h * meter.minimum_s / 3600
    left = format_usd(max(0.0, short.amount - spent_usd))
    if any(short is b for b in meter.own):
        whole = format_usd(short.amount)
        what = f"the {left} left of the budget of {whole} are" if spent_usd else ""
        what = what or f"the budget of {whole} is"
        do = f"raise it to {format_usd(spent_usd + least_usd)} or more"
    else:
        what = f"the {left} that project {meter.project!r} has left are"
        more = format_usd(spent_usd + least_usd - short.amount)
        do = f"raise its budget by {more} or more: {_command(meter)}"
    raise NotFeasible(
        f"{what} below the minimum bill of {format_usd(least_usd)}",
        why=f"each start is billed for at least {format_seconds(meter.minimum_s)} (--minimum-billing) "
        f"at {format_usd(meter.price_usd_per_h)} an hour",
        do=f"{do}; or give the --minimum-billing that holds, if that is shorter",
    )


def limit_name(meter: Meter) -> str:
    """The budget that ends first, and whose it is."""
    budget = meter.binding
    if budget is None or not (meter.project and meter.bound_by_project):
        return f"the budget of {meter.limit_text()}"
    left = max(0.0, budget.amount - amount_of(budget, meter.earlier))
    return f"what project {meter.project!r} has left, {in_unit(budget, left)},"


def how_to_raise(meter: Meter, total_s: float, word: str = "to") -> str:
    """What to do so that the whole run may take so long."""
    budget = meter.binding
    if budget is None or not (meter.project and meter.bound_by_project):
        return f"raise it {word} {meter.in_words(total_s)}"
    more = in_unit(budget, meter.amount_at(budget, total_s) - budget.amount)
    return f"raise its budget by {'more than ' if word == 'above' else ''}{more}: {_command(meter)}"


def _command(meter: Meter) -> str:
    return f"outlay ledger budget {meter.project} AMOUNT (`outlay ledger show` has what it is now)"

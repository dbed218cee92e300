"""An attempt of `run` in the ledger: entered before the ranks start, noted while they work, closed."""

from __future__ import annotations

import platform
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from outlay.planner.spec.job import Budget
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible, OutlayError, UsageError
from outlay.runner.amounts import in_unit
from outlay.runner.budget import Spent, amount_of
from outlay.runner.ledger import Entry, Ledger, OpenRun, Total, Want
from outlay.runner.limits import Limits

NEXT_S = 10.0
"""Between two entries, at most: charged to an attempt whose supervisor is killed."""
BEAT_WAIT_S = 0.25
"""For a ledger that somebody holds: the supervisor must be free to end what runs into its budget."""
OPEN_WAIT_S = 3.0
"""The same before the start, which is rented, too."""


class Booking:
    """The open attempt; without a ledger (`off`, or not usable) all calls do nothing.

    `warning`: why there is none, where one was wanted.
    """

    def __init__(self, run: OpenRun | None, ledger: Ledger | None, warning: str = "") -> None:
        self._run, self._ledger, self.warning = run, ledger, warning

    def drawn(self, earlier: Spent) -> tuple[Budget, ...]:
        """What the project's budgets allow this run, over all its attempts."""
        reserved = {} if self._run is None else self._run.reserved
        budgets = (Budget(kind=kind, amount=amount) for kind, amount in reserved.items())
        return tuple(replace(b, amount=b.amount + amount_of(b, earlier)) for b in budgets)

    def beat(self, spent: Spent, steps: int) -> bool:
        """False = the reservation is gone: stop."""
        return self._run is None or self._run.heartbeat(
            spent, steps=steps, next_s=NEXT_S, wait_s=BEAT_WAIT_S
        )

    def close(self, spent: Spent, *, state: str, reason: str, steps: int) -> None:
        """Once; later calls do nothing. One that was refused leaves nothing."""
        if self._run is not None and self._ledger is not None:
            if state == "refused":
                self._run.withdraw()
            else:
                self._run.close_run(spent, state=state, reason=reason, steps=steps)
            self._ledger.close()
        self._run = self._ledger = None


def allowed(plan: Plan, limits: Limits, earlier: Spent) -> tuple[Budget, ...]:
    """What the project's budgets would allow this run now, over all its attempts; enters nothing."""
    if limits.project is None:
        return ()
    with closing(_opened(limits)) as ledger:
        totals = _totals(ledger, limits.project)
    own = {b.kind: b for b in plan.job.budget}
    return tuple(_allowed(limits.project, t, own.get(t.budget.kind), earlier) for t in totals)


def _allowed(project: str, total: Total, own: Budget | None, earlier: Spent) -> Budget:
    """All that is left of one, or the run's own budget where that is less."""
    budget = total.budget
    if not total.left > 0:
        held = max(0.0, total.charged - total.spent)
        do = f"raise it: outlay ledger budget {project} AMOUNT"
        raise NotFeasible(
            f"project {project!r} has nothing left of its budget of {budget}",
            why=f"{in_unit(budget, total.spent)} are spent, {in_unit(budget, held)} are reserved by "
            f"{total.alive} runs that go on",
            do=f"wait until those end, or {do}" if total.alive else do,
        )
    amount = total.left + amount_of(budget, earlier)
    return own if own is not None and own.amount <= amount else replace(budget, amount=amount)


def book(
    plan: Plan, limits: Limits, folder: Path, earlier: Spent, *, elapsed_s: float = 0.0
) -> Booking:
    """Enter an attempt, which began so long ago, and draw on its project. Only a run with a project
    fails with its ledger. An attempt that was killed is brought to what the folder noted of it."""
    ledger: Ledger | None = None
    try:
        if limits.project is not None:
            ledger = _opened(limits)
        else:
            ledger = Ledger.opened(limits.ledger, within_s=OPEN_WAIT_S)
        if ledger is None:
            return Booking(None, None)
        entry = _entry(plan, limits, folder, elapsed_s)
        if earlier.wall_s > 0:
            ledger.agree(entry.run, earlier)
        wants = _wants(ledger, limits.project, plan.job.budget, earlier)
        return Booking(ledger.open_run(entry, wants=wants), ledger)
    except OutlayError as error:
        if ledger is not None:
            ledger.close()
        if limits.project is not None:
            raise
        return Booking(None, None, f"this run is not in the ledger: {error.what}; {error.why}")


def _opened(limits: Limits) -> Ledger:
    ledger = Ledger.opened(limits.ledger, within_s=OPEN_WAIT_S)
    if ledger is None:
        raise UsageError(
            "a project needs the ledger, which is off",
            where="--project",
            do="give --ledger FILE, or unset OUTLAY_LEDGER; or run without --project",
        )
    return ledger


def _totals(ledger: Ledger, project: str) -> list[Total]:
    totals = ledger.totals(project)
    if not totals:
        raise UsageError(
            f"project {project!r} has no budget",
            where="--project",
            do=f"outlay ledger budget {project} AMOUNT",
        )
    return totals


def _wants(
    ledger: Ledger, project: str | None, own: tuple[Budget, ...], earlier: Spent
) -> list[Want]:
    """Of each of the project's budgets: the run's own, or all that is left."""
    if project is None:
        return []
    left = {b.kind: b.amount - amount_of(b, earlier) for b in own}
    return [
        Want(kind=t.budget.kind, amount=left.get(t.budget.kind)) for t in _totals(ledger, project)
    ]


def _entry(plan: Plan, limits: Limits, folder: Path, elapsed_s: float) -> Entry:
    step, price = plan.estimate.get("step") or {}, plan.cluster.price_usd_per_h
    predicted_s = None
    if step.get("time_s") is not None:
        steps = plan.job.steps
        low, mid, high = (float(step[key]) * steps for key in ("low_s", "time_s", "high_s"))
        predicted_s = (low, mid, high)
    return Entry(
        run=str(folder.absolute()),
        user=limits.user,
        project=limits.project,
        tags=limits.tags,
        machine=platform.node(),
        accelerator=plan.cluster.accelerator.name,
        accelerators=plan.cluster.ranks,
        price_usd_per_h=price,
        price_source=plan.cluster.price_source,
        predicted_s=predicted_s,
        predicted_usd=None
        if price is None or predicted_s is None
        else price * predicted_s[1] / 3600,
        elapsed_s=elapsed_s,
        minimum_s=limits.minimum_s,
        upper_kw=None if limits.power_w is None else limits.power_w / 1e3 * limits.used_pue()[0],
        kgco2e_per_kwh=limits.kgco2e_per_kwh,
    )

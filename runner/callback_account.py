"""A guard's row in the ledger, and what it draws on its project; without a ledger it does nothing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from outlay.planner.spec.job import Budget, BudgetKind
from outlay.profiles.errors import OutlayError, UsageError
from outlay.runner.budget import Bounds, Spent, amount_of
from outlay.runner.callback_report import Report
from outlay.runner.ledger import Entry, Ledger, OpenRun, Took, Want
from outlay.runner.ledger.store import ledger_path
from outlay.runner.limits import Limits

OPEN_WAIT_S = 3.0
"""For a ledger that somebody holds, in all, before a guard begins; it is rented time, and counted."""
BEAT_S = 10.0
"""Between entries: one is a write that is forced to disk, some milliseconds."""
BEAT_WAIT_S = 0.25
"""For a ledger that somebody holds, between two steps; none where the budget is about to end."""
CLOSE_WAIT_S = 3.0
"""The same at the end, and never more than what is left of the budget."""
NOTHING = Spent(wall_s=0.0, cost_usd=0.0, gpu_hours=0.0, fraction=None)


class Account:
    """Opened before the first step. `drawn` is what its project allows the guard beside its own."""

    def __init__(
        self,
        entry: Entry,
        budgets: Sequence[Budget],
        file: str | None,
        say: Callable[[str], None],
        *,
        named: bool = False,
    ) -> None:
        """A project, and a run with a name (`named`), cannot do without the ledger that is meant: what
        they spent is in it. Else one that cannot be used is no reason not to train."""
        self.drawn: list[Budget] = []
        self.took = Took()
        self.earlier: Spent | None = None  # by earlier starts of the run
        self._entry, self._say, self._named = entry, say, named
        self._ledger: Ledger | None = None
        self._run: OpenRun | None = None
        self._failed = 0
        path = ledger_path(file)
        if path is None and entry.project is not None:
            raise UsageError("a project needs the ledger, which is off", where="project")
        if path is None:
            return
        try:
            ledger = Ledger(path, within_s=OPEN_WAIT_S)
            try:
                self._enter(ledger, budgets)
            except BaseException:
                ledger.close()
                raise
        except OutlayError as error:
            if entry.project is not None or named:
                raise
            say(f"outlay: not in the ledger: {error.message()}")

    @property
    def kept(self) -> bool:
        """Whether there is a ledger."""
        return self._run is not None

    def _enter(self, ledger: Ledger, budgets: Sequence[Budget]) -> None:
        """Of a project's budgets the guard draws its own, or all that is free."""
        entry = self._entry
        earlier, took = ledger.spent(entry.run), ledger.took(entry.run)
        own = self._own({b.kind: b.amount - amount_of(b, earlier) for b in budgets})
        totals = [] if entry.project is None else ledger.totals(entry.project)
        if entry.project is not None and not totals:
            raise UsageError(
                f"project {entry.project!r} has no budget",
                where="project",
                do=f"outlay ledger budget {entry.project} AMOUNT; or leave project= out",
            )
        wants = [Want(kind=t.budget.kind, amount=own.get(t.budget.kind)) for t in totals]
        run = ledger.open_run(entry, wants=wants, alone=self._named)
        for kind, amount in run.reserved.items():
            drawn = Budget(kind=kind, amount=amount)
            self.drawn.append(replace(drawn, amount=amount + amount_of(drawn, earlier)))
        self._ledger, self._run, self.earlier, self.took = ledger, run, earlier, took

    def _own(self, amounts: dict[BudgetKind, float]) -> dict[BudgetKind, float]:
        """Of each kind what this start can use: its own budget, or what its own time can cost."""
        hours = amounts.get("hours")
        if hours is None:
            return amounts
        entry = self._entry
        most: dict[BudgetKind, float] = {"gpu_hours": hours * entry.accelerators}
        if entry.price_usd_per_h is not None:
            most["money"] = entry.price_usd_per_h * max(hours, entry.minimum_s / 3600)
        return {**amounts, **{k: min(v, amounts.get(k, v)) for k, v in most.items()}}

    def withdraw(self) -> None:
        """The guard did not begin."""
        if self._run is None or self._ledger is None:
            return
        try:
            self._run.withdraw()
        except OutlayError as error:
            self._say(f"outlay: the ledger was not written: {error.message()}")
        self._ledger.close()

    def beat(self, used: Spent, steps: int, bounds: Bounds) -> bool:
        """False = the reservation is gone. A full disk is no reason to end a training, and a ledger
        that somebody holds for once none to speak of."""
        if self._run is None:
            return True
        next_s = BEAT_S + bounds.step.upper_s() + bounds.save.upper_s()
        try:
            held = self._run.heartbeat(
                used, steps=steps, next_s=next_s, took=_took(bounds), wait_s=BEAT_WAIT_S
            )
        except OutlayError as error:
            self._failed += 1
            if self._failed == 2:
                self._say(f"outlay: the ledger was not written: {error.message()}")
            return True
        self._failed = 0
        return held

    def close(self, used: Spent, report: Report, bounds: Bounds, left_s: float | None) -> None:
        """The final bill; a ledger that is held is waited for no longer than what is left."""
        if self._run is None or self._ledger is None:
            return
        wait_s = CLOSE_WAIT_S if left_s is None else min(CLOSE_WAIT_S, max(0.1, left_s))
        try:
            self._run.close_run(
                used,
                state=report.state,
                reason=report.reason,
                steps=report.steps,
                took=_took(bounds),
                wait_s=wait_s,
            )
        except OutlayError as error:
            self._say(
                f"outlay: the ledger was not written: {error.message()}\n"
                "  its row stays `running` until this process has ended, and then is charged up to "
                "its next entry"
            )
        self._ledger.close()
        self._run = None


def entry_of(*, run: str | None, user: str | None, metering: dict[str, Any], **known: Any) -> Entry:
    """What a guard enters when it starts; without a name the run is this process."""
    price, total_s, energy = known["price_usd_per_h"], known["predicted_s"], metering.get("energy")
    return Entry(
        run=run or f"{platform.node()}:{os.getpid()}:{time.time_ns()}",
        user=user or Limits().user,
        tool="guard",
        machine=platform.node(),
        price_source=None if price is None else "price_usd_per_h",
        predicted_usd=None if price is None or total_s is None else price * total_s[1] / 3600,
        minimum_s=metering.get("minimum_s") or 0.0,
        upper_kw=None if energy is None else energy.upper_kw(),
        kgco2e_per_kwh=metering.get("kgco2e_per_kwh"),
        **known,
    )


def _took(bounds: Bounds) -> Took:
    return Took(
        step_s=bounds.step.upper_s() if bounds.step.measured else None,
        save_s=bounds.save.upper_s() if bounds.save.measured else None,
    )

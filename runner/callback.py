"""Keeps other people's training within a budget: Hugging Face's Trainer, Lightning's, and any loop.

    guard = Guard(budget="2usd", price_usd_per_h=1.2, save=save)      trainer = Trainer(...,
    for batch in batches:                                                 callbacks=[hf_callback(budget="2usd", …)])
        ...
        if guard.step():
            break
    guard.close()

All three meter from the start of the process, forecast, warn at 50, 80 and 95 %, save once early to
know what a save takes, save and stop while both still fit, and report predicted against measured.
transformers and lightning are imported only by the function that makes their callback.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outlay.planner.spec.files import to_json, write_text
from outlay.planner.spec.job import Budget
from outlay.profiles.errors import MissingExtra, OutlayError, UsageError
from outlay.profiles.money import parse_rates
from outlay.runner.budget import Bounds, Spent, amount_of, process_started_s
from outlay.runner.callback_report import FORECAST_AT, Report
from outlay.runner.callback_start import check_figures, check_options, meter_of
from outlay.runner.control import Controller, Decision, Stop
from outlay.runner.ledger import Entry, Ledger, OpenRun, Want
from outlay.runner.limits import Limits

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from transformers import TrainerCallback

    from outlay.runner.reshape import Reshaper

REHEARSE_AFTER = 3
"""Steps before the first save, and those that are left out of the timings."""
BEAT_S = 10.0
"""Between entries in the ledger: one is a write that is forced to disk, some milliseconds."""
UNKNOWN_SAVE_S = 5.0
"""Taken for the first save before one was timed, where the size of the model is not known."""
ENDLESS = 2**62

When = Literal["anneal", "cut", "stop"]


class _Endless(Controller):
    """Of a loop that has no known end."""

    def forecast_text(self, step: int) -> str:
        return f"{step:,} steps are done, the budget is {self.meter.limit_text()}"


class Guard:
    """Three calls: make it, `step()` after each step (True = stop now), `close()`.

    budget            "2usd", "1h", "10gpuh", or several; "project" in project= draws on its budget
    price_usd_per_h   of all that is rented; needed for money
    rate              "eur=1.08": USD for one, for budgets in another currency
    steps             of the whole loop, where that is known: gives forecasts
    save              called after the third step, and before the stop; without it use `saving()`
    scheduler         torch's, stepped once a step: its rate then ends within the budget
    when_over         "anneal" (with a scheduler the default), "cut" (without), "stop"
    plan              plan.yaml: its prediction is set against what is measured
    started_s         on CLOCK_MONOTONIC, since when time counts; null = the start of this process
    run               a name that later processes continue: what earlier ones spent counts
    """

    def __init__(
        self,
        budget: str | Sequence[str] = (),
        *,
        price_usd_per_h: float | None = None,
        rate: str | Sequence[str] = (),
        steps: int | None = None,
        save: Callable[[], object] | None = None,
        scheduler: Any = None,
        when_over: When | None = None,
        accelerators: int = 1,
        plan: str | Path | None = None,
        run: str | None = None,
        user: str | None = None,
        project: str | None = None,
        tags: Sequence[str] = (),
        ledger: str | None = None,
        started_s: float | None = None,
        report: str | Path | None = None,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        **metering: Any,
    ) -> None:
        """`metering`: energy, kgco2e_per_kwh, minimum_s, as those of `Meter`."""
        budgets = list(parse_budgets(budget, rate))
        if steps is not None and steps < 1:
            raise UsageError(f"a loop of {steps} steps has nothing to guard", where="steps")
        price, self._predicted, total_s = _of_plan(plan, price_usd_per_h)
        check_figures(price, accelerators, metering.get("minimum_s", 0.0))
        check_options(when_over, started_s, clock())
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._warned = False
        self._ledger: Ledger | None = None
        name = run or f"{platform.node()}:{os.getpid()}:{time.time_ns()}"
        self._entry = _entry(name, user, project, tags, accelerators, price, total_s)
        self._open, budgets, earlier = self._entered(budgets, ledger)
        if run is not None and self._open is None:
            self._say(f"outlay: without a ledger nothing is known of earlier starts of run {run!r}")
        self._steps, self._save, self._clock = steps, save, clock
        try:
            self.meter = meter_of(
                budgets,
                price_usd_per_h=price,
                accelerators=accelerators,
                started_s=process_started_s() if started_s is None else started_s,
                earlier=earlier,
                clock=clock,
                **metering,
            )
            self.control = self._controller(when_over, scheduler)
        except BaseException:
            self._give_back()
            raise
        self._report_path = None if report is None else Path(report)
        self.done, self._saved_at, self._forecast = 0, -1, None
        self._mark_s = self._beat_s = clock()
        self.why: Stop | Literal["ledger"] | None = None
        self._closed: Report | None = None
        atexit.register(self.close)  # a loop that ends by an exception is booked, too

    def _give_back(self) -> None:
        """What was drawn for a guard that never began."""
        if self._open is not None:
            nothing = Spent(wall_s=0.0, cost_usd=0.0, gpu_hours=0.0, fraction=None)
            self._open.close_run(nothing, state="refused", reason="the guard did not begin")

    def _controller(self, when_over: When | None, scheduler: Any) -> Controller:
        self.bounds = Bounds(step_guess_s=0.0, parameters=0, write_bytes_per_s=1.0)
        self.bounds.save.guess(UNKNOWN_SAVE_S if self._save is not None else 0.0)
        self.bounds.export.guess(0.0)
        self._reshaper = None
        if scheduler is not None and when_over in (None, "anneal"):
            self._reshaper = reshaper([scheduler], self._steps, self._say)
            when_over = "cut" if self._reshaper is None else "anneal"
        if self._steps is None:
            return _Endless(
                self.meter, self.bounds, steps=ENDLESS, policy="cut", skip=REHEARSE_AFTER
            )
        policy = when_over or "cut"
        return Controller(
            self.meter, self.bounds, steps=self._steps, policy=policy, skip=REHEARSE_AFTER
        )

    def _entered(
        self, budgets: list[Budget], file: str | None
    ) -> tuple[OpenRun | None, list[Budget], Spent | None]:
        """(the entry in the ledger, the budgets, what earlier starts spent). Only a project cannot do
        without a ledger: else one that cannot be used is no reason not to train."""
        project = self._entry.project
        try:
            ledger = Ledger.opened(file)
            if ledger is not None:
                return self._enter(ledger, budgets)
        except OutlayError as error:
            if project is not None:
                raise
            self._say(f"outlay: not in the ledger: {error.message()}")
        if project is not None:
            raise UsageError("a project needs the ledger, which is off", where="project")
        return None, budgets, None

    def _enter(
        self, ledger: Ledger, budgets: list[Budget]
    ) -> tuple[OpenRun, list[Budget], Spent | None]:
        """Into the ledger; a project's budgets become ours, as far as they are free."""
        project, earlier = self._entry.project, ledger.spent(self._entry.run)
        spent = earlier or _NOTHING
        own = {b.kind: b.amount - amount_of(b, spent) for b in budgets}
        totals = [] if project is None else ledger.totals(project)
        wants = [Want(kind=t.budget.kind, amount=own.get(t.budget.kind)) for t in totals]
        run = ledger.open_run(self._entry, wants=wants)
        self._ledger = ledger
        for kind, amount in run.reserved.items():
            drawn = Budget(kind=kind, amount=amount)
            drawn = replace(drawn, amount=amount + amount_of(drawn, spent))
            budgets = [b for b in budgets if b.kind != kind] + [drawn]
        return run, budgets, earlier

    @property
    def total_steps(self) -> int:
        """Where the schedule ends now: with `anneal`, fewer than `steps` where the budget ends before."""
        return self.control.total_steps

    @property
    def stop_now(self) -> bool:
        """Whether the last `step()` said stop."""
        return self.why is not None

    def step(self) -> bool:
        """A step is done. True = the budget is reached and saved: leave the loop."""
        due = self.look()
        if self._save is not None and (self.stop_now or due) and self._saved_at != self.done:
            with self.saving():
                self._save()
        return self.stop_now

    def look(self) -> bool:
        """A step is done: decide. True = a first save is due, to know what saves take.

        For callbacks, whose trainers save by themselves; loops call `step`.
        """
        now_s = self._clock()
        self.done += 1
        self.bounds.step.add(now_s - self._mark_s)
        if self.done == 2 * REHEARSE_AFTER:
            self.bounds.step.forget_first(REHEARSE_AFTER)
        decision: Decision = self.control.decide(self.done)
        for text in decision.warnings:
            self._say(f"outlay: {text}")
        self.why = self.why or decision.stop
        if self._reshaper is not None:
            self._reshaper.retarget(self.done, decision.total_steps)
        if self._forecast is None and self._steps and self.done >= FORECAST_AT * self._steps:
            self._forecast = self.control.forecast(self.done)
        self._beat(now_s)
        self.resumed()
        return (
            self.done == REHEARSE_AFTER
            and not self.bounds.save.measured
            and self.control.affords(self.bounds.save.upper_s())
        )

    def resumed(self) -> None:
        """What came since the last step was no step: a save, an evaluation."""
        self._mark_s = self._clock()

    def saved(self, took_s: float) -> None:
        """All steps until now are in a checkpoint, which took so long."""
        self.bounds.save.add(took_s)
        self._saved_at = self.done
        self.resumed()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save of the loop's own, so that its time is known."""
        began_s = self._clock()
        yield
        self.saved(self._clock() - began_s)

    def _beat(self, now_s: float) -> None:
        if self._open is None or now_s - self._beat_s < BEAT_S:
            return
        self._beat_s = now_s
        next_s = BEAT_S + self.bounds.step.upper_s() + self.bounds.save.upper_s()
        try:
            held = self._open.heartbeat(self.meter.attempt(), steps=self.done, next_s=next_s)
        except OutlayError as error:  # a full disk is no reason to end a training
            if not self._warned:
                self._say(f"outlay: the ledger was not written: {error.message()}")
            self._warned = True
            return
        if not held:
            self._say("outlay: the reservation in the ledger is gone: stopping")
            self.why = self.why or "ledger"

    def _how_it_stopped(self) -> str:
        """As it was: nobody is told that something was saved, or kept, that was not."""
        left_s = self.meter.remaining_s()
        kept = left_s is None or left_s >= 0
        saved = "saved and stopped" if self._saved_at == self.done else "stopped, not saved,"
        return f"{saved} {'within' if kept else 'above'} {self.meter.limit_text()}"

    def close(self) -> Report:
        """The end: the last entry in the ledger, and the report (also as text on stderr)."""
        if self._closed is not None:
            return self._closed
        complete = self._steps is not None and self.done >= self._steps
        state, reason = "stopped", "the loop ended before its budget"
        if complete:
            state, reason = "done", f"all {self._steps:,} steps done"
        elif self.why == "ledger":
            reason = "the reservation in the ledger was lost"
        elif self.why is not None:
            state, reason = "budget", self._how_it_stopped()
            if self.why == "forecast":
                reason = self.control.forecast_text(self.done)
        timed = self.control.speed.steps >= REHEARSE_AFTER
        self._closed = Report(
            state=state,  # type: ignore[arg-type]
            reason=reason,
            steps=self.done,
            spent=self.meter.spent(),
            step_s=self.control.speed.step_s() if timed else None,
            predicted_step_s=self._predicted,
            forecast=self._forecast,
            saved=self._saved_at == self.done,
        )
        atexit.unregister(self.close)
        self._book(self._closed)
        if self._report_path is not None:
            write_text(self._report_path, to_json(self._closed))
        self._say(self._closed.text())
        return self._closed

    def _book(self, report: Report) -> None:
        if self._open is None or self._ledger is None:
            return
        used = self.meter.attempt()
        try:
            self._open.close_run(used, state=report.state, reason=report.reason, steps=report.steps)
            self._ledger.close()
        except OutlayError as error:
            self._say(f"outlay: the ledger was not written: {error.message()}")

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_NOTHING = Spent(wall_s=0.0, cost_usd=0.0, gpu_hours=0.0, fraction=None)


def parse_budgets(budget: str | Sequence[str], rate: str | Sequence[str]) -> tuple[Budget, ...]:
    """A wrong one is told before anything is trained."""
    rates = parse_rates(rate)
    texts = [budget] if isinstance(budget, str) else budget
    return tuple(Budget.parse(text, where="budget", rates=rates) for text in texts)


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


def _entry(
    name: str,
    user: str | None,
    project: str | None,
    tags: Sequence[str],
    accelerators: int,
    price: float | None,
    total_s: tuple[float, float, float] | None,
) -> Entry:
    return Entry(
        run=name,
        user=user or Limits().user,
        project=project,
        tags=tuple(tags),
        tool="guard",
        machine=platform.node(),
        accelerators=accelerators,
        price_usd_per_h=price,
        price_source=None if price is None else "price_usd_per_h",
        predicted_s=total_s,
        predicted_usd=None if price is None or total_s is None else price * total_s[1] / 3600,
    )


def _of_plan(
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


def hf_callback(budget: str | Sequence[str] = (), **options: Any) -> TrainerCallback:
    """For `transformers.Trainer(callbacks=[…])`. Options are those of `Guard`, less steps and save."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "run")
    from outlay.runner.callback_hf import BudgetCallback

    return BudgetCallback(budget, **options)


def lightning_callback(
    budget: str | Sequence[str] = (), *, save_to: str | Path = "outlay-budget.ckpt", **options: Any
) -> Callback:
    """For `lightning.Trainer(callbacks=[…])`. The last state goes to `save_to`."""
    if importlib.util.find_spec("lightning") is None:
        raise UsageError("Lightning is not installed", do="pip install lightning")
    from outlay.runner.callback_lightning import BudgetCallback

    return BudgetCallback(budget, save_to=Path(save_to), **options)

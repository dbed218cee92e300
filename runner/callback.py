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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outlay.planner.spec.files import to_json, write_text
from outlay.profiles.errors import MissingExtra, UsageError
from outlay.profiles.units import format_seconds
from outlay.runner.budget import Bounds, process_started_s
from outlay.runner.callback_account import BEAT_S, BEAT_WAIT_S, Account, entry_of
from outlay.runner.callback_report import FORECAST_AT, Report
from outlay.runner.callback_start import (
    check_calls,
    check_figures,
    check_names,
    check_options,
    meter_of,
    of_plan,
    parse_budgets,
    path_text,
    require_room,
    reshaper,
)
from outlay.runner.control import WARN_AT, Controller, Decision, Stop
from outlay.runner.forecast import Forecast

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from transformers import TrainerCallback

REHEARSE_AFTER = 3
"""Steps before the first save, and those that are left out of the timings."""
UNKNOWN_SAVE_S = 5.0
"""Taken for a save before one was timed, where nothing says what it takes."""
CHEAP = 0.005
"""Of the whole budget: a save that takes less is made on the way, too, should the last not fit."""
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
    save              called after the third step, and before the stop; without it use `save_now`
    scheduler         torch's, stepped once a step: its rate then ends within the budget
    when_over         "anneal" (with a scheduler the default), "cut" (without), "stop"
    plan              plan.yaml: its prediction is set against what is measured
    started_s         on CLOCK_MONOTONIC, since when time counts; null = the start of this process
    run               a name that later processes continue: what earlier ones spent counts
    save_s            what a save takes at most, until one is timed; 0 where the loop never saves
    keep_s            kept for what your code does after the training
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
        ledger: str | Path | None = None,
        started_s: float | None = None,
        report: str | Path | None = None,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        save_s: float | None = None,
        save_source: str = "save_s",
        keep_s: float = 0.0,
        **metering: Any,
    ) -> None:
        """`metering`: energy, kgco2e_per_kwh, minimum_s, as those of `Meter`."""
        budgets = list(parse_budgets(budget, rate))
        check_calls(save=save, say=say, clock=clock)
        check_names(tags, run=run, user=user, project=project)
        check_options(when_over, started_s, clock(), steps)
        figures = {"price_usd_per_h": price_usd_per_h, "save_s": save_s, "keep_s": keep_s}
        check_figures(accelerators, metering, **figures)
        price, self._predicted, total_s = of_plan(plan, price_usd_per_h)
        file, report = path_text("ledger", ledger), path_text("report", report)
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._steps, self._save, self._clock = steps, save, clock
        began_s = process_started_s() if started_s is None else started_s
        entry = entry_of(
            run=run,
            user=user,
            project=project,
            tags=tuple(tags),
            accelerators=int(accelerators),
            price_usd_per_h=price,
            predicted_s=total_s,
            elapsed_s=max(0.0, clock() - began_s),
            metering=metering,
        )
        self._account = Account(entry, budgets, file, self._say, named=run is not None)
        if run is not None and not self._account.kept:
            self._say(f"outlay: without a ledger nothing is known of earlier starts of run {run!r}")
        try:
            self.meter = meter_of(
                budgets,
                self._account.drawn,
                price_usd_per_h=price,
                accelerators=int(accelerators),
                started_s=began_s,
                earlier=self._account.earlier,
                project=project,
                clock=clock,
                **metering,
            )
            self._expect(save_s, save_source, keep_s)
            self.control = self._controller(when_over, scheduler)
        except BaseException:
            self._account.withdraw()
            raise
        self._report_path = None if report is None else Path(report)
        self.done, self._saved_at = 0, -1
        self._forecast: Forecast | None = None
        self._due = self._misfit = False
        self._kept_text = ""
        self._insure_at = [part for part in WARN_AT if part > (self.meter.spent().fraction or 0.0)]
        self._mark_s = self._beat_s = clock()
        self.why: Stop | Literal["ledger"] | None = None
        self._closed: Report | None = None
        atexit.register(self.close)  # a loop that ends by an exception is booked, too

    def _expect(self, save_s: float | None, source: str, keep_s: float) -> None:
        """What is known before the first step: from earlier starts of the run, else as it is given."""
        took = self._account.took
        if took.save_s is not None:
            save_s, source = took.save_s, "measured by an earlier start of this run"
        elif save_s is None:
            save_s, source = UNKNOWN_SAVE_S, "assumed: none is timed yet"
        step_s = took.step_s
        if step_s is None and self._predicted is not None:
            step_s = self._predicted[0]
        self.bounds = Bounds(step_guess_s=step_s or 0.0, parameters=0, write_bytes_per_s=1.0)
        self.bounds.save.guess(save_s)
        self.bounds.export.guess(0.0)
        self.bounds.after_s = keep_s
        require_room(self.meter, self.bounds, step_s, source)

    def _controller(self, when_over: When | None, scheduler: Any) -> Controller:
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

    @property
    def total_steps(self) -> int:
        """Where the schedule ends now: with `anneal`, fewer than `steps` where the budget ends before."""
        return self.control.total_steps

    @property
    def stop_now(self) -> bool:
        """Whether the last `step()` said stop."""
        return self.why is not None

    @property
    def save_now(self) -> bool:
        """Whether a save is due that fits: the first, one on the way, or the last."""
        if self._saved_at == self.done:
            return False
        return self.fits(self.bounds.save.upper_s()) if self.stop_now else self._due

    def fits(self, upper_s: float) -> bool:
        """Whether something that takes at most so long ends within the budget."""
        return self.meter.affords(upper_s)

    def step(self) -> bool:
        """A step is done. True = the budget is reached and saved: leave the loop."""
        self.look()
        if self._save is not None and self.save_now:
            with self.saving():
                self._save()
        return self.stop_now

    def look(self) -> None:
        """A step is done: decide. For callbacks, whose trainers save by themselves; loops call `step`."""
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
        self._misfit = self.stop_now and not self.fits(self.bounds.save.upper_s())
        self._due = self._save_due()
        self.resumed()

    def _save_due(self) -> bool:
        """The first, to know what saves take; later ones where they cost next to nothing: a step may
        take so long that the last save does not fit any more, and then an earlier one is what is left."""
        save = self.bounds.save
        if not save.measured:
            return self.done == REHEARSE_AFTER and self.control.affords(save.upper_s())
        used = self.meter.spent().fraction or 0.0
        passed = [part for part in self._insure_at if used >= part]
        if not passed or self.stop_now:
            return False
        self._insure_at = self._insure_at[len(passed) :]
        limit_s = self.meter.limit_s
        cheap = limit_s is not None and save.upper_s() <= CHEAP * limit_s
        return cheap and self._saved_at < 0.98 * self.done and self.control.affords(save.upper_s())

    def resumed(self) -> None:
        """What came since the last step was no step: a save, an evaluation."""
        self._mark_s = self._clock()

    def saved(self, took_s: float) -> None:
        """All steps until now are in a checkpoint, which took so long."""
        if self.stop_now and not self.bounds.save.measured:
            self._kept_text = (
                f"; {format_seconds(self.bounds.save.upper_s())} were kept for its only save, which "
                f"took {format_seconds(took_s)} (save_s= says what it takes)"
            )
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
        # the first soon: until then a process that dies is charged for as long as may be
        if now_s - self._beat_s < BEAT_S and self.done != REHEARSE_AFTER:
            return
        near = self.bounds.step.upper_s() + self.bounds.finish_s() + BEAT_WAIT_S
        if self.stop_now or not self.fits(near):
            return  # the close is the next entry
        self._beat_s = now_s
        if not self._account.beat(self.meter.attempt(), self.done, self.bounds):
            self._say("outlay: the reservation in the ledger is gone: stopping")
            self.why = self.why or "ledger"

    def _how_it_stopped(self) -> str:
        """As it was: nobody is told that something was saved, or kept, that was not."""
        left_s = self.meter.remaining_s()
        kept = left_s is None or left_s >= 0
        saved = "saved and stopped" if self._saved_at == self.done else "stopped, not saved,"
        text = f"{saved} {'within' if kept else 'above'} {self.meter.limit_text()}"
        save_s = format_seconds(self.bounds.save.upper_s())
        if self._saved_at == self.done:
            return text + self._kept_text
        if self._saved_at >= 0:
            text += f"; the last save is of step {self._saved_at:,}"
        if self._misfit:
            text += f"; another, of up to {save_s}, did not fit"
        elif not self.bounds.save.measured and self.bounds.save.upper_s() > 0:
            text += f"; {save_s} of it were kept for a save, and none was made (save_s=0: none is)"
        return text

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
            saved_step=None if self._saved_at < 0 else self._saved_at,
        )
        atexit.unregister(self.close)
        left_s = self.meter.remaining_s()
        self._account.close(self.meter.attempt(), self._closed, self.bounds, left_s)
        self._say(self._closed.text())
        if self._report_path is not None:
            write_text(self._report_path, to_json(self._closed))
        return self._closed

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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

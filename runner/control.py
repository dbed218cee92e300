"""The decisions of a run under limits: go on, anneal within what is left, warn, stop.

Pure: it reads a `Meter` (whose clock and energy are given) and the `Bounds` that the loop feeds, and
does nothing itself. The training loop of `run`, the callbacks for other trainers and the simulation
in the tests use the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from outlay.runner.budget import SHUTDOWN_S, Bounds, Meter
from outlay.runner.forecast import Forecast, Speed

Policy = Literal["anneal", "cut", "stop", "ask"]
POLICIES: tuple[str, ...] = get_args(Policy)
Stop = Literal["budget", "forecast", "walltime"]

WARN_AT = (0.5, 0.8, 0.95)
"""Parts of a budget at which a warning is due."""
SPEED_AFTER = 8
"""Steps that are measured before a forecast is made."""
SURE_AFTER = 50
"""Steps before a run is ended for its forecast alone."""
ASK_AFTER = 20
"""Steps before anybody is asked about a forecast."""
MOVED = 0.1
"""Of the end that was told last: when it has moved by more, it is told again."""
TOLD_EVERY = 0.05
"""Of the budget: where the speed jumps about, not more often."""
ANSWERS: tuple[Policy, ...] = ("anneal", "cut", "stop")
"""To the question of the policy `ask`."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done before the next step."""

    stop: Stop | None
    total_steps: int
    """Where the schedule ends now: the job's steps, or fewer where the money ends before."""
    warnings: tuple[str, ...]
    question: str | None = None
    """Asked once, under the policy `ask`; until `answer`, the run goes on as with `anneal`."""


class Controller:
    """Decides before each step, from what is spent, left and measured."""

    def __init__(
        self,
        meter: Meter,
        bounds: Bounds,
        *,
        steps: int,
        policy: Policy = "anneal",
        walltime_s: float | None = None,
        skip: int = 3,
    ) -> None:
        self.meter, self.bounds, self.steps, self.policy = meter, bounds, steps, policy
        self.walltime_s, self.total_steps = walltime_s, steps
        self.speed = Speed(skip=skip)
        used = meter.spent().fraction or 0.0
        self._warn_at = [part for part in WARN_AT if part > used]
        self._told_end, self._told_at = steps, -1.0
        self.asking = False
        """A question is open."""
        self._stop_now = False

    def decide(self, step: int) -> Decision:
        """`step` steps are done."""
        self.speed.mark(step, self.meter.elapsed_s())
        within = self.steps_within()
        question = self._question(step)
        annealing = self.policy == "anneal" or self.asking
        if annealing and within is not None and self.speed.steps >= SPEED_AFTER:
            self.total_steps = min(self.steps, step + max(0, within))
        elif not annealing:
            self.total_steps = self.steps
        stop: Stop | None = None
        if within == 0:
            stop = "budget"
        elif self._walltime_over():
            stop = "walltime"
        elif self._stop_now or (self.policy == "stop" and self._surely_over(step)):
            stop = "forecast"
        return Decision(
            stop=stop,
            total_steps=self.total_steps,
            warnings=tuple(self._warnings(step)),
            question=question,
        )

    def _question(self, step: int) -> str | None:
        """Due once, when the expected end is above the budget."""
        if self.policy != "ask" or self.asking or self.speed.steps < ASK_AFTER:
            return None
        forecast, limit_s = self.forecast(step), self.meter.limit_s
        if forecast is None or limit_s is None or forecast.expected_s <= limit_s:
            return None
        self.asking = True
        return f"the budget ends before the schedule: {self.forecast_text(step)}"

    def answer(self, policy: Policy) -> None:
        """What to do instead of asking."""
        if policy == "ask":
            return
        self.asking, self.policy, self._stop_now = False, policy, policy == "stop"

    def steps_within(self) -> int | None:
        """Steps that fit before the last save, evaluation and export; null without a budget.

        One by its upper bound, and as many as the present speed allows beside it: zero means stop.
        """
        remaining_s = self.meter.remaining_s()
        if remaining_s is None:
            return None
        upper_s = self.bounds.step.upper_s()
        if remaining_s < self.bounds.finish_s() + upper_s:
            return 0
        spare_s = (self.meter.remaining_expected_s() or 0.0) - self.bounds.finish_s() - upper_s
        step_s = self.speed.step_s() if self.speed.steps else upper_s
        return 1 + int(max(0.0, spare_s) / max(1e-9, step_s))

    def _walltime_over(self) -> bool:
        left_s = self.walltime_left_s()
        return left_s is not None and left_s < (
            self.bounds.step.upper_s() + self.bounds.save.upper_s() + SHUTDOWN_S
        )

    def walltime_left_s(self) -> float | None:
        return None if self.walltime_s is None else self.walltime_s - self.meter.elapsed_s()

    def affords(self, upper_s: float) -> bool:
        """Whether something extra fits now, and after it a step and the end."""
        step_s = self.bounds.step.upper_s()
        left_s = self.walltime_left_s()
        if left_s is not None:
            end_s = self.bounds.save.upper_s() + SHUTDOWN_S
            if left_s < upper_s + step_s + end_s:
                return False
        return self.meter.affords(upper_s + step_s + self.bounds.finish_s())

    def forecast(self, step: int) -> Forecast | None:
        """Wall time of the whole run, earlier attempts included, at the job's number of steps;
        null before a few steps are measured."""
        if self.speed.steps < SPEED_AFTER:
            return None
        left = self.speed.left(max(0, self.steps - step))
        spent_s, end_s = self.meter.spent().wall_s, self.bounds.finish_expected_s()
        return Forecast(
            low_s=spent_s + left.low_s + end_s,
            expected_s=spent_s + left.expected_s + end_s,
            high_s=spent_s + left.high_s + self.bounds.finish_s(),
        )

    def _surely_over(self, step: int) -> bool:
        """Even the low end of the forecast is above the budget."""
        forecast, limit_s = self.forecast(step), self.meter.limit_s
        if forecast is None or limit_s is None or self.speed.steps < SURE_AFTER:
            return False
        return forecast.low_s > limit_s

    def _warnings(self, step: int) -> list[str]:
        used = self.meter.spent().fraction or 0.0
        due = [part for part in self._warn_at if used >= part]
        self._warn_at = self._warn_at[len(due) :]
        lines = []
        if due:
            lines.append(f"{due[-1]:.0%} of the budget is used: {self.forecast_text(step)}")
        moved = abs(self.total_steps - self._told_end) > MOVED * self._told_end or (
            self.total_steps < self.steps == self._told_end
        )
        if moved and used - self._told_at >= TOLD_EVERY:
            self._told_end, self._told_at = self.total_steps, used
            lines.append(self._end_text(step))
        return lines

    def _end_text(self, step: int) -> str:
        if self.total_steps == self.steps:
            return f"the learning rate ends with the schedule again: {self.forecast_text(step)}"
        return (
            f"the budget ends before the schedule: {self.forecast_text(step)}; "
            f"the learning rate now ends within it, about step {self.total_steps:,}"
        )

    def forecast_text(self, step: int) -> str:
        """All steps in the unit of the budget that ends first, for a person."""
        forecast = self.forecast(step)
        if forecast is None:
            return "no forecast yet"
        low, mid, high = (
            self.meter.in_words(s) for s in (forecast.low_s, forecast.expected_s, forecast.high_s)
        )
        return (
            f"all {self.steps:,} steps would end at {mid} ({low} to {high}), "
            f"the budget is {self.meter.limit_text()}"
        )

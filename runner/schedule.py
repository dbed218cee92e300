"""The learning rate of each step."""

from __future__ import annotations

import math

from outlay.planner.spec.job import Schedule
from outlay.profiles.errors import UsageError


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Rate of `step` (from 0) out of `steps`.

    Warm-up rises linearly and reaches the peak at its last step; then `linear` and `cosine`
    fall to `final_fraction` of the peak, which they reach at the last step of all
    (cosine without restarts: Loshchilov & Hutter 2017, eq. 5). `wsd` stays at the peak and falls
    linearly in the last `decay_fraction` of them (Hu et al. 2024, arXiv 2404.06395, section 4).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    done = min(1.0, (step - schedule.warmup_steps + 1) / max(1, steps - schedule.warmup_steps))
    remaining = _remaining(schedule, done)
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * remaining)


def _remaining(schedule: Schedule, done: float) -> float:
    """How much of the fall is still to come, once a part `done` of the steps after the warm-up is."""
    if schedule.name == "linear":
        return 1.0 - done
    if schedule.name == "wsd":
        return min(1.0, (1.0 - done) / schedule.decay_fraction)
    return 0.5 * (1 + math.cos(math.pi * done))


class Decay:
    """The learning rate of a run whose number of steps may change on the way.

    `learning_rate` until it changes; from then on what is left of the decay is spread over the
    steps that are left, from where it stands. So the rate has no jump and reaches its end at the
    last step, however often the end moves. A warm-up longer than half of the steps is cut there.
    """

    def __init__(self, schedule: Schedule, peak: float, steps: int) -> None:
        self.schedule, self.peak, self.steps = schedule, peak, steps
        self.anchor_step, self.anchor_done, self.reached = schedule.warmup_steps, 0.0, 1.0

    def retarget(self, step: int, steps: int) -> None:
        """`step` (from 0, not yet done) and all after it belong to a run of `steps` steps."""
        if steps == self.steps:
            return
        if step >= self.anchor_step:
            self.anchor_done = self._done(step - 1)
            self.anchor_step = step
        elif self.schedule.warmup_steps > steps // 2:
            self.anchor_step = max(step, steps // 2)
            self.reached = max(1, self.anchor_step) / self.schedule.warmup_steps
        else:
            self.anchor_step, self.reached = self.schedule.warmup_steps, 1.0
        self.steps = steps

    def _done(self, step: int) -> float:
        """Part of the decay that is behind after `step`."""
        left = max(1, self.steps - self.anchor_step)
        part = min(1.0, max(0.0, (step - self.anchor_step + 1) / left))
        return self.anchor_done + (1 - self.anchor_done) * part

    def rate(self, step: int) -> float:
        if step < self.anchor_step:
            return learning_rate(self.schedule, self.peak, step, self.steps)
        peak, final = self.peak * self.reached, self.schedule.final_fraction
        if self.schedule.name == "constant":
            return peak
        return peak * (final + (1 - final) * _remaining(self.schedule, self._done(step)))

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {
            "steps": self.steps,
            "anchor_step": self.anchor_step,
            "anchor_done": self.anchor_done,
            "reached": self.reached,
        }

    def restore(self, state: dict[str, float], step: int, steps: int) -> None:
        self.steps, self.anchor_step = int(state["steps"]), int(state["anchor_step"])
        self.anchor_done, self.reached = state["anchor_done"], state["reached"]
        self.retarget(step, steps)


def check_schedule(schedule: Schedule, steps: int) -> None:
    """Refuse a schedule that cannot be meant, before anything is started."""
    if schedule.warmup_steps < 0 or schedule.warmup_steps > steps:
        raise UsageError(
            f"schedule.warmup_steps is {schedule.warmup_steps}",
            why=f"the run has {steps} steps",
            do="choose a warm-up between 0 and the number of steps",
        )
    if not 0 <= schedule.final_fraction <= 1:
        raise UsageError(
            f"schedule.final_fraction must lie between 0 and 1, not {schedule.final_fraction:g}"
        )
    if not 0 < schedule.decay_fraction <= 1:
        raise UsageError(
            f"schedule.decay_fraction must lie in (0, 1], not {schedule.decay_fraction:g}"
        )

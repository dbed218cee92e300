"""The learning rate of each step."""

from __future__ import annotations

import math

from outlay.planner.spec.job import Schedule
from outlay.profiles.errors import UsageError


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Rate of `step` (from 0) out of `steps`.

    Warm-up rises linearly and reaches the peak at its last step; then `linear` and `cosine`
    fall to `final_fraction` of the peak, which they reach at the last step of all
    (cosine without restarts: Loshchilov & Hutter 2017, eq. 5).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    done = min(1.0, (step - schedule.warmup_steps + 1) / max(1, steps - schedule.warmup_steps))
    remaining = 1.0 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * remaining)


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

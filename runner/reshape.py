"""Shortens a schedule that torch or transformers made, so that its rate ends within the budget.

A scheduler counts its own steps. From a moment on, its count runs faster: what is left of the shape is
spread over the steps that are left, from where it stands, so that the rate has no jump and its end comes
at the last step, however often that moves. This holds for whatever gives the rate as a function of the
count alone: `LambdaLR` (all schedules of `transformers.get_scheduler` but those that follow the loss),
`OneCycleLR`, and torch's with a closed form (cosine, linear, polynomial, exponential, steps).

The count's course is kept in the scheduler's own state, and so in the checkpoints that hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

COURSE = "outlay_course"
"""(real count, count of the shape) where the last change began, and (the shape's end, the real end)."""


def _inner(scheduler: Any) -> Any:
    """accelerate wraps schedulers."""
    return getattr(scheduler, "scheduler", scheduler)


def unfit(schedulers: Sequence[Any]) -> str | None:
    """Why these cannot be reshaped; null = they can."""
    if not schedulers:
        return "there is no scheduler"
    for scheduler in map(_inner, schedulers):
        name = type(scheduler).__name__
        if not isinstance(scheduler, LRScheduler):
            return f"{name} is no scheduler of torch whose rate follows from the step alone"
        known = isinstance(scheduler, LambdaLR | OneCycleLR)
        if not known and not hasattr(scheduler, "_get_closed_form_lr"):
            return f"the rate of {name} depends on more than the step"
    return None


@cache
def _reshaped(kind: type[Any]) -> type[Any]:
    """The same scheduler, asked for its rate at another count."""

    class Reshaped(kind):  # type: ignore[misc]
        outlay_reshaped = True

        def get_lr(self) -> Any:
            count = self.last_epoch
            self.last_epoch = shape_count(getattr(self, COURSE), count)
            try:
                closed = getattr(self, "_get_closed_form_lr", None)
                return super().get_lr() if closed is None else closed()
            finally:
                self.last_epoch = count

    Reshaped.__name__ = Reshaped.__qualname__ = kind.__name__
    return Reshaped


def shape_count(course: Sequence[float], count: float) -> float:
    """Where in its shape a scheduler is, when it has counted so far."""
    began, shape_began, shape_end, end = course
    part = min(1.0, max(0.0, (count - began) / max(1.0, end - began)))
    return shape_began + (shape_end - shape_began) * part


class Reshaper:
    """One training's schedulers, all stepped together: once a step, or a fixed number of times."""

    def __init__(self, schedulers: Sequence[Any], steps: int) -> None:
        self._schedulers = [_inner(s) for s in schedulers]
        self._steps = self._end = steps
        self._began = [s.last_epoch for s in self._schedulers]
        for scheduler in self._schedulers:
            if hasattr(scheduler, COURSE):  # out of the checkpoint of an earlier process
                _follow_course(scheduler)

    def retarget(self, done: int, end: int) -> None:
        """`done` steps are done, and `end` will be, of those that this process was to do."""
        if end == self._end or done < 1:
            return
        self._end = end
        for scheduler, began in zip(self._schedulers, self._began, strict=True):
            count = scheduler.last_epoch
            each = max(1, round((count - began) / done))  # accelerate steps once a process
            full = began + self._steps * each
            course = getattr(scheduler, COURSE, (0.0, 0.0, full, full))
            left = (end - done) * each
            setattr(scheduler, COURSE, (count, shape_count(course, count), course[2], count + left))
            _follow_course(scheduler)


def _follow_course(scheduler: Any) -> None:
    """A class cannot be in the way of a checkpoint, as a function among its values would be."""
    if not getattr(type(scheduler), "outlay_reshaped", False):
        scheduler.__class__ = _reshaped(type(scheduler))

"""How fast a run goes, and from that what all of it will take: an expectation with its interval."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

Z90 = 1.645
"""Of a normal distribution, 90 % lie within so many standard deviations of its mean."""
LEAST_SPREAD = 0.01
"""Of the mean: what a machine does not tell of itself in a few blocks of steps."""
RECENT = 0.1
"""Of all steps so far: the latest, of which the present speed is the mean."""
BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds until the end of something, 90 %."""

    low_s: float
    expected_s: float
    high_s: float


class Speed:
    """Wall time a step, saves, evaluations and whatever comes between steps included."""

    def __init__(self, *, skip: int) -> None:
        self._skip = skip
        self._marks: deque[tuple[int, float]] = deque(maxlen=4096)

    def mark(self, step: int, elapsed_s: float) -> None:
        """`step` steps are done `elapsed_s` after the start."""
        if self._skip:
            self._skip -= 1
            return
        self._marks.append((step, elapsed_s))

    @property
    def steps(self) -> int:
        return max(0, len(self._marks) - 1)

    def step_s(self) -> float:
        """Mean of the recent ones: at least 20, at least a tenth of all."""
        recent = max(20, int(RECENT * self.steps))
        (first, began_s), (last, ended_s) = (
            self._marks[-min(recent, self.steps) - 1],
            self._marks[-1],
        )
        return (ended_s - began_s) / max(1, last - first)

    def left(self, steps: int) -> Forecast:
        """Time of so many more steps, at the present speed.

        Speed drifts: the last steps are no sample of independent draws. So the spread is that of
        block means (up to 8 blocks of all steps so far), one of which the present speed is and as
        many as fit into what is left are to come: sd = s·√(1 + 1/blocks left) (variance of the
        difference of two independent means).
        """
        step_s = self.step_s()
        ends = [round(i * self.steps / BLOCKS) for i in range(BLOCKS + 1)]
        marks = [self._marks[i] for i in sorted(set(ends))]
        means = [(b[1] - a[1]) / max(1, b[0] - a[0]) for a, b in pairwise(marks)]
        mean = sum(means) / len(means)
        spread = sqrt(sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1)) / mean
        to_come = max(1.0, steps * BLOCKS / max(1, self.steps))
        half = Z90 * max(LEAST_SPREAD, spread) * sqrt(1 + 1 / to_come)
        expected_s = steps * step_s
        return Forecast(
            low_s=expected_s * max(0.0, 1 - half),
            expected_s=expected_s,
            high_s=expected_s * (1 + half),
        )

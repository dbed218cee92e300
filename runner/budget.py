"""The meter of a run, and the decision to stop while there is still time to finish well.

Every budget becomes a number of seconds, because all that is rented costs by the second from the
moment the supervisor starts: set-up, start of the ranks, evaluation, saving and idling included.
CLOCK_MONOTONIC is shared by the processes of a host, so that ranks read the same meter.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_seconds, format_usd

SHUTDOWN_S = 1.0
"""Kept for ranks to end in, once the outcome is on disk; slower ones are ended by force."""

OPTIMISTIC_STARTUP_S = 4.0
"""Assumed least time from the supervisor's start to the first step, while a run has no measured
one: each rank imports torch, DeepSpeed and transformers, joins the group and builds its engine."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has used so far, over all its resumes."""

    wall_s: float
    cost_usd: float | None
    gpu_hours: float
    fraction: float | None
    """Of the budget that ends first; null without a budget."""


class Meter:
    """Seconds, money and accelerator hours since the run began, against its budgets."""

    def __init__(
        self,
        budgets: Sequence[Budget],
        *,
        price_usd_per_h: float | None,
        accelerators: int,
        started_s: float,
        earlier_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.price_usd_per_h = price_usd_per_h
        self.accelerators = accelerators
        self.started_s = started_s
        self.earlier_s = earlier_s
        self._clock = clock
        limits = {_seconds(b, price_usd_per_h, accelerators): b for b in budgets}
        self.limit_s: float | None = min(limits, default=None)
        self.binding: Budget | None = None if self.limit_s is None else limits[self.limit_s]

    @classmethod
    def of_cluster(
        cls, budgets: Sequence[Budget], cluster: Cluster, *, started_s: float, earlier_s: float
    ) -> Meter:
        """All of the cluster is rented, whether the strategy uses every rank or not."""
        return cls(
            budgets,
            price_usd_per_h=cluster.price_usd_per_h,
            accelerators=cluster.ranks,
            started_s=started_s,
            earlier_s=earlier_s,
        )

    def elapsed_s(self) -> float:
        """Since this supervisor started."""
        return self._clock() - self.started_s

    def spent(self) -> Spent:
        wall_s = self.earlier_s + self.elapsed_s()
        return Spent(
            wall_s=wall_s,
            cost_usd=None if self.price_usd_per_h is None else self.price_usd_per_h * wall_s / 3600,
            gpu_hours=wall_s / 3600 * self.accelerators,
            fraction=None if self.limit_s is None else wall_s / self.limit_s,
        )

    def remaining_s(self) -> float | None:
        """Wall seconds until the first budget is used up; null without a budget."""
        if self.limit_s is None:
            return None
        return self.limit_s - self.earlier_s - self.elapsed_s()

    def affords(self, upper_s: float) -> bool:
        """Whether something that takes at most `upper_s` ends within the budget."""
        remaining_s = self.remaining_s()
        return remaining_s is None or remaining_s >= upper_s

    def decide(self, next_step_s_upper: float, finish_s_upper: float) -> bool:
        """True = stop now: after one more step there might be too little left to finish in."""
        return not self.affords(next_step_s_upper + finish_s_upper)

    def require(self, startup_s: float, *, source: str) -> None:
        """Refuse, before anything is started, a budget that even the start would use up."""
        remaining_s = self.remaining_s()
        if remaining_s is None or remaining_s >= startup_s + SHUTDOWN_S:
            return
        needed_s = self.spent().wall_s + startup_s + SHUTDOWN_S
        raise NotFeasible(
            f"the budget of {self.limit_text()} is too small to train anything",
            why=f"{format_seconds(max(0.0, remaining_s))} of it are left; starting and ending "
            f"takes at least {format_seconds(startup_s + SHUTDOWN_S)} ({source})",
            do=f"raise it above {self._in_words(needed_s)}, and add the time to train in",
        )

    def limit_text(self) -> str:
        """The budget that ends first, for a person."""
        return "none" if self.limit_s is None else self._in_words(self.limit_s)

    def _in_words(self, wall_s: float) -> str:
        """So much of what the binding budget counts."""
        kind = None if self.binding is None else self.binding.kind
        if kind == "money" and self.price_usd_per_h is not None:
            return format_usd(self.price_usd_per_h * wall_s / 3600)
        if kind == "gpu_hours":
            return f"{wall_s / 3600 * self.accelerators:.4g} GPU-hours"
        return format_seconds(wall_s)


def _seconds(budget: Budget, price_usd_per_h: float | None, accelerators: int) -> float:
    """How long all that is rented may run under one budget."""
    if budget.kind == "hours":
        return budget.amount * 3600
    if budget.kind == "gpu_hours":
        return budget.amount * 3600 / accelerators
    if budget.kind != "money":
        raise UsageError(
            f"a budget of {budget.kind} is not metered yet, so it cannot be kept",
            do="give a budget in usd, hours or gpuh",
        )
    if price_usd_per_h is None or not price_usd_per_h > 0:
        raise UsageError(
            f"a budget of {budget} needs a price, and none is known for this hardware",
            do="give --price-usd-per-h, or a budget in hours",
        )
    return budget.amount / price_usd_per_h * 3600


class UpperBound:
    """What something takes at most next time, judged by what it took; `guess_s` before that."""

    def __init__(
        self, guess_s: float, *, factor: float = 1.25, slack_s: float = 0.05, window: int = 50
    ) -> None:
        self._guess_s = guess_s
        self._factor, self._slack_s = factor, slack_s
        self._seen: deque[float] = deque(maxlen=window)

    def guess(self, seconds: float) -> None:
        """A better guess, for as long as nothing is measured."""
        self._guess_s = seconds

    def add(self, seconds: float) -> None:
        self._seen.append(seconds)

    def forget_first(self, count: int) -> None:
        """Drop the oldest that were seen: the first steps are slow, and never come again."""
        for _ in range(min(count, len(self._seen))):
            self._seen.popleft()

    @property
    def measured(self) -> bool:
        return bool(self._seen)

    def upper_s(self) -> float:
        if not self._seen:
            return self._guess_s
        return max(self._seen) * self._factor + self._slack_s


class Bounds:
    """Upper bounds of a step and of all that comes after the last, from this run's own times."""

    BYTES_A_PARAMETER = 16
    """Of a checkpoint before one was written: weights, fp32 copy and both Adam moments in fp32."""

    def __init__(self, *, step_guess_s: float, parameters: int, write_bytes_per_s: float) -> None:
        self.step = UpperBound(step_guess_s)
        by_bytes_s = self.BYTES_A_PARAMETER * parameters / write_bytes_per_s
        # twice: what is written is read again for its hash
        self.save = UpperBound(2 * by_bytes_s + 1.0, factor=1.3, slack_s=0.2)
        self.evaluate = UpperBound(0.0, slack_s=0.1)
        # an export holds the weights alone, at most 4 of those 16 bytes, but one rank writes it
        self.export = UpperBound(by_bytes_s + 0.5, factor=1.3, slack_s=0.2)

    def finish_s(self) -> float:
        """The last save, the held-out evaluation, the export and the end of the processes."""
        parts = (self.save, self.evaluate, self.export)
        return sum(part.upper_s() for part in parts) + SHUTDOWN_S


def measure_write_rate(folder: Path, size_bytes: int = 32 * 2**20) -> float:
    """Bytes a second that a file here takes to be written and forced to disk."""
    path = folder / f".write-rate-{os.getpid()}"
    block = os.urandom(2**20)
    began_s = time.monotonic()
    try:
        with path.open("wb") as handle:
            for _ in range(size_bytes // len(block)):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        return size_bytes / max(1e-6, time.monotonic() - began_s)
    finally:
        path.unlink(missing_ok=True)


def process_started_s() -> float:
    """On CLOCK_MONOTONIC, when this process was started: its imports are rented time, too."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s
    return time.monotonic() - max(0.0, age_s)

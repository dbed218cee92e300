"""The meter of a run, and the decision to stop while there is still time to finish well.

Every budget becomes a number of seconds, because all that is rented costs by the second from the
moment the supervisor starts: set-up, start of the ranks, evaluation, saving and idling included.
CLOCK_MONOTONIC is shared by the processes of a host, so that ranks read the same meter.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Budget
from outlay.profiles.units import format_seconds
from outlay.runner.amounts import check_metered, in_unit

SHUTDOWN_S = 0.8
"""Kept for the outcome to be written and for ranks to end in (0.1 to 0.25 s on two busy cores), and
for the supervisor to end slower ones by force."""

OPTIMISTIC_STARTUP_S = 4.0
"""Assumed least time from the supervisor's start to the first step, while a run has no measured
one: each rank imports torch, DeepSpeed and transformers, joins the group and builds its engine."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has used so far, over all its resumes."""

    wall_s: float
    cost_usd: float | None
    """Null = no price is known."""
    gpu_hours: float
    fraction: float | None
    """Of the budget that is used up most; null without a budget."""
    energy_kwh: float | None = None
    """With PUE; null = not metered."""
    co2e_kg: float | None = None


class EnergyReading(Protocol):
    """Energy since this attempt began. Real ones are in `energy`; tests have their own."""

    source: str

    def kwh(self) -> float: ...

    def upper_kw(self) -> float:
        """At most so much power from now on."""
        ...

    def expected_kw(self) -> float:
        """About so much power from now on."""
        ...


class Meter:
    """Seconds, money, accelerator hours, energy and CO2e since the run began, against its budgets.

    Money counts from the start of the supervisor, at least `minimum_s` an attempt (the shortest time
    that is billed). What earlier attempts spent is kept as it was billed: prices may differ since.
    `budgets` are the run's own, `drawn` is what its project allows it beside them.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        *,
        price_usd_per_h: float | None,
        accelerators: int,
        started_s: float,
        drawn: Sequence[Budget] = (),
        project: str | None = None,
        earlier_s: float = 0.0,
        earlier: Spent | None = None,
        energy: EnergyReading | None = None,
        kgco2e_per_kwh: float | None = None,
        minimum_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.own, self.drawn, self.project = tuple(budgets), tuple(drawn), project
        self.budgets = (*self.own, *self.drawn)
        self.price_usd_per_h = price_usd_per_h
        self.accelerators = accelerators
        self.started_s = started_s
        self.energy, self.kgco2e_per_kwh, self.minimum_s = energy, kgco2e_per_kwh, minimum_s
        self._clock = clock
        self.earlier = earlier or spent_at(earlier_s, price_usd_per_h, accelerators)
        for budget in self.budgets:
            check_metered(budget, self)

    @classmethod
    def of_cluster(
        cls,
        budgets: Sequence[Budget],
        cluster: Cluster,
        *,
        started_s: float,
        earlier: Spent,
        drawn: Sequence[Budget] = (),
        project: str | None = None,
        energy: EnergyReading | None = None,
        kgco2e_per_kwh: float | None = None,
        minimum_s: float = 0.0,
    ) -> Meter:
        """All of the cluster is rented, whether the strategy uses every rank or not."""
        return cls(
            budgets,
            price_usd_per_h=cluster.price_usd_per_h,
            accelerators=cluster.ranks,
            started_s=started_s,
            drawn=drawn,
            project=project,
            earlier=earlier,
            energy=energy,
            kgco2e_per_kwh=kgco2e_per_kwh,
            minimum_s=minimum_s,
        )

    @property
    def earlier_s(self) -> float:
        return self.earlier.wall_s

    def elapsed_s(self) -> float:
        """Since this supervisor started."""
        return self._clock() - self.started_s

    def attempt(self) -> Spent:
        """What this attempt has used."""
        elapsed_s = self.elapsed_s()
        kwh = None if self.energy is None else self.energy.kwh()
        return Spent(
            wall_s=elapsed_s,
            cost_usd=self._cost_usd(elapsed_s),
            gpu_hours=elapsed_s / 3600 * self.accelerators,
            fraction=None,
            energy_kwh=kwh,
            co2e_kg=_product(kwh, self.kgco2e_per_kwh),
        )

    def _cost_usd(self, elapsed_s: float) -> float | None:
        return _product(self.price_usd_per_h, max(elapsed_s, self.minimum_s) / 3600)

    def spent(self) -> Spent:
        before, now = self.earlier, self.attempt()
        total = Spent(
            wall_s=before.wall_s + now.wall_s,
            cost_usd=_sum(now.cost_usd, before.cost_usd),
            gpu_hours=before.gpu_hours + now.gpu_hours,
            fraction=None,
            energy_kwh=_sum(now.energy_kwh, before.energy_kwh),
            co2e_kg=_sum(now.co2e_kg, before.co2e_kg),
        )
        used = [amount_of(b, total) / b.amount for b in self.budgets]
        return replace(total, fraction=max(used, default=None))

    def _remaining_s(self, budget: Budget, *, expected: bool = False) -> float:
        """Wall seconds from now until one budget is used up: at least, or as expected."""
        elapsed_s = self.elapsed_s()
        match budget.kind:
            case "hours":
                return budget.amount * 3600 - self.earlier.wall_s - elapsed_s
            case "gpu_hours":
                left = budget.amount - self.earlier.gpu_hours
                return left * 3600 / self.accelerators - elapsed_s
            case "money":
                left = budget.amount - (self.earlier.cost_usd or 0.0)
                assert self.price_usd_per_h is not None
                if self.below_minimum(budget):
                    return min(0.0, left)
                return left / self.price_usd_per_h * 3600 - elapsed_s
            case _:
                assert self.energy is not None
                left_kwh = budget.amount - amount_of(budget, self.spent())
                if budget.kind == "carbon":
                    left_kwh /= self.kgco2e_per_kwh or 1.0
                power_kw = self.energy.expected_kw() if expected else self.energy.upper_kw()
                return left_kwh / max(1e-9, power_kw) * 3600

    def below_minimum(self, budget: Budget) -> bool:
        """Whether the shortest bill of one start is above what is left of it."""
        left = budget.amount - (self.earlier.cost_usd or 0.0)
        least = (self.price_usd_per_h or 0.0) * self.minimum_s / 3600
        # sums of earlier bills are off by their last digits
        return budget.kind == "money" and left < least * (1 - 1e-9)

    def remaining_s(self) -> float | None:
        """Wall seconds until the first budget is used up; null without a budget."""
        return min((self._remaining_s(b) for b in self.budgets), default=None)

    def remaining_expected_s(self) -> float | None:
        """The same at the power that is drawn now, not at the most that may be drawn."""
        return min((self._remaining_s(b, expected=True) for b in self.budgets), default=None)

    @property
    def binding(self) -> Budget | None:
        """The budget that ends first, as it looks now."""
        return min(self.budgets, key=self._remaining_s, default=None)

    @property
    def limit_s(self) -> float | None:
        """Wall time of the whole run when the first budget ends."""
        remaining_s = self.remaining_s()
        return None if remaining_s is None else self.earlier_s + self.elapsed_s() + remaining_s

    def affords(self, upper_s: float) -> bool:
        """Whether something that takes at most `upper_s` ends within the budget."""
        remaining_s = self.remaining_s()
        return remaining_s is None or remaining_s >= upper_s

    def decide(self, next_step_s_upper: float, finish_s_upper: float) -> bool:
        """True = stop now: after one more step there might be too little left to finish in."""
        return not self.affords(next_step_s_upper + finish_s_upper)

    @property
    def bound_by_project(self) -> bool:
        """Whether the project's budget ends before the run's own."""
        drawn_s = min((self._remaining_s(b) for b in self.drawn), default=math.inf)
        own_s = min((self._remaining_s(b) for b in self.own), default=math.inf)
        return drawn_s < own_s - 1e-3  # drawn in full they are the same, but for rounding

    def limit_text(self) -> str:
        """The budget that ends first, for a person."""
        budget = self.binding
        if budget is None:
            return "none"
        whose = (
            f" (from project {self.project!r})" if self.project and self.bound_by_project else ""
        )
        return in_unit(budget, budget.amount) + whose

    def in_words(self, wall_s: float) -> str:
        """What the binding budget counts, when the whole run has taken so long."""
        budget = self.binding
        if budget is None:
            return format_seconds(wall_s)
        return in_unit(budget, self.amount_at(budget, wall_s))

    def amount_at(self, budget: Budget, wall_s: float) -> float:
        """What a budget counts, when the whole run has taken so long."""
        more_s = wall_s - self.earlier_s
        match budget.kind:
            case "hours":
                return wall_s / 3600
            case "gpu_hours":
                return self.earlier.gpu_hours + more_s / 3600 * self.accelerators
            case "money":
                return (self.earlier.cost_usd or 0.0) + (self._cost_usd(more_s) or 0.0)
            case _:
                assert self.energy is not None
                more = (more_s - self.elapsed_s()) / 3600 * self.energy.upper_kw()
                if budget.kind == "carbon":
                    more *= self.kgco2e_per_kwh or 0.0
                return amount_of(budget, self.spent()) + more


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _sum(now: float | None, before: float | None) -> float | None:
    """What is metered now, with what earlier attempts metered of it."""
    return None if now is None else now + (before or 0.0)


def spent_at(wall_s: float, price_usd_per_h: float | None, accelerators: int) -> Spent:
    """Of attempts that were billed at one price, without energy."""
    return Spent(
        wall_s=wall_s,
        cost_usd=_product(price_usd_per_h, wall_s / 3600),
        gpu_hours=wall_s / 3600 * accelerators,
        fraction=None,
    )


def amount_of(budget: Budget, spent: Spent) -> float:
    """What is spent in the unit of a budget."""
    amount = {
        "money": spent.cost_usd,
        "hours": spent.wall_s / 3600,
        "gpu_hours": spent.gpu_hours,
        "energy": spent.energy_kwh,
        "carbon": spent.co2e_kg,
    }[budget.kind]
    return amount or 0.0


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
        """The longest of the last ones and a margin, which halves as more are seen."""
        if not self._seen:
            return self._guess_s
        margin = (self._factor - 1) * max(0.5, len(self._seen) ** -0.25)
        return max(self._seen) * (1 + margin) + self._slack_s

    def mean_s(self) -> float:
        return sum(self._seen) / len(self._seen) if self._seen else self._guess_s


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
        self.export = UpperBound(by_bytes_s + 0.5, factor=1.3, slack_s=0.1)
        self.after_s = 0.0  # for what others do after the last step

    def kept_s(self) -> dict[str, float]:
        """What is kept for each part at least, when the run stops for its budget."""
        parts = {"step": self.step, "save": self.save, "export": self.export, "eval": self.evaluate}
        return {**{name: part.upper_s() for name, part in parts.items()}, "shutdown": SHUTDOWN_S}

    def finish_s(self) -> float:
        """The last save, the held-out evaluation, the export and the end of the processes."""
        parts = (self.save, self.evaluate, self.export)
        return sum(part.upper_s() for part in parts) + self.after_s + SHUTDOWN_S

    def finish_expected_s(self) -> float:
        """The same as it went so far."""
        parts = (self.save, self.evaluate, self.export)
        return sum(part.mean_s() for part in parts) + self.after_s + SHUTDOWN_S


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

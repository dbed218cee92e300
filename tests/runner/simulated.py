"""A run under limits on a simulated clock: every duration is drawn, nothing waits."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from outlay.planner.spec.job import Budget, Schedule
from outlay.runner.budget import SHUTDOWN_S, Bounds, Meter, Spent
from outlay.runner.control import Controller, Policy
from outlay.runner.folder import HEARTBEAT_S
from outlay.runner.schedule import Decay
from outlay.runner.supervise import CUT_OFF_S

KINDS = ("money", "hours", "gpu_hours", "energy", "carbon")
RANKS = 8
CARBON = 0.4
ANNEALED = Schedule(name="cosine", warmup_steps=10, final_fraction=0.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Power:
    """A counter whose power moves between half and all of its limit."""

    source = "simulated"

    def __init__(self, clock: Clock, draws: random.Random, limit_kw: float) -> None:
        self.clock, self.limit_kw = clock, limit_kw
        self.kw = limit_kw * draws.uniform(0.5, 0.95)
        self.began_s = clock()

    def kwh(self) -> float:
        return self.kw * (self.clock() - self.began_s) / 3600

    def upper_kw(self) -> float:
        seen = self.clock() - self.began_s
        return min(self.limit_kw, 1.03 * self.kw) if seen > 30 else self.limit_kw

    def expected_kw(self) -> float:
        return self.kw


class Killed(Exception):
    """By the guard of the supervisor, at the very end of the budget."""


@dataclass
class Result:
    used: float = 0.0
    """Of the budget that ends first."""
    work_left: bool = False
    cut: bool = False
    attempts: int = 1
    last_rate: float | None = None
    forecast_error: float | None = None
    steps: int = 0


class Simulated:
    """A machine and a budget drawn from a seed, and a run on it."""

    def __init__(self, seed: int, *, policy: Policy = "anneal") -> None:
        d = self.draws = random.Random(seed)
        self.policy, self.clock = policy, Clock()
        self.step_s = 10 ** d.uniform(-1, 1.3)
        room_s = self.step_s * d.randint(300, 1200)
        self.save_s = room_s * 10 ** d.uniform(-4, -1.4)
        self.startup_s = room_s * d.uniform(0.002, 0.05)
        self.evaluate_s, self.export_s = self.save_s * d.uniform(0, 0.5), self.save_s * 0.3
        self.limit_s = room_s + self.startup_s + 10 * self.save_s + 60
        self.price = 10 ** d.uniform(-1, 3)
        self.steps = int(self.limit_s / self.step_s * d.choice([0.5, 1.1, 2.0, 50.0]))
        self.changes = sorted(d.uniform(0, self.limit_s) for _ in range(d.choice([0, 0, 1, 3])))
        self.kills = sorted(d.uniform(0, self.limit_s) for _ in range(d.choice([0, 0, 1, 2])))
        self.limit_kw = d.uniform(0.5, 10)
        self.budgets = self._budgets()
        self.speed = 1.0
        self.total_s = 0.0

    def _budgets(self) -> tuple[Budget, ...]:
        """One to three kinds; each about as long, so that which ends first may change."""
        hours, kwh = self.limit_s / 3600, self.limit_s / 3600 * self.limit_kw * 0.8
        amounts = {
            "money": hours * self.price,
            "hours": hours,
            "gpu_hours": hours * RANKS,
            "energy": kwh,
            "carbon": kwh * CARBON,
        }
        kinds = self.draws.sample(KINDS, self.draws.randint(1, 3))
        return tuple(
            Budget(kind=kind, amount=amounts[kind] * self.draws.uniform(0.9, 1.3))  # type: ignore[arg-type]
            for kind in kinds
        )

    def run(self) -> Result:
        result, earlier, saved = Result(), None, (0, None)
        while True:
            end = self._attempt(result, earlier, saved)
            if end is None:
                return result
            earlier, saved = end
            result.attempts += 1
            if self.draws.random() < 0.5:  # a replacement machine at another price
                self.price *= self.draws.uniform(0.5, 1.5)

    def _spend(self, seconds: float) -> None:
        """Time passes; where the budget ends in it, the supervisor kills."""
        remaining_s = self.meter.remaining_s()
        assert remaining_s is not None
        if seconds > remaining_s - CUT_OFF_S:
            self.clock.now_s += max(0.0, remaining_s - CUT_OFF_S)
            raise Killed
        self.clock.now_s += seconds

    def _drawn(self, seconds: float) -> float:
        slow = 1.2 if self.draws.random() < 0.02 else 1.0
        return seconds * self.draws.uniform(0.95, 1.05) * slow

    def _timed(self, seconds: float, bound: object) -> None:
        took_s = self._drawn(seconds)
        self._spend(took_s)
        bound.add(took_s)  # type: ignore[attr-defined]

    def _attempt(self, result: Result, earlier: Spent | None, saved):
        began_s = self.clock()
        self.meter = meter = Meter(
            self.budgets,
            price_usd_per_h=self.price,
            accelerators=RANKS,
            started_s=began_s,
            earlier=earlier,
            energy=Power(self.clock, self.draws, self.limit_kw),
            kgco2e_per_kwh=CARBON,
            clock=self.clock,
        )
        step, state = saved
        bounds = Bounds(step_guess_s=2 * self.step_s, parameters=1, write_bytes_per_s=1e9)
        bounds.save.guess(2 * self.save_s + 1)
        bounds.evaluate.guess(1.5 * self.evaluate_s)
        bounds.export.guess(1.5 * self.export_s)
        decay = Decay(ANNEALED, 1.0, self.steps)
        if state is not None:
            decay.restore(state, step, int(state["steps"]))
        try:
            self._spend(self._drawn(self.startup_s))
            controller = Controller(meter, bounds, steps=self.steps, policy=self.policy)
            first, saved_at_s = step, self.clock()
            while True:
                decision = controller.decide(step)
                decay.retarget(step, decision.total_steps)
                if step >= self.steps or decision.stop:
                    break
                if self._killed(began_s):
                    # what was spent since is charged to the next heartbeat
                    self.clock.now_s += self.draws.uniform(0, HEARTBEAT_S)
                    return replace(meter.spent(), fraction=None), saved
                result.last_rate = decay.rate(step)
                self._step(bounds, step - first)
                step += 1
                due = self.clock() - saved_at_s > max(60, 50 * self.save_s)
                if (step - first == 3 or due) and controller.affords(bounds.save.upper_s()):
                    self._timed(self.save_s, bounds.save)
                    saved_at_s, saved = self.clock(), (step, decay.state())
            for seconds, bound in (
                (self.save_s, bounds.save),
                (self.evaluate_s, bounds.evaluate),
                (self.export_s, bounds.export),
            ):
                if bound is bounds.save or meter.affords(bound.upper_s() + SHUTDOWN_S):
                    self._timed(seconds, bound)
            self._spend(min(SHUTDOWN_S, 0.5))
        except Killed:
            result.cut = True
        result.work_left = step < self.steps
        result.steps = step
        result.used = meter.spent().fraction or 0.0
        return None

    def _step(self, bounds: Bounds, done: int) -> None:
        while self.changes and self.clock() - 1000 >= self.changes[0]:
            self.changes.pop(0)
            self.speed = self.draws.uniform(0.7, 1.4)
        slow_start = 3.0 if done < 2 else 1.0
        self._timed(self.step_s * self.speed * slow_start, bounds.step)
        if done == 5:
            bounds.step.forget_first(3)

    def _killed(self, began_s: float) -> bool:
        if self.kills and self.clock() - 1000 >= self.kills[0]:
            self.kills.pop(0)
            return True
        return False

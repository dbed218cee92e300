"""Waits for the ranks of one attempt: shows progress, forwards signals, ends what must end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from outlay.planner.spec.files import check_schema, parse, read_mapping, to_json, write_text
from outlay.planner.spec.measurement import SCHEMA_OUTCOME, Outcome
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import EXIT_BUDGET, EXIT_DONE, EXIT_FAILED, EXIT_RESTART_ME, OutlayError
from outlay.runner.booking import Booking
from outlay.runner.budget import Meter, Spent
from outlay.runner.events import EventLog, Follower
from outlay.runner.failures import cause_of
from outlay.runner.folder import HEARTBEAT_S, Attempts, RunFolder
from outlay.runner.processes import Ranks, Signals
from outlay.runner.question import Prompt
from outlay.runner.telemetry import Progress

POLL_S = 0.1
NEAR_END_S, NEAR_END_POLL_S = 2.0, 0.02
"""With less than that left of the budget, it is looked at so often."""
CUT_OFF_S = 0.4
"""Left of the budget when whatever still runs is killed: the guard, should all bounds be wrong.
Twice the time by which this process woke late is added: once for the look, once for the kill."""
LATE_FADES = 0.98
"""A wait: what was late half a minute ago counts little."""
EXIT_GRACE_S = 10.0
"""For ranks to end by themselves once the outcome is on disk."""
ORPHAN_GRACE_S = 5.0
"""For the other ranks to note their error and end, once one has ended without an outcome."""

_CLEAN = (EXIT_DONE, EXIT_BUDGET, EXIT_RESTART_ME)


@dataclass
class Seen:
    """What the events of this attempt and those before it told."""

    step: int = 0
    saved_step: int | None = None
    checkpoint: str | None = None
    loss: float | None = None
    export: str | None = None
    ready: set[int] = field(default_factory=set)


class Supervisor:
    """Watches one attempt until nothing of it is left, and says how it ended."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        *,
        meter: Meter,
        log: EventLog,
        attempts: Attempts,
        progress: Progress,
        follower: Follower,
        seen: Seen,
        booking: Booking | None = None,
    ) -> None:
        self._plan, self._folder, self._meter, self._log = plan, folder, meter, log
        self._attempts, self._progress = attempts, progress
        self._follower, self._seen = follower, seen
        self._beat_s = time.monotonic()
        self._booking = Booking(None, None) if booking is None else booking
        self._ended_by: str | None = None
        self._prompt = Prompt(folder)
        self._late_s = 0.0
        self._reserved = True

    def watch(self, ranks: Ranks, signals: Signals) -> None:
        """Returns when every rank has ended."""
        asked = terminated = False
        kill_at_s: float | None = None
        while ranks.poll():
            self._look()
            if (signals.stop or not self._reserved) and not asked:
                asked = True
                why = "asked to stop" if signals.stop else "the project's budget was given away"
                self._log.write("warning", message=f"{why}: finishing the step and saving")
            if asked and not terminated and self._all_ready():
                # earlier a rank might not have its handler yet, and would die of the signal
                terminated = True
                ranks.terminate()
            if kill_at_s is None and (grace_s := self._grace_s(ranks)) is not None:
                kill_at_s = time.monotonic() + grace_s
                if not self._folder.outcome.exists():
                    ranks.terminate()
            if self._must_kill(signals, kill_at_s):
                ranks.kill()
                ranks.wait(EXIT_GRACE_S)
            left_s = self._meter.remaining_s()
            near = left_s is not None and left_s < NEAR_END_S
            self._wait(NEAR_END_POLL_S if near else POLL_S)
        self._look()

    def _wait(self, seconds: float) -> None:
        """On a machine that is overloaded this process is late, and so will be its kill."""
        began_s = time.monotonic()
        time.sleep(seconds)
        late_s = time.monotonic() - began_s - seconds
        self._late_s = max(LATE_FADES * self._late_s, late_s)

    def _look(self) -> None:
        """Read new events, show them, and note what is spent."""
        for event in self._follower.new_events():
            self._progress.event(event)
            self._see(event.kind, event.step, event.data)
            self._prompt.event(event.kind)
        self._progress.tick()
        self._prompt.tick()
        if time.monotonic() - self._beat_s >= HEARTBEAT_S:
            self.beat()

    def _see(self, kind: str, step: int | None, data: dict[str, object]) -> None:
        seen = self._seen
        if kind == "step" and step is not None:
            seen.step = step
            loss = data.get("loss")
            seen.loss = float(loss) if isinstance(loss, float | int) else None
        elif kind == "save":
            seen.saved_step, seen.checkpoint = step, str(data["path"])
        elif kind == "export":
            seen.export = str(data["path"])
        elif kind == "rank_ready":
            seen.ready.add(int(str(data["rank"])))
            if self._all_ready():
                self.beat(ready_s=self._meter.elapsed_s())

    def _all_ready(self) -> bool:
        return len(self._seen.ready) == self._plan.strategy.world

    def beat(self, *, ended: bool = False, ready_s: float | None = None) -> None:
        """Note the time used, so that it counts whatever happens next."""
        self._beat_s = time.monotonic()
        used = self._meter.attempt()
        last = replace(
            self._attempts.attempts[-1],
            elapsed_s=used.wall_s,
            cost_usd=used.cost_usd,
            gpu_hours=used.gpu_hours,
            energy_kwh=used.energy_kwh,
            co2e_kg=used.co2e_kg,
            ended=ended,
        )
        if ready_s is not None:
            last = replace(last, ready_s=ready_s)
        self._attempts = self._attempts.with_last(last)
        self._folder.write_attempts(self._attempts)
        if not ended:
            self._note(used)

    def _note(self, used: Spent) -> None:
        """In the ledger. One that fails does not end a training, but its warning is shown."""
        try:
            self._reserved = self._booking.beat(used, self._seen.step)
        except OutlayError as error:
            self._log.write("warning", message=f"the ledger was not written: {error.why}")

    def _grace_s(self, ranks: Ranks) -> float | None:
        """How long the rest may take, once there is a reason to end it."""
        if self._folder.outcome.exists():
            return EXIT_GRACE_S
        # ranks that are done may end before rank 0 has written the outcome
        failed = any(code not in _CLEAN for _, code in ranks.deaths)
        return ORPHAN_GRACE_S if failed else None

    def _must_kill(self, signals: Signals, kill_at_s: float | None) -> bool:
        remaining_s = self._meter.remaining_s()
        if signals.kill:
            self._ended_by = "killed by a second Ctrl-C"
        elif remaining_s is not None and remaining_s <= CUT_OFF_S + 2 * self._late_s:
            self._ended_by = f"the budget of {self._meter.limit_text()} ran out before the end"
        else:
            return kill_at_s is not None and time.monotonic() >= kill_at_s
        return True

    def conclude(self, ranks: Ranks) -> Outcome:
        """The outcome with the final bill; made here where the ranks left none."""
        path = self._folder.outcome
        if path.exists():
            mapping = read_mapping(path)
            check_schema(mapping, SCHEMA_OUTCOME, path)
            outcome = parse(Outcome, mapping, path=path)
        else:
            outcome = self._without_outcome(ranks)
        spent = self._meter.spent()
        outcome = replace(
            outcome,
            wall_s=spent.wall_s,
            cost_usd=spent.cost_usd,
            energy_kwh=spent.energy_kwh,
            energy_source=None if self._meter.energy is None else self._meter.energy.source,
            co2e_kg=spent.co2e_kg,
        )
        write_text(path, to_json(outcome))
        self._log.write("end", outcome.steps, message=outcome.reason, state=outcome.state)
        self._look()
        self.beat(ended=True)
        used = self._meter.attempt()
        try:
            self._booking.close(
                used, state=outcome.state, reason=outcome.reason, steps=outcome.steps
            )
        except OutlayError as error:
            self._log.write("warning", message=f"the ledger was not written: {error.why}")
        return outcome

    def _without_outcome(self, ranks: Ranks) -> Outcome:
        seen = self._seen
        saved = seen.step == (seen.saved_step or 0)
        if self._ended_by is None:
            cause = cause_of(self._folder, ranks.deaths)
            reason, code = cause.reason, cause.exit_code
        else:
            cut = self._ended_by.startswith("the budget")
            reason, code = self._ended_by, EXIT_BUDGET if cut and saved else EXIT_FAILED
            if not saved:
                last = "none" if seen.saved_step is None else f"that of step {seen.saved_step}"
                reason += f" at step {seen.step}; the last checkpoint is {last}"
        return Outcome(
            state="budget" if code == EXIT_BUDGET else "failed",
            exit_code=code,
            reason=reason,
            steps=seen.step,
            tokens=seen.step * self._plan.job.tokens_per_step,
            wall_s=0.0,
            cost_usd=None,
            train_loss=seen.loss,
            heldout_loss=None,
            checkpoint=seen.checkpoint,
            export=seen.export,
        )

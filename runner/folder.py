"""The run folder: what lies where, who may work in it, and what earlier attempts have used."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from outlay.planner.spec.files import (
    check_schema,
    parse,
    read_mapping,
    to_json,
    to_yaml,
    write_text,
)
from outlay.planner.spec.plan import SCHEMA_PLAN, Plan
from outlay.profiles.errors import UsageError
from outlay.runner.budget import Spent, spent_at
from outlay.runner.limits import SCHEMA_LIMITS, Limits

SCHEMA_ATTEMPTS = "outlay/attempts@1"

HEARTBEAT_S = 2.0
"""How often the supervisor notes what is spent, so that a kill -9 hides no more than this."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the supervisor."""

    started_at: str
    elapsed_s: float
    """Wall time from its start, as last noted."""
    ready_s: float | None = None
    """From its start until the last rank was ready to train; null if that did not come."""
    ended: bool = False
    """False while it runs, and for ever after a kill -9."""
    cost_usd: float | None = None
    """As billed at the price of then; null = no price, or noted by an older version."""
    gpu_hours: float | None = None
    energy_kwh: float | None = None
    co2e_kg: float | None = None
    price_usd_per_h: float | None = None
    minimum_s: float = 0.0
    """Shortest time that is billed for it."""

    @property
    def wall_s(self) -> float:
        """One that was killed is charged to its next heartbeat."""
        return self.elapsed_s + (0.0 if self.ended else HEARTBEAT_S)

    def bill_usd(self, price_usd_per_h: float | None) -> float | None:
        """What it cost; the given price counts where none is noted. Killed, it is billed for more
        time, but not more often for the shortest time."""
        price = price_usd_per_h if self.price_usd_per_h is None else self.price_usd_per_h
        if price is None or (self.ended and self.cost_usd is not None):
            return self.cost_usd
        return max(self.cost_usd or 0.0, price * max(self.wall_s, self.minimum_s) / 3600)

    def charged(self, amount: float | None) -> float | None:
        """What a killed attempt may have used after it was last noted is charged to it."""
        if amount is None or self.ended:
            return amount
        return amount * (self.elapsed_s + HEARTBEAT_S) / max(self.elapsed_s, 1e-3)


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """`attempts.json`: each start of the supervisor, the oldest first."""

    attempts: tuple[Attempt, ...] = ()
    schema: str = SCHEMA_ATTEMPTS

    def spent_s(self) -> float:
        """Wall time of all of them; one that was killed is charged to its next heartbeat."""
        return sum(a.wall_s for a in self.attempts)

    def spent(self, price_usd_per_h: float | None, accelerators: int) -> Spent:
        """All that they used; the given price and number count where an attempt has none noted."""
        total = spent_at(0.0, 0.0, accelerators)
        for attempt in self.attempts:
            hours = attempt.charged(attempt.gpu_hours)
            if hours is None:
                hours = attempt.wall_s / 3600 * accelerators
            total = Spent(
                wall_s=total.wall_s + attempt.wall_s,
                cost_usd=_plus(total.cost_usd, attempt.bill_usd(price_usd_per_h)),
                gpu_hours=total.gpu_hours + hours,
                fraction=None,
                energy_kwh=_plus(total.energy_kwh, attempt.charged(attempt.energy_kwh)),
                co2e_kg=_plus(total.co2e_kg, attempt.charged(attempt.co2e_kg)),
            )
        return total

    def with_last(self, attempt: Attempt) -> Attempts:
        return replace(self, attempts=(*self.attempts[:-1], attempt))


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None and b is None else (a or 0.0) + (b or 0.0)


@dataclass(frozen=True)
class RunFolder:
    """Paths below one run."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.root / "ds_config.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def measurement(self) -> Path:
        return self.root / "measurement.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.json"

    @property
    def limits(self) -> Path:
        return self.root / "limits.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def failure(self, rank: int) -> Path:
        return self.root / f"failure-rank-{rank}.json"

    def dataset(self, plan: Plan) -> Path:
        """The prepared dataset: the plan's own, or what was made from its text for this run."""
        if plan.job.data is None:
            raise UsageError("the plan names no data", do="plan with --data")
        return self.data if plan.job.data.format == "text" else Path(plan.job.data.path)

    def failures(self) -> list[Path]:
        return sorted(self.root.glob("failure-rank-*.json"))

    def read_plan(self) -> Plan:
        mapping = read_mapping(self.plan)
        check_schema(mapping, SCHEMA_PLAN, self.plan)
        return parse(Plan, mapping, path=self.plan)

    def write_plan(self, plan: Plan) -> None:
        write_text(self.plan, to_yaml(plan))
        write_text(self.deepspeed, to_json(plan.deepspeed))

    def read_attempts(self) -> Attempts:
        if not self.attempts.exists():
            return Attempts()
        mapping = read_mapping(self.attempts)
        check_schema(mapping, SCHEMA_ATTEMPTS, self.attempts)
        return parse(Attempts, mapping, path=self.attempts)

    def write_attempts(self, attempts: Attempts) -> None:
        write_text(self.attempts, to_json(attempts))

    def read_limits(self) -> Limits:
        if not self.limits.exists():
            return Limits()
        mapping = read_mapping(self.limits)
        check_schema(mapping, SCHEMA_LIMITS, self.limits)
        return parse(Limits, mapping, path=self.limits)

    def write_limits(self, limits: Limits) -> None:
        write_text(self.limits, to_json(limits))

    def is_run(self) -> bool:
        return self.plan.is_file() and self.attempts.is_file()

    def require_new(self) -> None:
        """A new run needs a folder that is empty or not there yet."""
        file = next(
            (p for p in self.root.absolute().parents if p.exists() and not p.is_dir()), None
        )
        if file is not None:
            raise UsageError(
                "a folder below a file cannot be", where=str(self.root), why=f"{file} is a file"
            )
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise UsageError("this is a file, a folder was expected", where=str(self.root))
        if self.is_run():
            raise UsageError(
                "this folder already holds a run",
                where=str(self.root),
                do=f"outlay resume {self.root}, or choose another folder",
            )
        # names with a dot are the lock and unfinished data of a start that was refused or killed
        if any(not p.name.startswith(".") for p in self.root.iterdir()):
            raise UsageError(
                "this folder is not empty, and not a run",
                where=str(self.root),
                do="choose an empty or a new folder",
            )

    def require_run(self) -> None:
        if not self.is_run():
            raise UsageError(
                "this is not the folder of a run",
                where=str(self.root),
                why="it holds no plan.yaml and attempts.json",
                do="start one with: outlay run PLAN --dir RUN",
            )

    def owner(self) -> int | None:
        """The process that works in this run; none where nobody holds its lock."""
        try:
            handle = os.open(self.root / ".lock", os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(handle, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdigit() else None
        finally:
            os.close(handle)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go of it however the process ends."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / ".lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UsageError(
                "this run is alive", where=str(self.root), why=f"process {owner} works in it"
            ) from None
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

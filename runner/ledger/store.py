"""The ledger's SQLite file: what runs spent, and what they may still draw from a project's budget.

A transaction is one heartbeat, one reservation or one end; each is durable before it returns
(WAL, synchronous=FULL), so kill -9 or power loss at any instant leaves the state before or after it.
What a budget is charged with: an attempt that lives, the larger of what it spent and what it reserved;
one that ended, what it spent; one that died, what it had spent and what it may have spent until its
next heartbeat, at most its reservation. A reservation is given only if the sum stays within the budget.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from outlay.planner.spec.job import Budget, BudgetKind
from outlay.profiles.errors import FileError, NotFeasible, OutlayError, UsageError
from outlay.runner.amounts import in_unit
from outlay.runner.budget import Spent
from outlay.runner.events import utc_now
from outlay.runner.ledger.dead import SPENT, bury
from outlay.runner.ledger.entry import NOT_KNOWN, Entry, Took, Total, Want
from outlay.runner.ledger.lease import LEASE_S, this_process
from outlay.runner.ledger.schema import COLUMN, is_current, prepare

VARIABLE = "OUTLAY_LEDGER"
WAIT_S = 10.0
"""For other processes to finish writing, before a run begins."""
BEAT_WAIT_S, CLOSE_WAIT_S = 1.0, 3.0
"""The same while a run is metered, and at its end: a ledger that somebody holds must not cost money."""


def ledger_path(given: str | None = None) -> Path | None:
    """The file that is meant; None where the ledger is switched off."""
    if given is not None and not given.strip():
        raise UsageError("no file is named", where="--ledger", do="give its path, or `off`")
    text = given or os.environ.get(VARIABLE, "")
    if text.lower() == "off":
        return None
    if text:
        return Path(text).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "outlay" / "ledger.sqlite"


class Ledger:
    """One file, shared by all processes of a machine. Not for network file systems: SQLite's WAL
    needs memory that its users share."""

    def __init__(self, path: Path, *, within_s: float | None = None) -> None:
        """`within_s`: for all transactions from now on together, but those that say how long."""
        self.path = path
        self._until_s = None if within_s is None else time.monotonic() + within_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=self._wait_s(), isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            if not is_current(self._db):
                with self.change() as db:
                    prepare(db, path)
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    @classmethod
    def opened(cls, given: str | None = None, *, within_s: float | None = None) -> Ledger | None:
        """The ledger of this user, or the given file; None where it is `off`."""
        path = ledger_path(given)
        return None if path is None else cls(path, within_s=within_s)

    def _wait_s(self) -> float:
        """For other processes to finish writing."""
        return WAIT_S if self._until_s is None else max(0.05, self._until_s - time.monotonic())

    def _failed(self, error: Exception) -> OutlayError:
        kind = FileError if "not a database" in str(error) else OutlayError
        other = "set OUTLAY_LEDGER to another file, or to off"
        return kind(
            "the ledger cannot be used",
            where=str(self.path),
            why=str(error),
            do=f"wait for the process that holds it, or {other}"
            if "locked" in str(error)
            else other,
        )

    @contextmanager
    def change(self, wait_s: float | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process' can come between; fails where others write for so long."""
        wait_s = self._wait_s() if wait_s is None else wait_s
        try:
            self._db.execute(f"PRAGMA busy_timeout={round(1000 * wait_s)}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._db.close()

    def whole(self) -> bool:
        """What SQLite itself says of the file."""
        return [tuple(r) for r in self.rows("PRAGMA integrity_check")] == [("ok",)]

    def set_budget(self, project: str, budget: Budget) -> None:
        with self.change() as db:
            db.execute(
                "INSERT OR REPLACE INTO budgets VALUES (?, ?, ?)",
                (project, budget.kind, budget.amount),
            )

    def remove_budgets(self, project: str) -> int:
        with self.change() as db:
            return db.execute("DELETE FROM budgets WHERE project = ?", (project,)).rowcount

    def totals(self, project: str | None = None) -> list[Total]:
        """Of one project, or of all that have a budget; the dead are buried first."""
        with self.change() as db:
            bury(db)
            budgets = db.execute(
                "SELECT * FROM budgets WHERE ?1 IS NULL OR project = ?1 ORDER BY project, kind",
                (project,),
            ).fetchall()
            return [_total(db, row["project"], _budget(row)) for row in budgets]

    def spent(self, run: str) -> Spent:
        """What all attempts of a run used so far."""
        with self.change() as db:
            bury(db)
            sums = ", ".join(f"sum({name})" for name in SPENT)
            wall_s, cost, hours, kwh, kg = db.execute(
                f"SELECT {sums} FROM attempts WHERE run = ?", (run,)
            ).fetchone()
        return Spent(
            wall_s=wall_s or 0.0,
            cost_usd=cost,
            gpu_hours=hours or 0.0,
            fraction=None,
            energy_kwh=kwh,
            co2e_kg=kg,
        )

    def took(self, run: str) -> Took:
        """By the latest attempt of a run that measured it."""
        latest = (
            self.rows(
                f"SELECT {name} FROM attempts WHERE run = ? AND {name} IS NOT NULL "
                "ORDER BY id DESC LIMIT 1",
                run,
            )
            for name in ("step_s", "save_s")
        )
        step, save = (rows[0][0] if rows else None for rows in latest)
        return Took(step_s=step, save_s=save)

    def agree(self, run: str, noted: Spent) -> None:
        """Bring the last attempt of a run, if its process died, to what the run's folder noted.

        A folder is written more often than the ledger, and charges what may have followed its last
        note, as the ledger does: of two upper bounds it is the closer one."""
        with self.change() as db:
            bury(db)
            last = db.execute(
                "SELECT * FROM attempts WHERE run = ? ORDER BY id DESC LIMIT 1", (run,)
            ).fetchone()
            if last is None or last["state"] != "lost":
                return
            for name in SPENT:
                amount = getattr(noted, name)
                if amount is None:
                    continue
                rest = db.execute(
                    f"SELECT coalesce(sum({name}), 0) FROM attempts WHERE run = ? AND id <> ?",
                    (run, last["id"]),
                ).fetchone()[0]
                db.execute(
                    f"UPDATE attempts SET {name} = ? WHERE id = ?",
                    (max(0.0, amount - rest), last["id"]),
                )
            db.execute(
                "UPDATE attempts SET reason = 'its process died; charged as its folder noted' "
                "WHERE id = ?",
                (last["id"],),
            )

    def open_run(self, entry: Entry, *, wants: Sequence[Want] = (), alone: bool = False) -> OpenRun:
        """Enter an attempt of this process, and in the same transaction what it draws on its
        project's budgets; refused (NotFeasible) if there is too little left, and nothing entered.
        `alone`: refused (UsageError) while another process goes on under the run's name, too."""
        owner, low_mid_high = this_process(), entry.predicted_s or (None, None, None)
        with self.change() as db:
            bury(db)
            if alone:
                _require_alone(db, entry.run)
            # the first prediction stays: later ones know more
            db.execute(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)",
                (entry.run, entry.tool, utc_now(), *low_mid_high, entry.predicted_usd),
            )
            attempt = insert(
                db,
                "attempts",
                run=entry.run, user=entry.user, project=entry.project, tags=json.dumps(entry.tags),
                started_at=utc_now(), state="running", machine=entry.machine,
                accelerator=entry.accelerator, accelerators=entry.accelerators,
                price_usd_per_h=entry.price_usd_per_h, price_source=entry.price_source,
                minimum_s=entry.minimum_s, upper_kw=entry.upper_kw,
                kgco2e_per_kwh=entry.kgco2e_per_kwh, space=owner.space, pid=owner.pid,
                ticks=owner.ticks, beats=0, beat_s=time.monotonic(), next_s=LEASE_S, **entry.known(),
            )  # fmt: skip
            run = OpenRun(self, attempt, entry)
            for want in wants:
                run.draw(db, want)
        return run


class OpenRun:
    """An attempt of this process, until it is closed."""

    def __init__(self, ledger: Ledger, attempt: int, entry: Entry) -> None:
        self._ledger, self.attempt, self.entry = ledger, attempt, entry
        self.reserved: dict[BudgetKind, float] = {}
        """What this attempt may use in all, by kind of budget."""

    def reserve(self, kind: BudgetKind, amount: float | None, *, least: float = 0.0) -> float:
        """Draw anew: so much in all for this attempt, what it has spent included, or what is left."""
        with self._ledger.change() as db:
            bury(db)
            return self.draw(db, Want(kind=kind, amount=amount, least=least))

    def draw(self, db: sqlite3.Connection, want: Want) -> float:
        """Within a transaction. Refuses less than the least, and less than what is spent already."""
        project, kind = self.entry.project, want.kind
        row = db.execute(
            "SELECT * FROM budgets WHERE project = ? AND kind = ?", (project, kind)
        ).fetchone()
        if row is None:
            raise UsageError(
                f"project {project!r} has no budget of {kind}",
                where=str(self._ledger.path),
                do=f"outlay ledger budget {project or 'PROJECT'} AMOUNT",
            )
        # its own old reservation is free for the new one
        db.execute("DELETE FROM reservations WHERE attempt = ? AND kind = ?", (self.attempt, kind))
        own = self._spent(db, kind)
        total = _total(db, row["project"], _budget(row))
        free = own + total.left
        amount = free if want.amount is None else min(want.amount, free)
        if want.amount is not None and want.amount <= own < free:
            budget = _budget(row)
            raise NotFeasible(
                f"nothing is left of the run's own {in_unit(budget, want.amount)}",
                why=f"{in_unit(budget, own)} are used by its start, the shortest bill included",
                do="raise the run's budget",
            )
        if amount < want.least or amount <= own:
            others = replace(total, spent=total.spent - own, charged=total.charged - own)
            raise _too_little(row["project"], others, max(want.least, own))
        db.execute("INSERT INTO reservations VALUES (?, ?, ?)", (self.attempt, kind, amount))
        self.reserved[kind] = amount
        return amount

    def _spent(self, db: sqlite3.Connection, kind: BudgetKind) -> float:
        query = f"SELECT {COLUMN[kind]} FROM attempts a WHERE id = ?"
        return db.execute(query, (self.attempt,)).fetchone()[0] or 0.0

    def withdraw(self) -> None:
        """It never began: as if it had not been entered."""
        with self._ledger.change(CLOSE_WAIT_S) as db:
            db.execute("DELETE FROM reservations WHERE attempt = ?", (self.attempt,))
            db.execute("DELETE FROM attempts WHERE id = ?", (self.attempt,))
            db.execute(
                "DELETE FROM runs WHERE id = ?1 AND NOT EXISTS "
                "(SELECT 1 FROM attempts WHERE run = ?1)",
                (self.entry.run,),
            )

    def heartbeat(
        self,
        spent: Spent,
        *,
        steps: int | None = None,
        next_s: float = LEASE_S,
        took: Took = NOT_KNOWN,
        wait_s: float | None = None,
    ) -> bool:
        """Note what this attempt has used so far. `next_s`: at most so long until the next one: it
        is charged should the process die. False = its reservation is gone, because it was silent for
        so long that it was taken for dead: stop, or reserve anew."""
        with self._ledger.change(BEAT_WAIT_S if wait_s is None else wait_s) as db:
            rows = db.execute("SELECT kind FROM reservations WHERE attempt = ?", (self.attempt,))
            held = self.reserved.keys() <= {row["kind"] for row in rows}
            self._note(db, spent, steps, took)
            db.execute(
                "UPDATE attempts SET state = 'running', reason = NULL, ended_at = NULL, "
                "beats = beats + 1, beat_s = ?, next_s = ? WHERE id = ?",
                (time.monotonic(), next_s, self.attempt),
            )
        return held

    def _note(self, db: sqlite3.Connection, spent: Spent, steps: int | None, took: Took) -> None:
        sets = ", ".join(f"{name} = ?" for name in SPENT)
        db.execute(
            f"UPDATE attempts SET {sets}, steps = coalesce(?, steps), "
            "step_s = coalesce(?, step_s), save_s = coalesce(?, save_s) WHERE id = ?",
            (
                *(getattr(spent, name) for name in SPENT),
                steps,
                took.step_s,
                took.save_s,
                self.attempt,
            ),
        )

    def close_run(
        self,
        spent: Spent,
        *,
        state: str,
        reason: str = "",
        steps: int | None = None,
        took: Took = NOT_KNOWN,
        wait_s: float | None = None,
    ) -> None:
        """The final bill; what was reserved and not spent is free again."""
        with self._ledger.change(CLOSE_WAIT_S if wait_s is None else wait_s) as db:
            self._note(db, spent, steps, took)
            db.execute("DELETE FROM reservations WHERE attempt = ?", (self.attempt,))
            db.execute(
                "UPDATE attempts SET state = ?, reason = ?, ended_at = ? WHERE id = ?",
                (state, reason, utc_now(), self.attempt),
            )


def _require_alone(db: sqlite3.Connection, run: str) -> None:
    """Two that go on at once would each spend all that is left."""
    owner = this_process()
    other = db.execute(
        "SELECT machine, pid, started_at FROM attempts WHERE run = ? AND state = 'running' "
        "AND NOT (space = ? AND pid = ? AND ticks = ?)",
        (run, owner.space, owner.pid, owner.ticks),
    ).fetchone()
    if other is not None:
        raise UsageError(
            f"run {run!r} is going on already",
            where="run",
            why=f"process {other['pid']} of {other['machine']} began it at {other['started_at']}; both would "
            "spend what is left of one budget",
            do="end that one, or wait for it, or give another name",
        )


def insert(db: sqlite3.Connection, table: str, **values: object) -> int:
    """One row; returns its number."""
    marks = ", ".join("?" * len(values))
    query = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})"
    return int(db.execute(query, tuple(values.values())).lastrowid or 0)


def _budget(row: sqlite3.Row) -> Budget:
    return Budget(kind=row["kind"], amount=row["amount"])


def _total(db: sqlite3.Connection, project: str, budget: Budget) -> Total:
    used = f"coalesce({COLUMN[budget.kind]}, 0)"
    charged, spent, alive = db.execute(
        f"SELECT coalesce(sum(max({used}, coalesce(r.amount, 0))), 0), coalesce(sum({used}), 0),"
        " count(r.amount) FROM attempts a"
        " LEFT JOIN reservations r ON r.attempt = a.id AND r.kind = ? WHERE a.project = ?",
        (budget.kind, project),
    ).fetchone()
    return Total(budget=budget, charged=charged, spent=spent, alive=alive)


def _too_little(project: str, total: Total, needed: float) -> NotFeasible:
    said = partial(in_unit, total.budget)
    return NotFeasible(
        f"project {project!r} has too little left of its budget of {total.budget}",
        why=f"{said(total.spent)} are spent, {said(max(0.0, total.charged - total.spent))} reserved by "
        f"{total.alive} {'run that goes' if total.alive == 1 else 'runs that go'} on, {said(total.left)} are free"
        + (f"; more than {said(needed)} are needed" if needed > 0 else ""),
        do=f"wait for them, or raise it: outlay ledger budget {project} AMOUNT",
    )

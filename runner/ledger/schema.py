"""The tables of the ledger's file, and how a file of an older version becomes one of this."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from outlay.profiles.errors import FileError

VERSION = 2
"""PRAGMA user_version; a newer file is refused, not guessed at."""

SCHEMA = """
CREATE TABLE budgets (project TEXT, kind TEXT, amount REAL NOT NULL, PRIMARY KEY (project, kind));
CREATE TABLE runs (
  id TEXT PRIMARY KEY, tool TEXT NOT NULL, created_at TEXT NOT NULL, predicted_low_s REAL,
  predicted_s REAL, predicted_high_s REAL, predicted_usd REAL);
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs (id), user TEXT NOT NULL, project TEXT,
  tags TEXT NOT NULL, started_at TEXT NOT NULL, ended_at TEXT, state TEXT NOT NULL, reason TEXT,
  machine TEXT NOT NULL, accelerator TEXT,
  accelerators INTEGER NOT NULL, price_usd_per_h REAL, price_source TEXT, steps INTEGER,
  wall_s REAL NOT NULL, cost_usd REAL, gpu_hours REAL NOT NULL, energy_kwh REAL, co2e_kg REAL,
  space TEXT, pid INTEGER, ticks INTEGER, beats INTEGER NOT NULL, beat_s REAL NOT NULL,
  next_s REAL NOT NULL, watch TEXT);
CREATE INDEX attempts_of_run ON attempts (run);
CREATE INDEX attempts_by_state ON attempts (state);
CREATE TABLE reservations (
  attempt INTEGER REFERENCES attempts (id), kind TEXT, amount REAL NOT NULL,
  PRIMARY KEY (attempt, kind));
"""
"""Version 1: what came later is added to it, in a new file as in an old one."""
ADDED: dict[int, dict[str, str]] = {
    2: {
        "minimum_s": "REAL NOT NULL DEFAULT 0",
        "upper_kw": "REAL",
        "kgco2e_per_kwh": "REAL",
        "step_s": "REAL",
        "save_s": "REAL",
    },
}
"""Columns of attempts, by version. 2: the shortest bill, the highest power and its CO2e, for attempts
that die; what a step and a save took at most, for the next start of the run."""
TABLES = {"budgets", "runs", "attempts", "reservations"}
COLUMN = {
    "money": "a.cost_usd",
    "hours": "a.wall_s / 3600",
    "gpu_hours": "a.gpu_hours",
    "energy": "a.energy_kwh",
    "carbon": "a.co2e_kg",
}
"""What a budget of each kind counts."""


def is_current(db: sqlite3.Connection) -> bool:
    """Whether nothing is to be done; only reads, so that nobody has to be waited for."""
    return _version(db) == VERSION and _tables(db) >= TABLES


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _tables(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT name FROM sqlite_master")}


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Within a transaction: make the tables, or bring those of an older version up to this one."""
    version, tables = _version(db), _tables(db)
    if version > VERSION:
        raise FileError(
            f"a newer outlay wrote this ledger (version {version}, known: {VERSION})",
            where=str(path),
            do="upgrade outlay, or set OUTLAY_LEDGER to another file",
        )
    if version and tables >= TABLES:
        first = version + 1
    elif tables:
        raise FileError(
            "this is a database of something else", where=str(path), do="give another file"
        )
    else:
        first = 2
        # not executescript: it would commit, and leave half a schema to whoever comes next
        for statement in filter(str.strip, SCHEMA.split(";\n")):
            db.execute(statement)
    for step in range(first, VERSION + 1):
        for name, kind in ADDED[step].items():
            db.execute(f"ALTER TABLE attempts ADD COLUMN {name} {kind}")
    db.execute(f"PRAGMA user_version={VERSION}")

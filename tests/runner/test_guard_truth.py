"""The guard says what was, refuses nonsense, and a ledger that somebody holds costs no time."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible, OutlayError, UsageError
from outlay.runner.budget import Spent
from outlay.runner.callback import Guard
from outlay.runner.ledger import store
from outlay.runner.ledger.store import Entry, Ledger


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ({"price_usd_per_h": -3600.0}, "price"),
        ({"price_usd_per_h": float("nan")}, "price"),
        ({"accelerators": 0}, "accelerators"),
        ({"accelerators": -2}, "accelerators"),
        ({"minimum_s": -5.0}, "minimum bill"),
        ({"when_over": "ask"}, "'ask' is none of anneal, cut, stop"),
        ({"started_s": 1e12}, "not in the past"),
        ({"started_s": float("nan")}, "not in the past"),
    ],
)
def test_nonsense_is_refused(figures: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Guard("1h", ledger="off", **figures)


def test_nothing_is_called_saved_that_was_not() -> None:
    now = [0.0]
    said: list[str] = []
    guard = Guard("10s", ledger="off", started_s=0.0, clock=lambda: now[0], say=said.append)
    while not guard.step():
        now[0] += 1.0
    now[0] = max(now[0], 12.0)
    report = guard.close()
    assert not report.saved
    assert report.reason.startswith("stopped, not saved, above")
    assert "saved and stopped" not in " ".join(said)


def test_a_held_ledger_costs_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BEAT_WAIT_S", 0.05)
    monkeypatch.setattr(store, "CLOSE_WAIT_S", 0.05)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    opened = ledger.open_run(Entry(run="r", user="u", machine="m"))
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    used = Spent(wall_s=1.0, cost_usd=None, gpu_hours=0.0, fraction=None)
    with pytest.raises(OutlayError, match="ledger"):
        opened.heartbeat(used)
    with pytest.raises(OutlayError, match="ledger"):
        opened.close_run(used, state="done")
    assert ledger.rows("PRAGMA busy_timeout")[0][0] == 50
    other.execute("ROLLBACK")
    assert opened.heartbeat(used)


def test_nothing_left_is_refused_and_nothing_stays_drawn(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.sqlite")
    Ledger(Path(path)).set_budget("p", Budget.parse("1h"))
    clock: dict[str, Any] = {"started_s": 0.0, "clock": lambda: 50.0}
    with pytest.raises(NotFeasible, match="nothing is left"):
        Guard("10s", ledger=path, project="p", **clock)
    with pytest.raises(UsageError, match="unknown option minimum"):
        Guard("10min", ledger=path, project="p", minimum=3, **clock)
    (total,) = Ledger(Path(path)).totals("p")
    assert (total.charged, total.alive) == (0.0, 0)


def test_a_ledger_that_cannot_be_used_stops_no_training(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    with ledger.change() as db:
        db.execute("ALTER TABLE attempts DROP COLUMN tags")
    ledger.close()
    said: list[str] = []
    guard = Guard("1h", ledger=str(path), say=said.append)
    assert not guard.step()
    assert any("not in the ledger" in text for text in said)
    for needs_it in ({"project": "p"}, {"run": "again"}):
        with pytest.raises(OutlayError, match="ledger"):
            Guard("1h", ledger=str(path), say=said.append, **needs_it)
    Guard("1h", ledger="off", say=said.append, run="again").close()
    assert any("nothing is known of earlier starts" in text for text in said)
    guard.close()

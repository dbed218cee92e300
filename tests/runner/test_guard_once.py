"""One budget is spent once: not by two starts of a run at a time, nor drawn beyond what a start can use."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_callback import Clock, guarded

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import FileError, UsageError
from outlay.runner.ledger import Ledger
from outlay.runner.ledger.bills import read_bill
from outlay.runner.ledger.lease import process_ticks


def test_a_run_that_goes_on_elsewhere_is_not_started_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    guard = guarded(Clock(), ledger=path, run="cc")
    guard.step()
    ledger = Ledger(path)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            with ledger.change() as db:  # as if that process had started it
                db.execute(
                    "UPDATE attempts SET pid = ?, ticks = ?", (other.pid, process_ticks(other.pid))
                )
            with pytest.raises(
                UsageError, match=rf"(?s)run 'cc' is going on already.*process {other.pid}"
            ):
                guarded(Clock(), ledger=path, run="cc")
            assert len(ledger.rows("SELECT * FROM attempts")) == 1
            guarded(Clock(), ledger=path, run="dd").close()
        finally:
            other.kill()
    # it has died: what it may have spent counts, and the run goes on
    again = guarded(Clock(), ledger=path, run="cc")
    assert again.meter.earlier_s > 0
    again.close()


def test_of_a_project_only_what_its_own_time_can_cost_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.set_budget("p", Budget.parse("90usd"))
    ledger.set_budget("p", Budget.parse("10gpuh"))
    # one USD a second, two accelerators
    guard = guarded(Clock(), ledger=path, project="p", budget="40s", accelerators=2)
    held = {r["kind"]: r["amount"] for r in ledger.rows("SELECT * FROM reservations")}
    assert held == {"money": pytest.approx(40.0), "gpu_hours": pytest.approx(2 * 40 / 3600)}
    second = guarded(Clock(), ledger=path, project="p", budget=["30usd", "80s"])
    assert second.meter.remaining_s() == pytest.approx(30.0)
    second.close()
    guard.close()


def test_rubbish_is_no_empty_bill(tmp_path: Path) -> None:
    bill = tmp_path / "bill.csv"
    bill.write_text("this is not a bill at all\n")
    with pytest.raises(FileError, match="no line below its first"):
        read_bill(bill, key_column=None, cost_column=None)

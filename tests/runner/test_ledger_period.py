"""Only the period of a bill is set beside the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_ledger import cli_run

PERIODS = """\
ChargePeriodStart,ChargePeriodEnd,BilledCost
2026-01-02T00:00:00Z,2026-01-03T00:00:00Z,2.5
2026-01-03T00:00:00Z,2026-01-04T00:00:00Z,7
"""


def test_only_the_period_of_a_bill_is_compared(tmp_path: Path) -> None:
    path, jobs, bill = tmp_path / "l.sqlite", tmp_path / "jobs.csv", tmp_path / "bill.csv"
    jobs.write_text(
        "JobID,User,State,Start,ElapsedRaw,AllocTRES\n"
        "1,ada,COMPLETED,2026-01-01T23:00:00,7200,gres/gpu=1\n"  # half of it on the 2nd
        "2,ada,COMPLETED,2026-01-02T12:00:00,3600,gres/gpu=1\n"
        "3,ada,COMPLETED,2026-02-01T12:00:00,3600,gres/gpu=1\n"
        "4,ada,CANCELLED,Unknown,0,gres/gpu=1\n"
    )
    cli_run(path, "import", str(jobs), "--usd-per-gpu-h", "1")
    bill.write_text(PERIODS)

    def compared(*words: str) -> tuple[dict[str, Any], str]:
        done = cli_run(path, "reconcile", str(bill), "--format", "json", *words)
        return json.loads(done.stdout), done.stderr

    found, said = compared()
    assert found["period"] == {
        "start": "2026-01-02T00:00:00+00:00", "end": "2026-01-04T00:00:00+00:00",
    }  # fmt: skip
    assert found["differences"][0] == {
        "key": "all", "billed_usd": 9.5, "ledger_usd": pytest.approx(2.0),
        "difference_usd": pytest.approx(7.5),
    }  # fmt: skip
    assert "period: 2026-01-02 00:00 to 2026-01-04 00:00 UTC" in said
    found, said = compared("--from", "2026-01-01", "--until", "2026-01-03")
    assert found["differences"][0]["billed_usd"] == 2.5
    assert found["differences"][0]["ledger_usd"] == pytest.approx(3.0)
    assert "1 of the bill's lines begin outside it" in said
    found, said = compared("--until", "2026-01-03")  # its start is the bill's
    assert found["differences"][0]["ledger_usd"] == pytest.approx(2.0)
    for words, why in (
        (("--from", "2026-02-01", "--until", "2026-01-01"), "no time is in the period"),
        (("--from", "soon"), "'soon' is not a date"),
    ):
        assert why in str(cli_run(path, "reconcile", str(bill), *words).exception)
    bill.write_text("start,cost\n2026-02-01,1\n")
    assert compared()[0]["differences"][0]["ledger_usd"] == pytest.approx(1.0)
    bill.write_text("cost\n1\n")
    found, said = compared()
    assert found["period"] is None and "all of the ledger is compared" in said

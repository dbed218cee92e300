"""A process that dies at once is charged what is known of it; an old ledger stays whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from test_ledger import budget, die, entry, usd

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import FileError, NotFeasible
from outlay.runner.budget import Spent
from outlay.runner.ledger import Ledger, Took, Want, report
from outlay.runner.ledger.bills import gpus_of
from outlay.runner.ledger.period import Period, within
from outlay.runner.ledger.schema import SCHEMA, VERSION


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def age(ledger: Ledger, attempt: int, seconds: float) -> None:
    """As if its last entry were so old."""
    with ledger.change() as db:
        db.execute("UPDATE attempts SET beat_s = beat_s - ? WHERE id = ?", (seconds, attempt))


def test_killed_before_its_first_heartbeat_it_costs_its_minimum_and_its_start(
    ledger: Ledger,
) -> None:
    ledger.set_budget("p", budget(1000.0))
    short = ledger.open_run(entry("short", elapsed_s=4.0, minimum_s=90.0))
    long = ledger.open_run(entry("long", elapsed_s=4.0, minimum_s=20.0))
    free = ledger.open_run(entry("free", elapsed_s=4.0))
    for run in (short, long, free):
        run.reserve("money", 200.0)
        age(ledger, run.attempt, 1000.0)
        die(ledger, run.attempt)
    # one USD a second; a minute of silence at most, and 4 s of start
    assert ledger.spent("short").cost_usd == pytest.approx(90.0)
    assert ledger.spent("long").cost_usd == pytest.approx(64.0)
    assert ledger.spent("free").cost_usd == pytest.approx(64.0)
    assert ledger.spent("free").wall_s == pytest.approx(64.0)
    assert ledger.totals("p")[0].alive == 0


def test_the_minimum_is_drawn_before_anything_is_spent(ledger: Ledger) -> None:
    ledger.set_budget("p", budget(100.0))
    with pytest.raises(NotFeasible, match="too little left"):
        ledger.open_run(entry(minimum_s=120.0), wants=[Want(kind="money", amount=None)])
    with pytest.raises(NotFeasible, match=r"nothing is left of the run's own 50\.00 USD"):
        ledger.open_run(entry(minimum_s=60.0), wants=[Want(kind="money", amount=50.0)])
    assert ledger.rows("SELECT * FROM attempts") == []
    run = ledger.open_run(entry(minimum_s=60.0), wants=[Want(kind="money", amount=90.0)])
    assert run.reserved == {"money": 90.0}
    die(ledger, run.attempt)
    assert ledger.totals("p")[0].spent == 60.0


def test_energy_of_one_that_died_at_once_is_at_the_highest_power(ledger: Ledger) -> None:
    ledger.set_budget("p", Budget.parse("10kWh"))
    run = ledger.open_run(
        entry(elapsed_s=36.0, upper_kw=100.0, kgco2e_per_kwh=0.5),
        wants=[Want(kind="energy", amount=1.5)],
    )
    age(ledger, run.attempt, 100.0)
    die(ledger, run.attempt)
    spent = ledger.spent("r")
    # 1 kWh in the start; of the silence no more than what was reserved
    assert spent.energy_kwh == pytest.approx(1.5)
    assert spent.co2e_kg == pytest.approx(0.75)


def test_what_never_began_leaves_nothing(ledger: Ledger) -> None:
    first = ledger.open_run(entry("kept"))
    first.close_run(usd(1.0), state="stopped")
    ledger.open_run(entry("kept")).withdraw()
    ledger.open_run(entry("new")).withdraw()
    assert [r["id"] for r in ledger.rows("SELECT * FROM runs")] == ["kept"]
    assert len(ledger.rows("SELECT * FROM attempts")) == 1


def test_what_a_step_and_a_save_took_is_kept_for_the_next_start(ledger: Ledger) -> None:
    assert ledger.took("r") == Took()
    run = ledger.open_run(entry())
    run.heartbeat(usd(1.0), took=Took(step_s=2.0, save_s=9.0))
    run.close_run(usd(2.0), state="stopped", took=Took(step_s=3.0))
    ledger.open_run(entry())
    assert ledger.took("r") == Took(step_s=3.0, save_s=9.0)


def test_the_folder_of_a_killed_run_says_what_it_used(ledger: Ledger) -> None:
    first = ledger.open_run(entry())
    first.close_run(usd(5.0, 5.0), state="stopped")
    second = ledger.open_run(entry())
    second.heartbeat(usd(10.0, 10.0), next_s=60.0)
    age(ledger, second.attempt, 60.0)
    die(ledger, second.attempt)
    assert ledger.spent("r").cost_usd == pytest.approx(75.0)
    noted = Spent(wall_s=17.0, cost_usd=18.0, gpu_hours=17 / 3600, fraction=None)
    ledger.agree("r", noted)
    spent = ledger.spent("r")
    assert (spent.wall_s, spent.cost_usd) == (17.0, 18.0)
    assert "as its folder noted" in ledger.rows("SELECT reason FROM attempts ORDER BY id")[1][0]
    # what was closed is not touched, whatever a folder says
    third = ledger.open_run(entry())
    third.close_run(usd(1.0), state="done")
    ledger.agree("r", usd(1e6, 1e6))
    assert ledger.spent("r").cost_usd == 19.0


def test_a_ledger_of_version_1_is_brought_up_whole(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    old = sqlite3.connect(path)
    old.executescript(SCHEMA)
    old.execute("PRAGMA user_version=1")
    old.execute("INSERT INTO budgets VALUES ('p', 'money', 50.0)")
    old.execute("INSERT INTO runs VALUES ('r', 'run', '2026-01-01', 1.0, 2.0, 3.0, 4.0)")
    for state in ("done", "running"):
        old.execute(
            "INSERT INTO attempts (run, user, project, tags, started_at, state, machine, accelerators,"
            " price_usd_per_h, wall_s, cost_usd, gpu_hours, beats, beat_s, next_s, space, pid, ticks)"
            " VALUES ('r', 'u', 'p', '[\"t\"]', '2026-01-01', ?, 'm', 2, 3600, 10, 10, 1, 3, 0, 2,"
            " 'elsewhere', 1, 1)",
            (state,),
        )
    old.execute("INSERT INTO reservations VALUES (2, 'money', 30.0)")
    old.commit()
    before = old.execute("SELECT * FROM attempts").fetchall()
    old.close()
    ledger = Ledger(path)
    assert ledger.rows("PRAGMA user_version")[0][0] == VERSION == 2
    assert [tuple(row)[: len(before[0])] for row in ledger.rows("SELECT * FROM attempts")] == before
    assert ledger.whole()
    (total,) = ledger.totals("p")
    assert (total.charged, total.spent, total.alive) == (40.0, 20.0, 1)
    assert ledger.took("r") == Took()
    ledger.open_run(entry(minimum_s=5.0)).close_run(usd(5.0), state="done")
    assert len(report.attempts(Ledger(path))) == 3


def test_a_month_has_what_ran_in_it(ledger: Ledger) -> None:
    run = ledger.open_run(entry())
    run.close_run(usd(40.0, 40 * 86400.0), state="done")
    with ledger.change() as db:
        db.execute("UPDATE attempts SET started_at = '2026-10-30T00:00:00+00:00'")
    rows = report.attempts(ledger)
    by_month = report.by_keys(within(rows, Period(), months=True), ["month"])
    assert {r["month"]: round(r["cost_usd"], 6) for r in by_month} == {
        "2026-10": 2.0, "2026-11": 30.0, "2026-12": 8.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("billing=8,cpu=8,gres/gpu=2,gres/gpu:a100=2,mem=64G", 2),
        ("gres/gpu:a100=4,gres/gpu:h100=2", 6),
        ("cpu=8", 0),
        ("gres/gpu:a100=4,gres/gpu=6,gres/gpu:h100=2", 6),
    ],
)
def test_gpus_of_a_job(tres: str, gpus: int) -> None:
    assert gpus_of(tres) == gpus


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("7,u,FAILED,2026-01-01,1e308,0,cpu=1", "1e\\+308 s cannot be"),
        ("7,u,FAILED,9999-12-31,5,0,cpu=1", "the year 9999 is far away"),
        ("7,u,FAILED,2026-01-01,5,1e300,cpu=1", "1e\\+300 J cannot be"),
        ("7,u,FAILED,2026-01-01,5,0,gres/gpu=99999999999", "99999999999 GPUs cannot be"),
    ],
)
def test_a_broken_line_of_slurm_is_refused(tmp_path: Path, line: str, said: str) -> None:
    from outlay.runner.ledger.bills import import_sacct

    jobs = tmp_path / "jobs.csv"
    jobs.write_text(f"JobID,User,State,Start,ElapsedRaw,ConsumedEnergyRaw,AllocTRES\n{line}\n")
    with pytest.raises(FileError, match=said):
        import_sacct(Ledger(tmp_path / "l.sqlite"), jobs, usd_per_gpu_h=1.0)


def test_energy_that_slurm_does_not_know_is_unknown(tmp_path: Path) -> None:
    from outlay.runner.ledger.bills import import_sacct

    jobs, ledger = tmp_path / "jobs.csv", Ledger(tmp_path / "l.sqlite")
    jobs.write_text(
        "JobID,User,State,Start,ElapsedRaw,ConsumedEnergyRaw\n"
        "7,u,FAILED,2026-01-01,5,18446744073709551614\n"
    )
    assert import_sacct(ledger, jobs, usd_per_gpu_h=None) == (1, 0)
    assert ledger.rows("SELECT energy_kwh FROM attempts")[0][0] is None

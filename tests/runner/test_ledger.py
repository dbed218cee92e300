"""The ledger: sums, reservations, crashes, clocks, and rubbish in place of a database."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import FileError, NotFeasible, OutlayError, UsageError
from outlay.runner.budget import Spent
from outlay.runner.cli import cli
from outlay.runner.ledger import Entry, Ledger, lease
from outlay.runner.ledger.store import ledger_path


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "deep" / "ledger.sqlite")


def usd(amount: float, wall_s: float = 1.0) -> Spent:
    return Spent(wall_s=wall_s, cost_usd=amount, gpu_hours=wall_s / 3600, fraction=None)


def entry(run: str = "r", **more: object) -> Entry:
    fields = {"user": "ada", "project": "p", "machine": "m", "price_usd_per_h": 3600.0}
    return Entry(run=run, **fields | more)  # type: ignore[arg-type]


def budget(amount: float) -> Budget:
    return Budget(kind="money", amount=amount)


def die(ledger: Ledger, attempt: int) -> None:
    """As if its process had been killed: its number now is nobody's."""
    with ledger.change() as db:
        db.execute("UPDATE attempts SET ticks = ticks + 1 WHERE id = ?", (attempt,))


def test_concurrent_runs_share_what_is_there_and_give_back_the_rest(ledger: Ledger) -> None:
    ledger.set_budget("p", budget(10.0))
    first = ledger.open_run(entry("a"))
    assert first.reserve("money", 6.0) == 6.0
    second = ledger.open_run(entry("b"))
    assert second.reserve("money", 6.0) == 4.0
    third = ledger.open_run(entry("c"))
    with pytest.raises(
        NotFeasible,
        match=r"0\.0000 USD are spent, 10\.00 USD reserved by 2 runs that go on, 0\.0000 USD",
    ):
        third.reserve("money", None)
    first.heartbeat(usd(5.0))
    first.close_run(usd(5.5), state="budget")
    assert third.reserve("money", None) == pytest.approx(0.5)
    (total,) = ledger.totals("p")
    assert (total.charged, total.spent, total.alive) == (10.0, 5.5, 2)


def test_a_reservation_may_be_made_anew_and_counts_what_was_spent(ledger: Ledger) -> None:
    ledger.set_budget("p", budget(10.0))
    run = ledger.open_run(entry())
    run.reserve("money", 3.0)
    run.heartbeat(usd(2.0))
    assert run.reserve("money", 8.0) == 8.0
    with pytest.raises(NotFeasible):
        run.reserve("money", 11.0, least=10.5)
    # a refusal changes nothing
    assert ledger.totals("p")[0].charged == 8.0


def test_a_dead_run_is_charged_for_its_silence_and_no_more_than_it_reserved(ledger: Ledger) -> None:
    ledger.set_budget("p", budget(100.0))
    quick, slow = ledger.open_run(entry("quick")), ledger.open_run(entry("slow"))
    quick.reserve("money", 7.0)
    slow.reserve("money", 50.0)
    quick.heartbeat(usd(5.0), next_s=10.0)
    slow.heartbeat(usd(5.0), next_s=10.0)
    with ledger.change() as db:
        db.execute("UPDATE attempts SET beat_s = beat_s - 1000")
    die(ledger, quick.attempt)
    die(ledger, slow.attempt)
    assert ledger.spent("quick").cost_usd == pytest.approx(7.0)
    assert ledger.spent("slow").cost_usd == pytest.approx(15.0)  # 1 USD/s, 10 s
    (total,) = ledger.totals("p")
    assert (total.alive, total.left) == (0, pytest.approx(78.0))
    # who was taken for dead and is not, hears of it
    assert not slow.heartbeat(usd(6.0))
    assert not slow.heartbeat(usd(7.0))
    slow.reserve("money", 20.0)
    assert slow.heartbeat(usd(8.0))


def test_without_a_kernel_to_ask_silence_on_the_watchers_clock_decides(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.set_budget("p", budget(10.0))
    run = ledger.open_run(entry())
    run.reserve("money", None)
    with ledger.change() as db:
        db.execute("UPDATE attempts SET space = 'another container'")
    now_s = time.monotonic()

    def at(later_s: float) -> int:
        monkeypatch.setattr("outlay.runner.ledger.dead.time.monotonic", lambda: now_s + later_s)
        return ledger.totals("p")[0].alive

    assert [at(0), at(lease.LEASE_S - 1)] == [1, 1]
    run.heartbeat(usd(1.0))
    # the first look after a heartbeat begins the wait anew; a clock that fell back does, too
    assert [at(lease.LEASE_S + 1), at(-5), at(lease.LEASE_S - 6), at(lease.LEASE_S - 4)] == [
        1,
        1,
        1,
        0,
    ]


def test_jumps_of_the_wall_clock_change_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.set_budget("p", budget(10.0))
    run = ledger.open_run(entry())
    run.reserve("money", 5.0)
    for jump_s in (1e9, -1e9):
        monkeypatch.setattr(time, "time", lambda by=jump_s: 1.8e9 + by)
        assert run.heartbeat(usd(1.0))
        assert ledger.totals("p")[0].charged == 5.0


def test_a_killed_process_leaves_its_spending_and_frees_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.set_budget("p", budget(10.0))
    code = (
        "import os, signal, sys, pathlib\n"
        "from outlay.runner.ledger import Entry, Ledger\n"
        "from outlay.runner.budget import Spent\n"
        "run = Ledger(pathlib.Path(sys.argv[1])).open_run("
        "Entry(run='x', user='u', project='p', machine='m'))\n"
        "run.reserve('money', None)\n"
        "run.heartbeat(Spent(wall_s=1, cost_usd=2.5, gpu_hours=0, fraction=None))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    (total,) = ledger.totals("p")
    assert (total.alive, total.spent) == (0, 2.5)
    assert ledger.rows("SELECT state FROM attempts")[0]["state"] == "lost"
    assert ledger.whole()


def test_a_run_keeps_its_first_prediction_and_sums_its_attempts(ledger: Ledger) -> None:
    for predicted, amount in (((1.0, 2.0, 3.0), 1.0), ((7.0, 8.0, 9.0), 2.5)):
        run = ledger.open_run(entry(predicted_s=predicted, tags=("x", "y")))
        run.close_run(usd(amount), state="stopped", steps=5)
    assert ledger.spent("r").cost_usd == 3.5
    assert ledger.rows("SELECT predicted_s FROM runs")[0]["predicted_s"] == 2.0
    assert json.loads(ledger.rows("SELECT tags FROM attempts")[0]["tags"]) == ["x", "y"]


def test_a_project_without_a_budget_reserves_nothing(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="has no budget of gpu_hours"):
        ledger.open_run(entry()).reserve("gpu_hours", 1.0)


def test_what_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("this is not a database, and long enough to be looked at" * 20)
    with pytest.raises(FileError, match="not a database"):
        Ledger(text)
    assert text.read_text().startswith("this is not")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(FileError, match="something else"):
        Ledger(other)
    newer = tmp_path / "newer.sqlite"
    Ledger(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(FileError, match="newer outlay"):
        Ledger(newer)
    with pytest.raises(OutlayError):
        Ledger(tmp_path / "text" / "below.sqlite")


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUTLAY_LEDGER", "OFF")
    assert ledger_path() is None
    assert Ledger.opened() is None
    assert ledger_path("x.sqlite") == Path("x.sqlite")
    monkeypatch.setenv("OUTLAY_LEDGER", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ledger_path() == tmp_path / "outlay" / "ledger.sqlite"


def test_the_kernel_is_asked_by_number_and_start() -> None:
    me = lease.this_process()
    assert me.known_dead() is False
    assert lease.Owner(space=me.space, pid=os.getpid(), ticks=me.ticks - 1).known_dead() is True
    assert lease.Owner(space="elsewhere", pid=1, ticks=0).known_dead() is None


def storm(path: Path, rounds: int, seed: int) -> dict[str, float]:
    script = Path(__file__).parent / "ledger_storm.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(rounds), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.processes
def test_eight_processes_that_are_killed_never_exceed_their_budget(tmp_path: Path) -> None:
    seen = storm(tmp_path / "ledger.sqlite", 10, 1)
    assert seen["kills"] >= 120
    assert seen["really"] > 0.5 * seen["charged"] > 0


@pytest.mark.long
@pytest.mark.processes
def test_200_rounds_of_it(tmp_path: Path) -> None:
    seen = storm(tmp_path / "ledger.sqlite", 200, 2)
    assert seen["kills"] >= 2400
    assert seen["really"] > 0.5 * seen["charged"] > 0


def cli_run(path: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["ledger", *words, "--ledger", str(path)])


@pytest.fixture
def booked(ledger: Ledger) -> Path:
    """Two runs of ada, one of grace, under two projects; one of them without a price."""
    ledger.set_budget("p", budget(20.0))
    for run, user, project, tags, amount, predicted in (
        ("a", "ada", "p", ("x", "y"), 3.0, 4.0),
        ("b", "ada", "q", (), 5.0, None),
        ("c", "grace", "p", ("x",), None, None),
    ):
        opened = ledger.open_run(
            entry(run, user=user, project=project, tags=tags, predicted_usd=predicted)
        )
        spent = Spent(wall_s=7.0, cost_usd=amount, gpu_hours=2.0, fraction=None)
        opened.close_run(spent, state="done", steps=10)
    return ledger.path


def test_show_sums_by_user_and_project(booked: Path) -> None:
    done = cli_run(booked, "show", "--by", "user,project", "--format", "json")
    content = json.loads(done.stdout)
    sums = {(r["user"], r["project"]): (r["runs"], r["cost_usd"]) for r in content["rows"]}
    # what has no price is not zero
    assert sums == {("ada", "p"): (1, 3.0), ("ada", "q"): (1, 5.0), ("grace", "p"): (1, None)}
    assert content["budgets"][0]["left"] == 17.0
    tags = json.loads(cli_run(booked, "show", "--by", "tag", "--format", "json").stdout)["rows"]
    assert [(r["tag"], r["runs"]) for r in tags] == [("", 1), ("x", 2), ("y", 1)]
    by_run = cli_run(booked, "show", "--format", "csv").stdout.splitlines()
    assert by_run[1] == "a,ada,p,done,1,7.0,3.0,2.0,4.0,0.75"
    table = cli_run(booked, "show").stdout
    assert "project budgets" in table and "grace" in table
    assert cli_run(booked, "show", "--by", "users").exit_code != 0


def test_export_is_everything_and_reads_back(booked: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader(cli_run(booked, "export").stdout.splitlines()))
    assert [r["tags"] for r in rows] == ["x y", "", "x"]
    out = tmp_path / "out.json"
    assert cli_run(booked, "export", "--format", "json", "--out", str(out)).exit_code == 0
    content = json.loads(out.read_text())
    assert content["schema"] == "outlay/ledger@1"
    assert [r["cost_usd"] for r in content["attempts"]] == [3.0, 5.0, None]


def test_a_bill_beside_the_ledger(booked: Path, tmp_path: Path) -> None:
    bill = tmp_path / "bill.csv"
    bill.write_text("team,BilledCost,BillingCurrency\np,3.5,USD\nq,2,USD\nq,3,USD\nz,9,USD\n")
    words = ("--by", "project", "--key-column", "team", "--format", "json")
    rows = json.loads(cli_run(booked, "reconcile", str(bill), *words).stdout)["differences"]
    assert [
        (r["project"], r["billed_usd"], r["ledger_usd"], r["difference_usd"]) for r in rows
    ] == [
        ("z", 9.0, None, 9.0),
        ("p", 3.5, 3.0, 0.5),
        ("q", 5.0, 5.0, 0.0),
    ]
    total = cli_run(booked, "reconcile", str(bill)).stdout.splitlines()
    assert total[1].split() == ["all", "17.5", "8", "9.5"]
    bill.write_text("cost_usd,currency\n3,EUR\n")
    assert "in EUR" in str(cli_run(booked, "reconcile", str(bill)).exception)


SACCT = """\
JobID|User|Account|State|Start|End|ElapsedRaw|AllocTRES|NodeList|ConsumedEnergyRaw
7|ada|p|COMPLETED|2026-01-02T03:04:05|2026-01-02T04:04:05|3600|billing=8,cpu=8,gres/gpu:a100=2,gres/gpu=2|n1|
7.batch|||COMPLETED|2026-01-02T03:04:05|2026-01-02T04:04:05|3600|cpu=8|n1|7200000
8|bob|q|CANCELLED by 5|2026-01-02T03:04:05|2026-01-02T03:34:05|1800|cpu=8|n2|0
9|bob|q|RUNNING|2026-01-02T03:04:05|Unknown|50|cpu=8|n2|0
"""


def test_slurm_jobs_are_entered_once(tmp_path: Path) -> None:
    path, jobs = tmp_path / "l.sqlite", tmp_path / "sacct.csv"
    jobs.write_text(SACCT)
    first = cli_run(path, "import", str(jobs), "--usd-per-gpu-h", "1.5")
    assert "2 jobs entered; 1 known already, or not ended" in first.stderr
    assert "0 jobs entered; 3 known" in cli_run(path, "import", str(jobs)).stderr
    rows = json.loads(cli_run(path, "export", "--format", "json").stdout)["attempts"]
    ada, bob = rows
    assert (ada["user"], ada["project"], ada["state"]) == ("ada", "p", "done")
    assert (ada["gpu_hours"], ada["cost_usd"], ada["energy_kwh"]) == (2.0, 3.0, 2.0)
    assert (bob["state"], bob["reason"], bob["gpu_hours"]) == ("stopped", "CANCELLED by 5", 0.0)
    with_commas = tmp_path / "comma.csv"
    with_commas.write_text(
        "JobID,User,State,Start,ElapsedRaw\n5,eve,FAILED,2026-01-01T00:00:00,9\n"
    )
    assert "1 jobs entered" in cli_run(path, "import", str(with_commas)).stderr


def test_a_project_budget_is_set_raised_and_taken_away(booked: Path) -> None:
    assert "3 spent, 27 free" in cli_run(booked, "budget", "p", "30usd").stderr
    assert "25usd" in cli_run(booked, "budget", "p", "20eur", "--rate", "eur=1.25").stderr
    assert "warning: 3 are spent" in cli_run(booked, "budget", "p", "1usd").stderr
    assert cli_run(booked, "budget", "p", "10gpuh").exit_code == 0
    assert len(Ledger(booked).totals("p")) == 2
    assert "2 budgets taken away" in cli_run(booked, "budget", "p", "none").stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("JobID|User\n1|ada\n", "none of the columns ElapsedRaw"),
        ("JobID,User,State,Start,ElapsedRaw\n1,ada,FAILED,then,5\n", "'then' is not a date"),
        ("JobID,User,State,Start,ElapsedRaw\n1,a,FAILED,2026-01-01,x\n", "'x' is not a number"),
        ("JobID,User,State,Start,ElapsedRaw\n1,a,FAILED,2026-01-01,-5\n", "-5 s cannot be"),
        ("JobID,User,State,Start,ElapsedRaw\n1,a\n", "more or fewer fields"),
        ("\0\udcff", "cannot be read"),
    ],
)
def test_rubbish_is_refused_and_nothing_of_it_is_entered(
    tmp_path: Path, text: str, said: str
) -> None:
    path, jobs = tmp_path / "l.sqlite", tmp_path / "sacct.csv"
    good = "JobID,User,State,Start,ElapsedRaw\n0,a,FAILED,2026-01-01,1\n"
    body = text.replace("JobID,User,State,Start,ElapsedRaw\n", good) if text else text
    jobs.write_bytes(body.encode(errors="surrogateescape"))
    done = cli_run(path, "import", str(jobs))
    assert isinstance(done.exception, OutlayError), done.output
    assert said in str(done.exception)
    assert Ledger(path).rows("SELECT * FROM runs") == []

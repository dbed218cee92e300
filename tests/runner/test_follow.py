"""`outlay stop` and `outlay tail`, on the folder of a run that a process of the test works in."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from click.testing import CliRunner

from outlay.planner.spec.job import Data
from outlay.profiles.errors import UsageError
from outlay.runner.cli import cli
from outlay.runner.events import EventLog
from outlay.runner.folder import Attempts, RunFolder

HOLD = """
import signal, sys, time
from pathlib import Path
from outlay.runner.folder import RunFolder
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    end_s = time.monotonic() + 30
    while not stopped and time.monotonic() < end_s:
        time.sleep(0.05)
sys.exit(75)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.root.mkdir()
    made.write_plan(ranks.tiny_plan(steps=50, job={"data": Data(path="nowhere")}))
    made.write_attempts(Attempts())
    log = EventLog(made.events, lambda: 1.5)
    log.write("start", ranks=2, strategy="ZeRO-1 dp2")
    for step in range(1, 6):
        log.write("step", step, loss=2.5, lr=1e-3, tokens_per_s=1000.0)
    log.close()
    return made


def test_a_run_that_works_is_asked_to_stop_and_waited_for(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLD, str(folder.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert folder.owner() == process.pid
        result = CliRunner().invoke(cli, ["stop", str(folder.root)])
        assert result.exit_code == 0, result.output
        assert process.wait(10) == 75
    assert "stopped" in result.output
    assert folder.owner() is None


def test_a_run_that_does_not_work_cannot_be_stopped(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match="is not running"):
        CliRunner().invoke(cli, ["stop", str(folder.root)], catch_exceptions=False)


def test_tail_shows_the_last_events_and_ends_with_the_run(folder: RunFolder) -> None:
    began_s = time.monotonic()
    result = CliRunner().invoke(cli, ["tail", str(folder.root), "-n", "2"])
    assert time.monotonic() - began_s < 30
    lines = result.output.splitlines()
    assert [line.split("step ")[1].split("  ")[0] for line in lines] == ["4/50", "5/50"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a run"):
        CliRunner().invoke(cli, ["tail", str(tmp_path)], catch_exceptions=False)

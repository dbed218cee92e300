"""Of several ranks that fail, the first real error is the one that is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from outlay.planner.spec.files import to_json
from outlay.profiles.errors import CheckpointError
from outlay.runner.failures import cause_of, note_failure, read_failure
from outlay.runner.folder import RunFolder

LOST = RuntimeError(
    "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def at(folder: RunFolder, rank: int, seconds: float) -> None:
    """Make a noted failure happen at another time."""
    failure = read_failure(folder.failure(rank))
    changed = dataclasses.replace(failure, monotonic_s=seconds)
    folder.failure(rank).write_text(to_json(changed))


def test_the_exception_comes_before_the_lost_connection(folder: RunFolder) -> None:
    assert note_failure(folder, 0, LOST) == 1
    assert note_failure(folder, 1, MemoryError("no room for 8 GiB")) == 1
    at(folder, 0, 1.0)
    cause = cause_of(folder, [(0, 1), (1, 1)])
    assert cause.reason.startswith("rank 1: MemoryError: no room for 8 GiB\n  log: ")
    assert cause.exit_code == 1


def test_of_two_exceptions_the_earlier(folder: RunFolder) -> None:
    note_failure(folder, 0, ValueError("later"))
    note_failure(folder, 1, ValueError("earlier"))
    at(folder, 1, 1.0)
    assert "earlier" in cause_of(folder, [(0, 1), (1, 1)]).reason


def test_an_error_of_ours_keeps_its_words_and_its_code(folder: RunFolder) -> None:
    error = CheckpointError("a file has changed", where="step-3/x", why="sha256", do="resume older")
    assert note_failure(folder, 0, error) == 5
    cause = cause_of(folder, [(0, 5), (1, -15)])
    assert cause.exit_code == 5
    assert "step-3/x: a file has changed\n  why: sha256\n  do:  resume older" in cause.reason


def test_a_killed_rank_comes_before_those_that_lost_it(folder: RunFolder) -> None:
    note_failure(folder, 0, LOST)
    cause = cause_of(folder, [(1, -9), (0, 1)])
    assert "rank 1 was killed by SIGKILL" in cause.reason
    assert "memory" in cause.reason
    assert "memory" not in cause_of(folder, [(1, -11), (0, 1)]).reason


def test_a_rank_that_left_only_a_log_shows_its_end(folder: RunFolder) -> None:
    folder.logs.mkdir()
    folder.log(1).write_text("".join(f"line {i}\n" for i in range(40)))
    cause = cause_of(folder, [(1, 134), (0, -15)])
    assert "rank 1 ended with code 134" in cause.reason
    assert "| line 39" in cause.reason
    assert "line 20" not in cause.reason


def test_only_lost_connections_are_told_as_they_are(folder: RunFolder) -> None:
    note_failure(folder, 0, LOST)
    assert "Connection closed by peer" in cause_of(folder, [(0, 1), (1, 0)]).reason
    assert "without an outcome" in cause_of(RunFolder(folder.root / "none"), [(0, 0)]).reason

"""events.jsonl survives torn lines and several writers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from outlay.profiles.errors import FileError
from outlay.runner.events import EventLog, Follower, cut_torn_line, read_events


def test_what_is_written_is_read(tmp_path) -> None:
    log = EventLog(tmp_path / "events.jsonl", lambda: 1.23456)
    written = [log.write("start"), log.write("step", 3, loss=2.5, lr=1e-3)]
    log.close()
    assert list(read_events(tmp_path / "events.jsonl")) == written
    assert written[1].data == {"loss": 2.5, "lr": 1e-3}
    assert written[1].elapsed_s == 1.2346
    assert written[0].time.endswith("Z")


def test_a_number_that_is_not_finite_becomes_null(tmp_path) -> None:
    log = EventLog(tmp_path / "e", lambda: 0.0)
    log.write("step", 1, grad_norm=float("nan"), more={"a": [float("inf"), 1.0]})
    assert json.loads((tmp_path / "e").read_text())["data"] == {
        "grad_norm": None,
        "more": {"a": [None, 1.0]},
    }


def test_a_torn_last_line_is_left_out_and_cut_before_the_next_append(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, lambda: 0.0)
    first = log.write("start")
    log.close()
    with path.open("a") as handle:
        handle.write('{"time": "2026-01-01T00:')
    assert list(read_events(path)) == [first]
    assert cut_torn_line(path)
    assert not cut_torn_line(path)
    second = EventLog(path, lambda: 1.0).write("end")
    assert list(read_events(path)) == [first, second]


def test_a_broken_line_within_names_its_place(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path, lambda: 0.0).write("start")
    with path.open("a") as handle:
        handle.write("nonsense\n")
    with pytest.raises(FileError, match=r"events\.jsonl:2"):
        list(read_events(path))


def test_a_follower_gives_each_event_once(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert list(follower.new_events()) == []
    log = EventLog(path, lambda: 0.0)
    log.write("start")
    assert [e.kind for e in follower.new_events()] == ["start"]
    log.write("step", 1)
    log.write("step", 2)
    assert [e.step for e in follower.new_events()] == [1, 2]
    assert list(follower.new_events()) == []


def test_several_writers_do_not_tear_each_others_lines(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from outlay.runner.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]), lambda: 0.0)\n"
        "[log.write('step', i, writer=sys.argv[2], filler='x' * 300) for i in range(400)]\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(w)]) for w in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    events = list(read_events(path))
    assert len(events) == 1200
    for writer in "012":
        assert [e.step for e in events if e.data["writer"] == writer] == list(range(400))

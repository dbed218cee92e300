"""The policy `ask`: who hears the question, and how an answer comes back."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path

import pytest
import ranks
from click.testing import CliRunner
from test_control import controller, drive

from outlay.planner.spec.job import Data
from outlay.profiles.errors import UsageError
from outlay.runner import question
from outlay.runner.cli import cli
from outlay.runner.control import Decision
from outlay.runner.events import EventLog, read_events
from outlay.runner.folder import Attempts, RunFolder
from outlay.runner.limits import Limits
from outlay.runner.question import Asked, Prompt, how_asked


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.root.mkdir()
    made.write_plan(ranks.tiny_plan(steps=50, job={"data": Data(path="nowhere")}))
    made.write_attempts(Attempts())
    made.write_limits(Limits(when_over="ask", project="p"))
    return made


def test_an_answer_from_elsewhere_is_heard_and_kept(folder: RunFolder) -> None:
    control, clock = controller(100.0, 1000, policy="ask")
    log = EventLog(folder.events, clock)
    asked = Asked(folder, log)
    drive(control, clock, 19)
    for step in range(19, 40):
        clock.now_s += 1.0
        asked.look(control, control.decide(step), step)
    assert control.asking
    written = folder.limits.read_text()
    folder.limits.write_text("by hand")
    asked.look(control, control.decide(40), 40)
    assert control.asking
    folder.limits.write_text(written)
    done = CliRunner().invoke(cli, ["answer", str(folder.root), "cut"])
    assert done.exit_code == 0 and "for when it is resumed" in done.output
    asked.look(control, control.decide(40), 40)
    assert not control.asking and control.policy == "cut"
    asked.look(control, control.decide(41), 41)
    log.close()
    kinds = [e.kind for e in read_events(folder.events)]
    assert kinds == ["question", "warning", "answer"]
    limits = folder.read_limits()
    assert (limits.when_over, limits.project) == ("cut", "p")
    again = CliRunner().invoke(cli, ["answer", str(folder.root), "stop"])
    assert isinstance(again.exception, UsageError)
    assert "asks nothing" in again.exception.message()
    assert CliRunner().invoke(cli, ["answer", str(folder.root), "more"]).exit_code == 2


def test_an_answer_that_came_before_the_question_counts(folder: RunFolder) -> None:
    control, clock = controller(100.0, 1000, policy="ask")
    log = EventLog(folder.events, clock)
    asked = Asked(folder, log)
    question.write_answer(folder, "stop")
    control.asking = True
    ask = Decision(stop=None, total_steps=1000, warnings=(), question="too little")
    asked.look(control, ask, 20)
    asked.look(control, control.decide(21), 21)
    log.close()
    assert control.decide(22).stop == "forecast"


def test_a_line_typed_into_the_terminal_is_the_answer(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    person, terminal = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        monkeypatch.setattr(question, "on_terminal", lambda: True)
        prompt = Prompt(folder)
        prompt.tick()
        prompt.event("question")
        prompt.tick()
        os.write(person, b"what\ncu")
        prompt.tick()
        assert folder.read_limits().when_over == "ask"
        os.write(person, b"t\n")
        prompt.tick()
    os.close(person)
    assert folder.read_limits().when_over == "cut"
    said = capsys.readouterr().err
    assert "'what' is no answer: anneal, cut or stop" in said


def test_before_the_start_it_is_said_where_it_will_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "this is no terminal, but with `outlay answer r" in how_asked("r")
    monkeypatch.setattr(question, "on_terminal", lambda: True)
    assert "answer here, or with `outlay answer r" in how_asked("r")

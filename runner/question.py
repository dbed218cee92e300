"""The policy `ask`: a run that will not fit its budget asks, and goes on within it until it is told.

Rank 0 writes the question as an event. The answer is the run's own policy in `RUN/limits.json`, set by
`outlay answer` or, where `outlay run` has a terminal, by a line typed there; rank 0 looks at that file
between steps. A run that goes on later keeps its answer.
"""

from __future__ import annotations

import os
import select
import sys
from dataclasses import replace
from typing import TextIO

from outlay.profiles.errors import OutlayError
from outlay.runner.control import ANSWERS, Controller, Decision, Policy
from outlay.runner.events import EventLog
from outlay.runner.folder import RunFolder

UNTIL_THEN = "until it is answered it goes on as with anneal, within the budget"
MEANING = (
    "anneal: the learning rate ends within the budget; cut: it keeps its schedule and the run ends "
    "at the budget; stop: save now and keep the rest"
)


def parse_answer(text: str) -> Policy | None:
    """Null = none of the answers."""
    return next((answer for answer in ANSWERS if answer == text.strip().lower()), None)


def write_answer(folder: RunFolder, policy: Policy) -> None:
    folder.write_limits(replace(folder.read_limits(), when_over=policy))


def on_terminal() -> bool:
    """Whether a person can type to this process: a background job that reads would be halted."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):
        return False


def how_asked(run_dir: str) -> str:
    """For a person, before the start."""
    where = "here, or " if on_terminal() else "not here, for this is no terminal, but "
    return f"asks: answer {where}with `outlay answer {run_dir} anneal|cut|stop`; {UNTIL_THEN}"


class Asked:
    """Rank 0's side."""

    def __init__(self, folder: RunFolder, log: EventLog) -> None:
        self._folder, self._log, self._seen_ns = folder, log, 0

    def look(self, control: Controller, decision: Decision, step: int) -> None:
        """Ask what is due; hear what was answered, for the next decision."""
        if decision.question is not None:
            how = f"answer with `outlay answer {self._folder.root} anneal|cut|stop`"
            self._log.write("question", step, message=f"{decision.question}; {how}; {UNTIL_THEN}")
        elif control.asking and self._written_ns() != self._seen_ns:
            self._seen_ns = self._written_ns()
            try:
                control.answer(self._folder.read_limits().when_over)
            except OutlayError as error:  # written by hand: no reason to end a training
                self._log.write("warning", step, message=f"no answer: {error.message()}")
            if not control.asking:
                self._log.write("answer", step, message=control.policy)

    def _written_ns(self) -> int:
        return self._folder.limits.stat().st_mtime_ns


class Prompt:
    """The supervisor's side: a line typed into the terminal, if there is one, is the answer."""

    def __init__(self, folder: RunFolder, stream: TextIO | None = None) -> None:
        self._folder, self._stream = folder, stream
        self._open, self._typed = False, b""

    def event(self, kind: str) -> None:
        if kind == "question" and on_terminal():
            self._open = True
            self._say(f"type an answer. {MEANING}")
        elif kind in ("answer", "stop"):
            self._open = False

    def tick(self) -> None:
        """Never waits."""
        if not self._open or not select.select([sys.stdin.fileno()], [], [], 0)[0]:
            return
        read = os.read(sys.stdin.fileno(), 1024)
        self._typed += read
        self._open = bool(read)
        while b"\n" in self._typed:
            line, _, self._typed = self._typed.partition(b"\n")
            self._line(line.decode(errors="replace"))

    def _line(self, text: str) -> None:
        policy = parse_answer(text)
        if policy is None:
            self._say(f"{text.strip()!r} is no answer: anneal, cut or stop")
            return
        write_answer(self._folder, policy)
        self._open = False

    def _say(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)

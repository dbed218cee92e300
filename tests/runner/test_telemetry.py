"""Live progress: plain lines in a pipe, a bar in a terminal, scalars for TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from outlay.planner.spec.job import Budget
from outlay.planner.spec.measurement import Event
from outlay.runner.budget import Meter
from outlay.runner.telemetry import Bar, Lines, Scalars, Silent, progress_for


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def event(kind: str, step: int | None = None, **data: object) -> Event:
    return Event(time="", elapsed_s=1.0, kind=kind, step=step, data=data)


def step_event(step: int, step_s: float = 2.0) -> Event:
    return event("step", step, loss=2.5, lr=3e-4, step_s=step_s, tokens_per_s=1234.0)


def meter_of(clock: Clock, *budget: Budget) -> Meter:
    return Meter(budget, price_usd_per_h=36.0, accelerators=2, started_s=0.0, clock=clock)


def test_lines_show_steps_every_ten_seconds_and_other_events_at_once() -> None:
    clock, out = Clock(), io.StringIO()
    lines = Lines(100, meter_of(clock), out, clock)
    for step in range(1, 31):
        clock.now_s += 2
        lines.event(step_event(step))
        if step == 7:
            lines.event(event("save", 7, path="here", save_s=0.5))
    shown = out.getvalue().splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in shown if line.startswith("step")]
    assert steps == [1, 6, 11, 16, 21, 26]
    assert "saved step 7 in 0.5 s: here  spent 0.1400 USD" in shown
    assert shown[-1] == (
        "step 26/100  loss 2.5000  lr 3.00e-04  1.23k tokens/s  spent 0.5200 USD  ETA 2.5 min"
    )


@pytest.mark.parametrize(
    ("budget", "shown"),
    [
        (Budget(kind="money", amount=0.5), "spent 0.1000/0.5 USD"),
        (Budget(kind="hours", amount=0.1), "spent 10/360 s"),
        (Budget(kind="gpu_hours", amount=0.1), "spent 0.0056/0.1 GPU-hours"),
    ],
)
def test_the_budget_that_ends_first_is_shown_and_when_it_ends_the_run(budget, shown) -> None:
    clock, out = Clock(), io.StringIO()
    lines = Lines(1000, meter_of(clock, budget), out, clock)
    clock.now_s = 10.0
    lines.event(step_event(1))
    assert shown in out.getvalue()
    assert "ends at the budget in" in out.getvalue()


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock = Clock()
    assert isinstance(progress_for(10, meter_of(clock), io.StringIO()), Lines)
    assert isinstance(progress_for(10, meter_of(clock), quiet=True), Silent)
    terminal = Terminal()
    bar = progress_for(10, meter_of(clock), terminal)
    assert isinstance(bar, Bar)
    bar.event(event("start", ranks=2, strategy="ZeRO-1 dp2"))
    bar.event(step_event(4))
    bar.event(event("eval", 4, loss=None, unigram=5.0))
    bar.tick()
    bar.close()
    text = terminal.getvalue()
    assert "starting 2 ranks: ZeRO-1 dp2" in text
    assert "held-out loss not finite at step 4 (unigram 5.0000)" in text
    assert "4/10" in text


def test_no_color_is_honoured(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def drawn() -> str:
        terminal = Terminal()
        bar = Bar(10, meter_of(Clock()), terminal)
        bar.event(step_event(4))
        bar.close()
        return terminal.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38" in drawn() or "\x1b[3" in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38" not in drawn()


def test_scalars_are_what_tensorboard_reads_and_a_resume_replaces_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Scalars(tmp_path, first_step=1)
    for step in (1, 2, 3):
        first.add("train", step, loss=5.0 - step, grad_norm=None)
    first.close()
    second = Scalars(tmp_path, first_step=3)
    second.add("train", 3, loss=1.5)
    second.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert read.Tags()["scalars"] == ["train/loss"]
    assert [(s.step, s.value) for s in read.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 1.5)]


def test_points_that_waited_keep_their_times(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ticks = iter((1000.0, 1000.4, 1001.5, 1001.6))
    scalars = Scalars(tmp_path, first_step=1, clock=lambda: next(ticks))
    for step in range(1, 5):
        scalars.add("train", step, loss=1.0 / step, energy=None)
    scalars.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(s.step, s.wall_time) for s in read.Scalars("train/loss")] == [
        (1, 1000.0), (2, 1000.4), (3, 1001.5), (4, 1001.6),
    ]  # fmt: skip
    assert read.Tags()["scalars"] == ["train/loss"]

"""What a run shows of itself: scalars for TensorBoard, and live progress in the supervisor."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from outlay.planner.spec.measurement import Event
from outlay.profiles.units import format_count, format_seconds
from outlay.runner.budget import Meter, amount_of

KEPT_S = 1.0
"""For which points wait to be written; TensorBoard's own writer keeps them for two minutes."""
PLAIN_EVERY_S = 10.0
"""Between two lines of progress where there is no terminal; other events are shown at once."""


class Scalars:
    """TensorBoard files, written by rank 0. Steps that a resume does again replace the old ones.

    Points are kept for a second and written together, one record a step: a record for each value
    took rank 0 0.2 ms a step.
    """

    def __init__(
        self, folder: Path, *, first_step: int, clock: Callable[[], float] = time.time
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder), purge_step=first_step)
        self._clock = clock
        self._kept: list[tuple[float, int, dict[str, float]]] = []

    def add(self, group: str, step: int, **values: float | None) -> None:
        """One point for each value that there is, under `group/name`."""
        now_s = self._clock()
        points = {f"{group}/{name}": v for name, v in values.items() if v is not None}
        self._kept.append((now_s, step, points))
        if now_s - self._kept[0][0] >= KEPT_S:
            self._write()

    def _write(self) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for at_s, step, points in self._kept:
            found = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
            self._writer.file_writer.add_summary(Summary(value=found), step, walltime=at_s)
        self._kept = []

    def close(self) -> None:
        self._write()
        self._writer.close()


class Progress(Protocol):
    """Live progress: is told every event, and ticks in between."""

    def event(self, event: Event) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...


def progress_for(
    steps: int, meter: Meter, stream: TextIO | None = None, *, quiet: bool = False
) -> Progress:
    """A bar where the stream (stderr) is a terminal, plain lines otherwise, nothing if quiet."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Silent()
    if stream.isatty():
        return Bar(steps, meter, stream)
    return Lines(steps, meter, stream)


class Silent:
    """Shows nothing."""

    def event(self, event: Event) -> None:
        pass

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Plain lines: each event that is not a step at once, steps about every ten seconds."""

    def __init__(
        self,
        steps: int,
        meter: Meter,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._meter, self._stream, self._clock = steps, meter, stream, clock
        self._last_s = -PLAIN_EVERY_S
        self._pace = Pace(steps, meter)

    def event(self, event: Event) -> None:
        self._pace.see(event)
        if event.kind == "step":
            if self._clock() - self._last_s < PLAIN_EVERY_S and event.step != self._steps:
                return
            self._last_s = self._clock()
        text = describe(event, self._steps)
        if text is None:
            return
        shown = [text, self._pace.spent()]
        if event.kind == "step":
            shown.append(self._pace.eta())
        print("  ".join(part for part in shown if part), file=self._stream, flush=True)

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bar:
    """A rich progress bar that stays at the bottom, with events above it."""

    def __init__(self, steps: int, meter: Meter, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._steps, self._pace = steps, Pace(steps, meter)
        self._console = Console(file=stream)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            expand=True,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("starting", total=steps, state="")
        self._state = ""
        self._bar.start()

    def event(self, event: Event) -> None:
        self._pace.see(event)
        if event.kind == "step":
            loss, rate = event.data.get("loss"), event.data.get("tokens_per_s")
            self._state = f"loss {_number(loss)}  {format_count(rate or 0)} tokens/s"
            self._bar.update(self._task, completed=event.step, description="training")
        elif (text := describe(event, self._steps)) is not None:
            self._console.print(text, highlight=False, markup=False)
        self.tick()

    def tick(self) -> None:
        parts = (self._state, self._pace.spent(), self._pace.eta())
        self._bar.update(self._task, state="  ".join(part for part in parts if part))

    def close(self) -> None:
        self._bar.stop()


class Pace:
    """How fast it goes, what is spent, and when it ends at this speed or at the budget."""

    def __init__(self, steps: int, meter: Meter) -> None:
        self._steps, self._meter = steps, meter
        self._step = 0
        self._step_s: float | None = None

    def see(self, event: Event) -> None:
        if event.kind != "step" or event.step is None:
            return
        self._step = event.step
        took_s = float(event.data["step_s"])
        self._step_s = took_s if self._step_s is None else 0.9 * self._step_s + 0.1 * took_s

    def spent(self) -> str:
        spent = self._meter.spent()
        budget = self._meter.binding
        if budget is None:
            return "" if spent.cost_usd is None else f"spent {spent.cost_usd:.4f} USD"
        if budget.kind == "money" and spent.cost_usd is not None:
            return f"spent {spent.cost_usd:.4f}/{budget.amount:.6g} USD"
        if budget.kind == "gpu_hours":
            return f"spent {spent.gpu_hours:.4f}/{budget.amount:.6g} GPU-hours"
        if budget.kind in ("energy", "carbon"):
            unit = "kWh" if budget.kind == "energy" else "kg CO2e"
            return f"spent {amount_of(budget, spent):.4g}/{budget.amount:.6g} {unit}"
        return f"spent {spent.wall_s:.0f}/{budget.amount * 3600:.0f} s"

    def eta(self) -> str:
        if self._step_s is None or self._step >= self._steps:
            return ""
        left_s = (self._steps - self._step) * self._step_s
        budget_s = self._meter.remaining_s()
        if budget_s is not None and budget_s < left_s:
            return f"ends at the budget in {format_seconds(max(0.0, budget_s))}"
        return f"ETA {format_seconds(left_s)}"


def describe(event: Event, steps: int) -> str | None:
    """One event in a line for a person; None where there is nothing to say."""
    data = event.data
    match event.kind:
        case "step":
            return (
                f"step {event.step}/{steps}  loss {_number(data.get('loss'))}  "
                f"lr {_rate(data.get('lr'))}  {format_count(data['tokens_per_s'])} tokens/s"
            )
        case "start":
            return f"starting {data['ranks']} ranks: {data['strategy']}"
        case "rank_ready":
            return f"rank {data['rank']} ready after {event.elapsed_s:.1f} s"
        case "eval":
            return (
                f"held-out loss {_number(data.get('loss'))} at step {event.step} "
                f"(unigram {_number(data.get('unigram'))})"
            )
        case "save":
            return f"saved step {event.step} in {data['save_s']:.1f} s: {data['path']}"
        case "export":
            return f"exported {data['path']}"
        case "warning" | "stop" | "end" | "question" | "answer":
            return f"{event.kind}: {data['message']}"
        case _:
            return None


def _rate(value: Any) -> str:
    return "not finite" if value is None else f"{value:.2e}"


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:.4f}"

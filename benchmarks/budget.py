"""How good was the forecast? python -m benchmarks.budget RUN [RUN …] [--at 0.2]

Replays the events of finished runs: what the forecast said at 20 % of the steps that were done, with the
speeds known by then, against the wall time (and so the money) at the end. Only the first attempt counts.
"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--at", type=click.FloatRange(0.01, 0.99), default=0.2, show_default=True)
def main(runs: tuple[Path, ...], at: float) -> None:
    """Forecast of the final cost at a part of the run, against what came."""
    for run in runs:
        click.echo(_line(run, at))


def _line(run: Path, at: float) -> str:
    from outlay.runner.budget import Bounds, Meter
    from outlay.runner.control import Controller
    from outlay.runner.events import read_events
    from outlay.runner.folder import RunFolder

    now_s = 0.0
    folder = RunFolder(run)
    events = list(read_events(folder.events))
    steps = max(e.step for e in events if e.kind == "step" and e.step is not None)
    meter = Meter((), price_usd_per_h=None, accelerators=1, started_s=0.0, clock=lambda: now_s)
    bounds = Bounds(step_guess_s=0.0, parameters=0, write_bytes_per_s=1.0)
    control = Controller(meter, bounds, steps=steps)
    for event in events:
        now_s = event.elapsed_s
        if event.kind == "save":
            bounds.save.add(float(event.data["save_s"]))
        if event.kind == "step" and event.step is not None:
            bounds.step.add(float(event.data["step_s"]))
            control.decide(event.step)
            if event.step >= at * steps:
                break
    forecast, end_s = control.forecast(int(at * steps)), events[-1].elapsed_s
    if forecast is None:
        return f"{run}: too few steps"
    inside = "inside" if forecast.low_s <= end_s <= forecast.high_s else "outside"
    return (
        f"{run}: {steps} steps, forecast at {at:.0%} {forecast.expected_s:.1f} s "
        f"({forecast.low_s:.1f} to {forecast.high_s:.1f}), came {end_s:.1f} s: "
        f"{forecast.expected_s / end_s - 1:+.1%}, {inside}"
    )


if __name__ == "__main__":
    main()

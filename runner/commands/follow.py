"""`outlay stop`, `answer` and `tail`: a run that works elsewhere, from its folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outlay.profiles.errors import OutlayError, UsageError
from outlay.profiles.units import parse_seconds

if TYPE_CHECKING:
    from outlay.runner.control import Policy
    from outlay.runner.folder import RunFolder

POLL_S = 0.2


def _folder(run_dir: str) -> RunFolder:
    from outlay.runner.folder import RunFolder

    folder = RunFolder(Path(run_dir))
    folder.require_run()
    return folder


@click.command()
@click.argument("run_dir")
@click.option("--wait", default="10min", show_default=True, help="For it to save and end.")
def stop(run_dir: str, wait: str) -> None:
    """Stop a run well: it finishes the step, saves, and exits with 75.

    `outlay resume` continues it.
    """
    folder, wait_s = _folder(run_dir), parse_seconds(wait, where="--wait")
    owner = folder.owner()
    if owner is None:
        raise UsageError("this run is not running", where=run_dir)
    os.kill(owner, signal.SIGTERM)
    click.echo(f"asked process {owner} to save and stop", err=True)
    end_s = time.monotonic() + wait_s
    while folder.owner() == owner:
        if time.monotonic() >= end_s:
            raise OutlayError(
                f"it still runs after {wait}", where=run_dir, do="outlay tail says what it does"
            )
        time.sleep(POLL_S)
    click.echo("stopped", err=True)


@click.command()
@click.argument("run_dir")
@click.argument("policy", type=click.Choice(["anneal", "cut", "stop"]))
def answer(run_dir: str, policy: Policy) -> None:
    """Answer a run that was started with --when-over ask.

    anneal: the learning rate ends within the budget. cut: it keeps its schedule, and the run ends at
    the budget. stop: save now, and keep the rest. It holds for later resumes, too.
    """
    from outlay.runner.question import write_answer

    folder = _folder(run_dir)
    before = folder.read_limits().when_over
    if before != "ask":
        raise UsageError(
            "this run asks nothing",
            where=run_dir,
            why=f"it was started with --when-over {before}, or is answered already",
            do=f"outlay stop {run_dir}, then outlay resume {run_dir} --when-over {policy}",
        )
    write_answer(folder, policy)
    heard = "it hears it before its next step" if folder.owner() else "for when it is resumed"
    click.echo(f"{run_dir}: {policy}; {heard}", err=True)


@click.command()
@click.argument("run_dir")
@click.option("-n", "--lines", type=click.IntRange(0), default=10, show_default=True)
@click.option("--follow/--no-follow", default=True, show_default=True, help="Until the run ends.")
def tail(run_dir: str, lines: int, follow: bool) -> None:
    """Show what a run does, as it does it.

    The last events first; then, while the run works, each new one.
    """
    from outlay.runner.events import Follower
    from outlay.runner.telemetry import describe

    folder = _folder(run_dir)
    steps, follower = folder.read_plan().job.steps, Follower(folder.events)

    def texts() -> list[str]:
        found = [(event, describe(event, steps)) for event in follower.new_events()]
        return [f"{e.elapsed_s:9.1f} s  {text}" for e, text in found if text is not None]

    seen = texts()
    for text in seen[len(seen) - min(lines, len(seen)) :]:
        click.echo(text)
    while follow and folder.owner() is not None:
        time.sleep(POLL_S)
        for text in texts():
            click.echo(text)
    for text in texts():
        click.echo(text)

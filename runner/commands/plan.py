"""`outlay plan`: the planner's command, and `--measure`, which only a runner can answer."""

from __future__ import annotations

from typing import Any

import click

from outlay.planner.commands.plan import answer, show
from outlay.planner.commands.plan import plan as planners


def _plan(
    job_file: str | None, target: str, deadline: str | None, format_: str, out: str, dry_run: bool,
    measure: int | None, **flags: Any,
) -> None:  # fmt: skip
    made = answer(job_file, target, deadline, **flags)
    if measure is not None:
        from outlay.runner.measure_plan import verified

        made = verified(made, measure, keep=not dry_run)
    show(made, format_, out, dry_run=dry_run)


_MEASURE = click.Option(
    ["--measure"],
    type=click.IntRange(1),
    metavar="N",
    help="Really run the N best here, a few steps each, and plan the fastest of them.",
)
plan = click.Command(
    "plan", callback=_plan, params=[*planners.params, _MEASURE], help=planners.help
)

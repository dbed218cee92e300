"""`outlay emit`: a plan in the format that another program reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from outlay.planner.commands.question import emit_text
from outlay.profiles.errors import UsageError

if TYPE_CHECKING:
    pass


@click.group()
def emit() -> None:
    """Write a plan in the format that another program reads."""


@emit.command("deepspeed")
@click.argument("plan_file")
@click.option("--out", help="Write there instead of stdout.")
def emit_deepspeed(plan_file: str, out: str | None) -> None:
    """The DeepSpeed JSON of a plan."""
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.planning import read_plan
    from outlay.planner.rules import Context, broken
    from outlay.planner.spec.families import spec_from_config
    from outlay.planner.spec.files import to_json

    p = read_plan(plan_file)
    spec = spec_from_config(p.model.config, name=p.model.name, source=plan_file)
    problems = broken(
        p.strategy,
        Context(spec=spec, job=p.job, cluster=p.cluster),
        kinds=("arithmetic", "deepspeed"),
    )
    if problems:
        rule, message = problems[0]
        raise UsageError(message, where=plan_file, why=f"{rule.name}: {rule.evidence}")
    emit_text(to_json(deepspeed_config(p.job, p.strategy, spec, p.cluster)), out)

"""`outlay plan`: search, choose, write plan.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.commands.question import Question, console
from outlay.planner.commands.reader import reader_may_leave
from outlay.planner.jobs import warmup_note
from outlay.planner.options import (
    as_integers,
    format_option,
    job_options,
    model_options,
    split_strategy,
    strategy_options,
)
from outlay.planner.size.chosen import OPTION, Chosen, chosen_of, deadline_s, target_option

if TYPE_CHECKING:
    from outlay.planner.spec.plan import Plan


@click.command()
@click.argument("job_file", required=False)
@model_options
@job_options
@strategy_options
@target_option
@click.option("--deadline", help="Refuse what would end later: 14d, 72h.")
@format_option("table", "json")
@click.option("--out", default="plan.yaml", show_default=True, help="The plan file.")
@click.option("--dry-run", is_flag=True, help="Write nothing.")
def plan(
    job_file: str | None, target: str, deadline: str | None, format_: str, out: str, dry_run: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Search the strategies, choose the fastest that fits, and write plan.yaml.

    JOB_FILE may be the letter of an option that `outlay size` printed: `outlay plan A`.
    """
    show(answer(job_file, target, deadline, **flags), format_, out, dry_run=dry_run)


def answer(job_file: str | None, target: str, deadline: str | None, **flags: Any) -> Plan:
    """The plan for what was asked."""
    flags, given = split_strategy(flags)
    q: Question | Chosen
    if job_file and OPTION.fullmatch(job_file) and not Path(job_file).exists():
        q, target = chosen_of(job_file, flags, target)
    else:
        q = Question(job_file, flags)
    limit_s = None if deadline is None else deadline_s(deadline)
    made = _planned(q, given, target, limit_s)
    held = _steps_in_budget(q, made)
    if held is not None:
        q.job = dataclasses.replace(q.job, steps=held)
        source = "what the budget holds at the predicted speed; set-up and saves not counted"
        before = ("steps", "tokens", "schedule_warmup_steps")
        q.assumptions = [a for a in q.assumptions if a["what"] not in before]
        q.assumptions.append({"what": "steps", "value": held, "source": source})
        q.assumptions += warmup_note(q.job.schedule, held)
        made = _planned(q, given, target, limit_s)
    return made


def show(made: Plan, format_: str, out: str, *, dry_run: bool) -> None:
    """Write the plan file, and print the plan."""
    from outlay.planner.spec.files import to_json, to_yaml, write_text

    if not dry_run:
        write_text(out, to_yaml(made))
    with reader_may_leave():
        if format_ == "json":
            click.echo(to_json(made), nl=False)
            return
        from outlay.planner.report.terminal import print_plan

        print_plan(console(), made, out=None if dry_run else out)


def _planned(
    q: Question | Chosen, given: dict[str, Any], target: str, limit_s: float | None
) -> Plan:
    from outlay.planner.planning import make_plan

    return make_plan(
        q.spec,
        q.config,
        q.job,
        q.cluster,
        fixed=as_integers(given),
        assumptions=q.assumptions,
        weights=q.weights,
        target=target,
        deadline_s=limit_s,
        with_gains=True,
    )


def _steps_in_budget(q: Question | Chosen, made: Plan) -> int | None:
    """How many steps the smallest budget holds, where nobody said how long to train; else null."""
    from outlay.planner.cost import budget_s

    defaulted = any(a["what"] in ("steps", "tokens") for a in q.assumptions)
    limits = [s for b in q.job.budget if (s := budget_s(b, q.cluster, q.job)) is not None]
    if not defaulted or not limits or made.estimate["step"] is None:
        return None
    held = max(1, int(min(limits) / float(made.estimate["step"]["time_s"])))
    return held if held < q.job.steps else None

"""`outlay estimate`: one strategy, or many from a file."""

from __future__ import annotations

from typing import Any

import click

from outlay.planner.commands.question import Question, console, emit_text
from outlay.planner.options import (
    format_option,
    job_options,
    model_options,
    split_strategy,
    strategy_options,
)
from outlay.profiles.errors import UsageError


@click.command()
@click.argument("job_file", required=False)
@model_options
@job_options
@strategy_options
@format_option("table", "json")
@click.option(
    "--cases", help="CSV of many configurations; needs --out. Columns: docs/reference/formats.md."
)
@click.option("--out", help="Write there instead of stdout.")
def estimate(
    job_file: str | None, format_: str, cases: str | None, out: str | None, **flags: Any
) -> None:
    """Memory, time and cost of one strategy, each with its interval.

    What does not fit is a result, not an error: the exit code is 0 and the verdict says no.
    With --cases, one prediction a row of a CSV file.
    """
    if cases is not None:
        _alone(click.get_current_context())
        _estimate_cases(cases, out)
        return
    from outlay.planner.estimate.candidates import Candidates
    from outlay.planner.estimate.estimator import evaluate
    from outlay.planner.estimate.printed import estimate_dict
    from outlay.planner.rules import Context, broken

    flags, given = split_strategy(flags)
    q = Question(job_file, flags)
    strategy, batch_note = _one_strategy(q, given)
    problems = broken(
        strategy, Context(spec=q.spec, job=q.job, cluster=q.cluster), kinds=("arithmetic",)
    )
    if problems:
        rule, message = problems[0]
        raise UsageError(message, why=f"{rule.name}: {rule.evidence}")
    result = estimate_dict(
        q.spec, q.job, q.cluster, evaluate(q.spec, q.job, q.cluster, Candidates.of([strategy])), 0
    )
    context = Context(spec=q.spec, job=q.job, cluster=q.cluster)
    refused = [
        {"what": f"not run as it stands ({rule.name})", "value": None, "source": message}
        for rule, message in broken(strategy, context, kinds=("deepspeed", "runner"))
    ]
    result["assumptions"] = q.assumptions + batch_note + refused + result["assumptions"]
    if format_ == "json":
        from outlay.planner.spec.files import to_json

        emit_text(to_json(result), out)
        return
    from outlay.planner.report.terminal import budget_rows, print_estimate

    screen = console()
    step_s = None if result["step"] is None else float(result["step"]["time_s"])
    with screen.capture() as capture:
        print_estimate(screen, result, budget_rows(q.job, q.cluster, step_s))
    emit_text(capture.get(), out)


def _alone(ctx: click.Context) -> None:
    """Raises UsageError for options beside --cases: they would be ignored, each row says all."""
    typed = click.core.ParameterSource.COMMANDLINE
    others = [
        p.opts[0]
        for p in ctx.command.params
        if p.name not in ("cases", "out") and ctx.get_parameter_source(str(p.name)) is typed
    ]
    if others:
        raise UsageError(
            f"{', '.join(others)} beside --cases", why="each row of the file says all of itself",
            do="put it in the file's columns, or leave it out",
        )  # fmt: skip


def _estimate_cases(cases: str, out: str | None) -> None:
    from outlay.planner.cases import predict_file

    if out is None:
        raise UsageError("--cases needs --out FILE.csv")
    rows, errors = predict_file(cases, out)
    click.echo(f"wrote {out}: {rows} rows, {errors} of them with an error", err=True)


def _one_strategy(q: Question, given: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The strategy that the flags describe; dp and grad_accum from ranks and batch."""
    from outlay.planner.spec.strategy import Strategy

    base = Strategy(**given)
    if "dp" not in given:
        model_parallel = base.tp * base.pp * base.cp * base.sp
        if q.cluster.ranks % model_parallel:
            raise UsageError(
                f"tp·pp·cp·sp = {model_parallel} does not divide {q.cluster.ranks} ranks"
            )
        base = Strategy(**(given | {"dp": q.cluster.ranks // model_parallel}))
    if base.recompute_layers is not None and base.activation_checkpointing != "full":
        raise UsageError(
            f"--recompute-layers {base.recompute_layers} with activation_checkpointing "
            f"{base.activation_checkpointing}",
            why="it counts the layers that full checkpointing recomputes",
            do="add --activation-checkpointing full",
        )
    per_pass = base.micro_batch * base.dp
    if q.job.global_batch % per_pass:
        raise UsageError(
            f"micro_batch {base.micro_batch} · dp {base.dp} = {per_pass} does not divide the "
            f"global batch {q.job.global_batch}",
            do="change --micro-batch or --global-batch",
        )
    given = given | {"dp": base.dp, "grad_accum": q.job.global_batch // per_pass}
    notes = [
        {"what": key, "value": getattr(base, key), "source": "default: not given"}
        for key in ("zero", "micro_batch", "activation_checkpointing")
        if key not in given
    ]
    return Strategy(**given), notes

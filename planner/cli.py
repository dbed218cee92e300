"""planner's commands: estimate, plan, emit, catalog."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.options import (
    as_integers,
    format_option,
    job_options,
    model_options,
    split_strategy,
    strategy_options,
)
from outlay.profiles.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.job import Job
    from outlay.planner.spec.model import ModelSpec
    from outlay.planner.spec.plan import Plan


def console() -> Console:
    """stdout; a pipe gets 100 columns and no colours."""
    from rich.console import Console

    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 110)


def emit_text(text: str, out: str | None) -> None:
    """To the file, or to stdout."""
    from outlay.planner.spec.files import write_text

    if out:
        write_text(out, text)
        click.echo(f"wrote {out}", err=True)
    else:
        click.echo(text, nl=not text.endswith("\n"))


class Question:
    """Model, job and cluster as resolved from a job file and flags."""

    def __init__(self, job_file: str | None, flags: dict[str, Any]) -> None:
        from outlay.planner.hardware import resolve_hardware
        from outlay.planner.jobs import JobFile, merge, read_job_file, resolve_job
        from outlay.planner.spec.families import resolve_model

        file = merge(read_job_file(job_file) if job_file else JobFile(), flags)
        if not file.model:
            raise UsageError("no model", do="pass --model, or a job file with the key `model`")
        self.spec: ModelSpec
        self.spec, self.config = resolve_model(file.model)
        self.weights = _weights(file.model)
        self.cluster: Cluster = resolve_hardware(
            file.hardware or "probe",
            inter_node_gbps=file.inter_node_gbps,
            price_usd_per_h=file.price_usd_per_h,
        )
        resolved = resolve_job(file, self.spec, self.cluster)
        self.job: Job = resolved.job
        self.assumptions = resolved.assumptions
        if self.weights:
            self.assumptions.append(
                {
                    "what": "weights",
                    "value": self.weights,
                    "source": "the folder has safetensors: training starts from them "
                    "(pass its config.json instead to start from random weights)",
                }
            )


def _weights(reference: str) -> str | None:
    """A model folder with safetensors is a pretrained model; a config alone is a shape."""
    folder = Path(reference).expanduser()
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        return str(folder.resolve())
    return None


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
        _estimate_cases(cases, out)
        return
    from outlay.planner.estimate.candidates import Candidates
    from outlay.planner.estimate.estimator import estimate_dict, evaluate
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


@click.command()
@click.argument("job_file", required=False)
@model_options
@job_options
@strategy_options
@format_option("table", "json")
@click.option("--out", default="plan.yaml", show_default=True, help="The plan file.")
@click.option("--dry-run", is_flag=True, help="Write nothing.")
def plan(job_file: str | None, format_: str, out: str, dry_run: bool, **flags: Any) -> None:
    """Search the strategies, choose the fastest that fits, and write plan.yaml."""
    from outlay.planner.spec.files import to_json, to_yaml, write_text

    flags, given = split_strategy(flags)
    q = Question(job_file, flags)
    made = _planned(q, given)
    held = _steps_in_budget(q, made)
    if held is not None:
        q.job = dataclasses.replace(q.job, steps=held)
        source = "what the budget holds at the predicted speed; set-up and saves not counted"
        q.assumptions = [a for a in q.assumptions if a["what"] not in ("steps", "tokens")]
        q.assumptions.append({"what": "steps", "value": held, "source": source})
        made = _planned(q, given)
    if not dry_run:
        write_text(out, to_yaml(made))
    if format_ == "json":
        click.echo(to_json(made), nl=False)
        return
    from outlay.planner.report.terminal import print_plan

    print_plan(console(), made, out=None if dry_run else out)


def _planned(q: Question, given: dict[str, Any]) -> Plan:
    from outlay.planner.planning import make_plan

    return make_plan(
        q.spec,
        q.config,
        q.job,
        q.cluster,
        fixed=as_integers(given),
        assumptions=q.assumptions,
        weights=q.weights,
    )


def _steps_in_budget(q: Question, made: Plan) -> int | None:
    """How many steps the smallest budget holds, where nobody said how long to train; else null."""
    from outlay.planner.cost import budget_s

    defaulted = any(a["what"] in ("steps", "tokens") for a in q.assumptions)
    limits = [s for b in q.job.budget if (s := budget_s(b, q.cluster)) is not None]
    if not defaulted or not limits or made.estimate["step"] is None:
        return None
    held = max(1, int(min(limits) / float(made.estimate["step"]["time_s"])))
    return held if held < q.job.steps else None


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


@click.group()
def catalog() -> None:
    """Accelerators and models that outlay knows."""


@catalog.command("list")
@click.argument("what", type=click.Choice(["accelerators", "models"]), default="accelerators")
def catalog_list(what: str) -> None:
    """One name a line."""
    from outlay.planner.spec.families import preset_names
    from outlay.profiles.loader import accelerators

    for name in sorted(accelerators()) if what == "accelerators" else preset_names():
        click.echo(name)


@catalog.command("show")
@click.argument("name")
def catalog_show(name: str) -> None:
    """One accelerator with the source of every figure."""
    from outlay.planner.spec.files import to_yaml
    from outlay.profiles.loader import accelerator

    click.echo(to_yaml(accelerator(name)), nl=False)

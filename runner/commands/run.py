"""`outlay run`, `resume`, `verify`, `status`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.options import format_option
from outlay.profiles.errors import CheckpointError, MissingExtra, UsageError
from outlay.runner.before import confirm, limit_options, limits_from, require_affordable, summary

if TYPE_CHECKING:
    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.measurement import Outcome
    from outlay.planner.spec.plan import Plan


def require_run_extra() -> None:
    """Training needs packages that the base install leaves out."""
    import importlib.util

    for package in ("torch", "deepspeed", "transformers", "tokenizers", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "run")


def with_limits(
    plan: Plan,
    budget: tuple[str, ...],
    price_usd_per_h: float | None,
    data: str | None = None,
    *,
    rate: tuple[str, ...] = (),
) -> Plan:
    """The plan with the flags of this call over what it says; money is then shown in their currency."""
    from outlay.planner.amount import money_of
    from outlay.planner.options import show_money
    from outlay.planner.spec.job import Data

    job, cluster = plan.job, plan.cluster
    budgets, currency = money_of(budget, rate, None)
    show_money(currency or job.currency)
    if budgets:
        job = dataclasses.replace(job, budget=budgets)
    if data is not None:
        kind = "tokens" if (Path(data) / "dataset.json").is_file() else "text"
        job = dataclasses.replace(job, data=Data(path=data, format=kind))  # type: ignore[arg-type]
    if price_usd_per_h is not None:
        if not 0 <= price_usd_per_h < 1e9:
            raise UsageError(f"{price_usd_per_h} USD/h makes no sense", where="--price-usd-per-h")
        cluster = dataclasses.replace(
            cluster, price_usd_per_h=price_usd_per_h, price_source="--price-usd-per-h"
        )
    return dataclasses.replace(plan, job=job, cluster=cluster)


def with_compression(plan: Plan, prune: str | None, qat: str | None) -> Plan:
    """The plan with the flags of this call over its compression; its estimate stays as it was."""
    from outlay.planner.spec.compress import with_flags

    compress = with_flags(plan.job.compress, prune, qat)
    return dataclasses.replace(plan, job=dataclasses.replace(plan.job, compress=compress))


def _measure_memory(plan: Plan, here: Cluster) -> None:
    from outlay.profiles.units import format_bytes
    from outlay.runner.fit import check_machine
    from outlay.runner.memory_probe import run_memory_probe

    check_machine(plan, here)
    readings = run_memory_probe(plan)
    click.echo(
        "peak memory measured, by rank: "
        + ", ".join(f"{format_bytes(r.growth_bytes)} ({r.kind})" for r in readings),
        err=True,
    )


def _energy_text(outcome: Outcome) -> str:
    if outcome.energy_kwh is None:
        return ""
    carbon = "" if outcome.co2e_kg is None else f", {outcome.co2e_kg:.4g} kg CO2e"
    return f", {outcome.energy_kwh:.4g} kWh{carbon} ({outcome.energy_source})"


def _show_outcome(outcome: Outcome) -> None:
    """The end of a run, on stderr; what it wrote is in outcome.json."""
    from outlay.profiles.units import format_seconds, format_usd

    cost = "no price" if outcome.cost_usd is None else format_usd(outcome.cost_usd)
    losses = [
        f"{name} loss {value:.3f}"
        for name, value in (("train", outcome.train_loss), ("held-out", outcome.heldout_loss))
        if value is not None
    ]
    click.echo(
        f"{outcome.state}: {outcome.reason}\n"
        f"  {outcome.steps:,} steps, {outcome.tokens:,} tokens"
        + "".join(f", {text}" for text in losses)
        + f"\n  spent {format_seconds(outcome.wall_s)}, {cost}{_energy_text(outcome)}",
        err=True,
    )
    if (found := outcome.compression) is not None:
        click.echo(
            f"  pruned {found['sparsity']:.2%} (asked {found['asked']:.2%}): {found['zeros']:,} zeros of "
            f"{found['weights']:,} weights in {len(found['matrices'])} matrices",
            err=True,
        )
    for name in ("checkpoint", "export"):
        if path := getattr(outcome, name):
            click.echo(f"  {name}: {path}", err=True)


@click.command()
@click.argument("plan_file")
@click.option(
    "--dir", "run_dir", default="run", show_default=True, help="The run's folder; must be new."
)
@click.option(
    "--data", help="Text, or a folder that `outlay data prepare` wrote; instead of the plan's."
)
@click.option(
    "--budget",
    multiple=True,
    help="Instead of the plan's: 5usd, 30min, 10gpuh, 2kWh, 1kgCO2e; repeatable.",
)
@click.option("--price-usd-per-h", type=float, help="What all of this machine costs an hour.")
@click.option(
    "--prune", help="Instead of the plan's: 50%, 50%,global, 2:4 … (as in `plan`); or none."
)
@click.option("--qat", help="Instead of the plan's: int8, int4:g32 … (as in `plan`); or none.")
@click.option(
    "--nvme-path", help="Folder on a local drive for what is offloaded to NVMe; else RUN/swap."
)
@click.option(
    "--measure-memory", is_flag=True, help="Measure peak memory in a separate short run first."
)
@click.option(
    "--dry-run", is_flag=True, help="Check that the plan fits machine and budget; start nothing."
)
@limit_options
@click.option("-y", "--yes", is_flag=True, help="Do not ask before starting.")
@click.option("--quiet", is_flag=True, help="No progress.")
def run(
    plan_file: str,
    run_dir: str,
    data: str | None,
    budget: tuple[str, ...],
    price_usd_per_h: float | None,
    prune: str | None,
    qat: str | None,
    nvme_path: str | None,
    measure_memory: bool,
    dry_run: bool,
    yes: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Train as a plan says, within its budget.

    Exit code 0: all steps done; 4: the budget was reached, saved, stopped; 75: stopped by a signal,
    saved, start me again with `outlay resume`.
    """
    from outlay.runner.budget import OPTIMISTIC_STARTUP_S, process_started_s

    started_s = process_started_s()
    require_run_extra()
    from outlay.planner.planning import read_plan
    from outlay.planner.probe import probe
    from outlay.runner.booking import allowed
    from outlay.runner.fit import check_machine, check_rules
    from outlay.runner.folder import Attempts
    from outlay.runner.launch import open_meter, run_plan
    from outlay.runner.limits import Limits
    from outlay.runner.refusal import require_start
    from outlay.runner.swap import with_drive

    rate = flags.pop("rate")
    plan = with_limits(read_plan(plan_file), budget, price_usd_per_h, data, rate=rate)
    plan = with_compression(with_drive(plan, nvme_path), prune, qat)
    if plan.job.data is None:
        raise UsageError("the plan names no data", where=plan_file, do="pass --data")
    here = probe(ranks=plan.strategy.world if plan.cluster.kind == "cpu" else None)
    if dry_run:
        check_rules(plan)
        check_machine(plan, here)
    limits = limits_from(Limits(), flags)
    nothing = Attempts().spent(plan.cluster.price_usd_per_h, plan.cluster.ranks)
    seen = dataclasses.replace(limits, drawn=allowed(plan, limits, nothing))
    meter = open_meter(plan, seen, started_s=started_s, earlier=Attempts())
    if flags["when_over"] is None:
        require_affordable(plan, meter, OPTIMISTIC_STARTUP_S)
    require_start(meter, OPTIMISTIC_STARTUP_S, source="assumed", walltime_s=limits.walltime_s)
    if dry_run:
        click.echo(
            f"{plan_file} fits this machine: {plan.strategy.label()}, {plan.job.steps} steps"
        )
        click.echo(summary(plan, meter, limits, run_dir), err=True)
        return
    confirm(summary(plan, meter, limits, run_dir), yes=yes or quiet)
    if measure_memory:
        _measure_memory(plan, here)
    outcome = run_plan(
        plan, Path(run_dir), here=here, started_s=started_s, quiet=quiet, limits=limits
    )
    _show_outcome(outcome)
    sys.exit(outcome.exit_code)


@click.command()
@click.argument("run_dir")
@click.option(
    "--budget", multiple=True, help="Instead of the run's, for all its attempts together."
)
@click.option("--price-usd-per-h", type=float, help="What all of this machine costs an hour now.")
@limit_options
@click.option("--quiet", is_flag=True, help="No progress.")
def resume(
    run_dir: str,
    budget: tuple[str, ...],
    price_usd_per_h: float | None,
    quiet: bool,
    **flags: Any,
) -> None:
    """Continue a run from its newest checkpoint that verifies.

    What earlier attempts have spent counts. Without such a checkpoint: exit code 5.
    """
    from outlay.runner.budget import process_started_s

    started_s = process_started_s()
    require_run_extra()
    from outlay.planner.probe import probe
    from outlay.runner.folder import RunFolder
    from outlay.runner.launch import run_plan
    from outlay.runner.question import how_asked

    folder = RunFolder(Path(run_dir))
    folder.require_run()
    plan = with_limits(folder.read_plan(), budget, price_usd_per_h, rate=flags.pop("rate"))
    if folder.outcome.exists():
        outcome = json.loads(folder.outcome.read_text())
        if outcome.get("state") == "done" and outcome.get("steps", 0) >= plan.job.steps:
            click.echo(f"already done: {outcome['steps']} steps; nothing to resume", err=True)
            return
    here = probe(ranks=plan.strategy.world if plan.cluster.kind == "cpu" else None)
    limits = limits_from(folder.read_limits(), flags)
    if limits.when_over == "ask":
        click.echo(how_asked(run_dir), err=True)
    outcome = run_plan(
        plan,
        Path(run_dir),
        resume=True,
        here=here,
        started_s=started_s,
        quiet=quiet,
        limits=limits,
    )
    _show_outcome(outcome)
    sys.exit(outcome.exit_code)


@click.command()
@click.argument("path")
def verify(path: str) -> None:
    """Check a run's checkpoints, or one, against their manifests.

    Exit code 5 when one does not verify, or there is none.
    """
    require_run_extra()
    from outlay.runner.checkpoint import checkpoints
    from outlay.runner.checkpoint import verify as verify_checkpoint
    from outlay.runner.folder import RunFolder

    if not Path(path).is_dir():
        raise UsageError("no such folder", where=path)
    folder = RunFolder(Path(path))
    if not folder.is_run():
        verify_checkpoint(Path(path))
        click.echo(f"ok   {path}")
        return
    found, bad = checkpoints(folder.checkpoints), 0
    for checkpoint in found:
        try:
            verify_checkpoint(checkpoint)
        except CheckpointError as error:
            bad += 1
            click.echo(f"bad  {checkpoint}: {error.what}")
        else:
            click.echo(f"ok   {checkpoint}")
    if bad or not found:
        what = f"{bad} of {len(found)} checkpoints do not verify" if found else "there is none"
        do = f"outlay resume {path} takes the newest that verifies" if bad < len(found) else ""
        raise CheckpointError(what, where=str(folder.checkpoints), do=do)


@click.command()
@click.argument("run_dir")
@format_option("table", "json")
def status(run_dir: str, format_: str) -> None:
    """How a run stands: last step, what it has spent, how it ended."""
    from outlay.runner.events import read_events
    from outlay.runner.folder import RunFolder

    folder = RunFolder(Path(run_dir))
    folder.require_run()
    last: dict[str, Any] = {}
    for event in read_events(folder.events):
        last |= {"last_event": event.kind, "elapsed_s": event.elapsed_s}
        if event.step is not None:
            last["step"] = event.step
        if event.kind in ("step", "compress"):
            last |= {k: v for k, v in event.data.items() if not isinstance(v, dict)}
    attempts = folder.read_attempts()
    ended = folder.outcome.exists()
    last |= {
        "attempts": len(attempts.attempts),
        "spent_s": attempts.spent_s(),
        "outcome": json.loads(folder.outcome.read_text()) if ended else None,
    }
    if format_ == "json":
        click.echo(json.dumps(last, indent=2))
        return
    outcome = last.pop("outcome")
    for key, value in last.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        click.echo(f"{key:<16}{shown}")
    text = "not ended" if outcome is None else f"{outcome['state']}: {outcome['reason']}"
    click.echo(f"{'outcome':<16}" + text.replace("\n", "\n" + " " * 16))

"""Runs a plan on this machine: checks, data, ranks, supervision, and the outcome."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import plain
from outlay.planner.spec.measurement import Outcome
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import CheckpointError, UsageError
from outlay.runner import swap
from outlay.runner.booking import Booking, allowed, book
from outlay.runner.budget import OPTIMISTIC_STARTUP_S, Meter, Spent, spent_at
from outlay.runner.energy import ENERGY_BASE, energy_of
from outlay.runner.events import EventLog, Follower, cut_torn_line, utc_now
from outlay.runner.fit import check_machine, check_rules, check_software
from outlay.runner.folder import Attempt, Attempts, RunFolder
from outlay.runner.host import (
    AcceleratorKind,
    build_ops,
    default_extensions_dir,
    ops_needed,
    prepare_environment,
)
from outlay.runner.known import least_work_s
from outlay.runner.limits import Limits
from outlay.runner.processes import EARLIER, STARTED, Ranks, Signals
from outlay.runner.refusal import require_start
from outlay.runner.refuse import refuse
from outlay.runner.schedule import check_schedule
from outlay.runner.supervise import Seen, Supervisor
from outlay.runner.telemetry import progress_for

_MAY_CHANGE = ("budget", "steps", "save_every", "eval_every", "eval_sequences")
"""Keys of a job that a resume may set anew."""


def run_plan(
    plan: Plan,
    run_dir: Path,
    *,
    resume: bool = False,
    here: Cluster | None = None,
    started_s: float | None = None,
    stream: TextIO | None = None,
    quiet: bool = False,
    limits: Limits | None = None,
) -> Outcome:
    """Train as the plan says, in `run_dir`; returns when nothing of it runs any more.

    `here`: a fresh probe of this machine, to refuse a plan that does not fit it (null = not
    checked). `started_s`: since when time counts, on CLOCK_MONOTONIC (null = now). Progress goes to
    `stream` (stderr). `limits`: metering and policy (null = those the run has). Raises OutlayError
    for what is refused before the ranks start.
    """
    started_s = time.monotonic() if started_s is None else started_s
    folder = RunFolder(Path(run_dir))
    _check(plan, here)
    (folder.require_run if resume else folder.require_new)()
    with folder.locked():
        earlier = folder.read_attempts()
        if limits is None:  # a wall time is of one start alone
            limits = replace(folder.read_limits(), walltime_s=None)
        spent = earlier.spent(plan.cluster.price_usd_per_h, plan.cluster.ranks)
        _affordable(plan, limits, spent, started_s=started_s, earlier=earlier, folder=folder)
        checkpoint, rejected = _newest(folder, plan) if resume else (None, [])
        spent = _more(spent, checkpoint)
        _prepare_data(plan, folder)
        environment = rank_environment(plan)
        swap.make_room(plan, folder.root)
        _affordable(plan, limits, spent, started_s=started_s, earlier=earlier, folder=folder)
        elapsed_s = time.monotonic() - started_s
        booking = book(plan, limits, folder.root, spent, elapsed_s=elapsed_s)
        used, state = spent_at(0.0, 0.0, plan.cluster.ranks), "refused"
        meter: Meter | None = None
        try:
            limits = replace(limits, drawn=booking.drawn(spent))
            # others may have drawn on the project meanwhile
            meter = _checked(
                plan, limits, spent, started_s=started_s, earlier=earlier, folder=folder
            )
            return _attempt(
                plan,
                folder,
                meter,
                earlier=earlier,
                checkpoint=checkpoint,
                rejected=[*rejected, *([booking.warning] if booking.warning else [])],
                environment=environment,
                stream=stream,
                quiet=quiet,
                limits=limits,
                booking=booking,
            )
        finally:
            swap.clear(plan, folder.root)
            if meter is not None:
                used, state = meter.attempt(), "failed"
            booking.close(used, state=state, reason="ended early", steps=0)


def _affordable(
    plan: Plan,
    limits: Limits,
    spent: Spent,
    *,
    started_s: float,
    earlier: Attempts,
    folder: RunFolder,
) -> None:
    """Refuse what the run's own limits, or its project's as they stand now, do not let start."""
    limits = replace(limits, drawn=allowed(plan, limits, spent))
    _checked(plan, limits, spent, started_s=started_s, earlier=earlier, folder=folder)


def _checked(
    plan: Plan,
    limits: Limits,
    spent: Spent,
    *,
    started_s: float,
    earlier: Attempts,
    folder: RunFolder,
) -> Meter:
    meter = open_meter(plan, limits, started_s=started_s, earlier=earlier, spent=spent)
    least_s, source = _startup(earlier, folder)
    require_start(meter, least_s, source=source, walltime_s=limits.walltime_s)
    return meter


def _more(noted: Spent, checkpoint: Path | None) -> Spent:
    """What the run has spent: its attempts', or the checkpoint's where that has seen more (it was
    copied to another machine, the attempts were not)."""
    from outlay.runner.checkpoint import read_manifest

    said = None if checkpoint is None else read_manifest(checkpoint).get("spent")
    seen = None if said is None else Spent(**said)
    return noted if seen is None or seen.wall_s <= noted.wall_s else replace(seen, fraction=None)


def open_meter(
    plan: Plan,
    limits: Limits,
    *,
    started_s: float,
    earlier: Attempts,
    spent: Spent | None = None,
) -> Meter:
    """The supervisor's meter, with the energy of this machine where anything tells it."""
    energy = energy_of(
        plan.cluster,
        limits.power_w,
        limits.used_pue()[0],
        already_s=max(0.0, time.monotonic() - started_s),
    )
    return Meter.of_cluster(
        plan.job.budget,
        plan.cluster,
        started_s=started_s,
        drawn=limits.drawn,
        project=limits.project,
        earlier=spent or earlier.spent(plan.cluster.price_usd_per_h, plan.cluster.ranks),
        energy=energy,
        kgco2e_per_kwh=limits.kgco2e_per_kwh,
        minimum_s=limits.minimum_s,
    )


def _check(plan: Plan, here: Cluster | None) -> None:
    check_software()
    check_rules(plan)
    check_schedule(plan.job.schedule, plan.job.steps)
    if plan.job.seed < 0:
        raise UsageError(f"seed must not be negative, it is {plan.job.seed}")
    refuse(plan, plan.strategy.world, _accelerator(plan))
    if here is not None:
        check_machine(plan, here)


def _accelerator(plan: Plan) -> AcceleratorKind:
    return "cuda" if plan.cluster.kind == "gpu" else "cpu"


def _startup(earlier: Attempts, folder: RunFolder) -> tuple[float, str]:
    """(least seconds for the start and, where they were measured, a step and a save; from what)."""
    measured = [a.ready_s for a in earlier.attempts if a.ready_s is not None]
    if measured:
        least_s = 0.8 * (min(measured) + least_work_s(folder.events))
        return least_s, "80 % of the fastest start, step and save of this run so far"
    return OPTIMISTIC_STARTUP_S, "assumed; this run was not started before"


def _newest(folder: RunFolder, plan: Plan) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and why newer ones do not. Never nothing instead."""
    from outlay.runner.checkpoint import newest_valid

    _check_same(plan, folder.read_plan(), folder)
    checkpoint, rejected = newest_valid(folder.checkpoints)
    if checkpoint is None:
        raise CheckpointError(
            "there is no checkpoint that verifies, so nothing can be resumed",
            where=str(folder.checkpoints),
            why="; ".join(r.reason for r in rejected) or "none was finished",
            do="start a new run in another folder",
        )
    return checkpoint, [f"passed over {r.path.name}: {r.reason}" for r in rejected]


def _check_same(plan: Plan, stored: Plan, folder: RunFolder) -> None:
    """A resume may change limits, but not what is trained nor how it is laid out in checkpoints."""
    new, old = _identity(plan), _identity(stored)
    differ = [key for key in new if new[key] != old.get(key)]
    if differ:
        raise UsageError(
            "this is not the plan that the run was started with",
            where=str(folder.plan),
            why="; ".join(f"{key}: {old.get(key)} → {new[key]}" for key in differ),
            do=f"start a new run, or change only {', '.join(_MAY_CHANGE)}",
        )


def _identity(plan: Plan) -> dict[str, Any]:
    job = {k: v for k, v in plain(plan.job).items() if k not in _MAY_CHANGE}
    return {
        **{f"job.{key}": value for key, value in job.items()},
        "strategy": plain(plan.strategy),
        "model.config": plain(plan.model.config),
        "deepspeed": plain(plan.deepspeed),
    }


def _prepare_data(plan: Plan, folder: RunFolder) -> None:
    """Text is tokenized once a run; either way the data must suffice, before ranks are started."""
    from outlay.runner.data.dataset import TokenDataset

    data, job = plan.job.data, plan.job
    path = folder.dataset(plan)
    vocab = int(plan.model.config["vocab_size"])
    assert data is not None
    if data.format == "text" and not path.exists():
        from outlay.runner.data.corpus import text_files
        from outlay.runner.data.prepare import prepare

        if data.tokenizer is None and plan.model.weights is not None:
            raise UsageError(
                "text for a model with trained weights needs their tokenizer",
                do="give the tokenizer.json that belongs to the weights",
            )
        prepare(
            text_files(data.path),
            path,
            seed=job.seed,
            vocab_size=vocab if data.tokenizer is None else None,
            tokenizer_path=data.tokenizer,
        )
    dataset = TokenDataset(path, seq_len=job.seq_len, seed=job.seed)
    if dataset.info.vocab_size > vocab:
        raise UsageError(
            "the data has tokens that the model does not know",
            where=str(path),
            why=f"vocabulary {dataset.info.vocab_size}, the model's {vocab}",
            do="prepare the data with the model's tokenizer",
        )
    dataset.heldout_batches(
        0,
        dp_size=plan.strategy.dp,
        micro_batch=plan.strategy.micro_batch,
        sequences=job.eval_sequences,
    )


def rank_environment(plan: Plan) -> dict[str, str]:
    """Variables of the ranks. What DeepSpeed needs is compiled first: ranks would race for it."""
    ranks = plan.strategy.world
    cores = plan.cluster.host.cores if plan.cluster.host is not None else ranks
    threads = max(1, cores // ranks)
    environment = prepare_environment(ranks, threads, _accelerator(plan), default_extensions_dir())
    build_ops(ops_needed(plan.deepspeed), environment)
    return environment


def _attempt(
    plan: Plan,
    folder: RunFolder,
    meter: Meter,
    *,
    earlier: Attempts,
    checkpoint: Path | None,
    rejected: list[str],
    environment: dict[str, str],
    stream: TextIO | None,
    quiet: bool,
    limits: Limits,
    booking: Booking,
) -> Outcome:
    """Start the ranks and stay until they have ended."""
    folder.write_plan(plan)
    folder.write_limits(limits)
    for stale in (folder.outcome, *folder.failures()):
        stale.unlink(missing_ok=True)
    cut_torn_line(folder.events)
    attempt = Attempt(
        started_at=utc_now(),
        elapsed_s=meter.elapsed_s(),
        price_usd_per_h=meter.price_usd_per_h,
        minimum_s=meter.minimum_s,
    )
    attempts = replace(earlier, attempts=(*earlier.attempts, attempt))
    folder.write_attempts(attempts)
    follower = Follower(folder.events)
    follower.skip_to_end()
    log = EventLog(folder.events, meter.elapsed_s)
    progress = progress_for(plan.job.steps, meter, stream, quiet=quiet)
    supervisor = Supervisor(
        plan,
        folder,
        meter=meter,
        log=log,
        attempts=attempts,
        progress=progress,
        follower=follower,
        seen=_seen(checkpoint),
        booking=booking,
    )
    try:
        supervisor.beat()  # the shortest bill is due from now on, in the ledger, too
        log.write(
            "start",
            ranks=plan.strategy.world,
            strategy=plan.strategy.label(),
            checkpoint=None if checkpoint is None else str(checkpoint),
            spent_s=meter.spent().wall_s,
            limit_s=meter.limit_s,
            energy_source=None if meter.energy is None else meter.energy.source,
            pue=limits.used_pue()[1],
            carbon_source=limits.carbon_source,
        )
        for message in rejected:
            log.write("warning", message=message)
        with Signals() as signals, _start(plan, folder, meter, checkpoint, environment) as ranks:
            supervisor.watch(ranks, signals)
            ranks.close()
            return supervisor.conclude(ranks)
    finally:
        progress.close()
        log.close()


def _seen(checkpoint: Path | None) -> Seen:
    """What is known before the first event: where a resumed run stands."""
    if checkpoint is None:
        return Seen()
    step = int(checkpoint.name.rpartition("-")[2])
    return Seen(step=step, saved_step=step, checkpoint=str(checkpoint))


def _start(
    plan: Plan,
    folder: RunFolder,
    meter: Meter,
    checkpoint: Path | None,
    environment: dict[str, str],
) -> Ranks:
    return Ranks(
        plan.strategy.world,
        folder.root.absolute(),
        arguments=[] if checkpoint is None else ["--checkpoint", str(checkpoint.absolute())],
        environment={
            **environment,
            STARTED: repr(meter.started_s),
            EARLIER: json.dumps(plain(meter.earlier)),
            ENERGY_BASE: json.dumps(getattr(meter.energy, "base_j", None)),
        },
        log=folder.log,
    )

"""`outlay calibrate --measure`: real steps of small models over a grid, on the present accelerator.

Prints measured against predicted, writes a CSV with the columns of `outlay estimate --cases` and the cluster
with its measured rates beside it, and appends each run to this user's own measurements.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from outlay.planner.cases import COLUMNS_IN
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate, software_for
from outlay.planner.own_runs import append
from outlay.planner.planning import make_plan
from outlay.planner.rules import Context, broken
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.files import to_yaml, write_text
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, OutlayError, UsageError

WIDTHS = {"cpu": ((128, 4), (320, 6)), "gpu": ((1024, 8), (2048, 16))}
"""(hidden, layers) of the grid's models: a step takes tens of milliseconds to seconds on either kind."""
LENGTHS = {"cpu": (128, 512), "gpu": (1024, 4096)}
MICRO_BATCHES = (1, 4)
STAGES = (0, 2, 3)
VOCAB = 4096
HEAD = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    spec: ModelSpec
    config: dict[str, Any]
    job: Job
    strategy: Strategy


def _config(hidden: int, layers: int, length: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": 8 * hidden // 3 // 64 * 64, "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD, "max_position_embeddings": length,
    }  # fmt: skip


def cells(cluster: Cluster) -> Iterator[Cell]:
    """The grid: model × sequence × micro-batch × stage × checkpointing, what the runner allows of it."""
    kind = "cpu" if cluster.kind == "cpu" else "gpu"
    precision = "fp32" if kind == "cpu" else "bf16"
    stages = STAGES if cluster.ranks > 1 else (0,)
    for hidden, layers in WIDTHS[kind]:
        for length in LENGTHS[kind]:
            config = _config(hidden, layers, length)
            spec = spec_from_config(config, name=f"llama-{hidden}x{layers}", source="calibrate")
            for micro in MICRO_BATCHES:
                job = Job(
                    model=spec.name, seq_len=length, global_batch=2 * micro * cluster.ranks, steps=1,
                    precision=precision,  # type: ignore[arg-type]
                )  # fmt: skip
                for zero in stages:
                    for word in ("none", "full"):
                        strategy = Strategy(
                            zero=zero, dp=cluster.ranks, micro_batch=micro, grad_accum=2,
                            activation_checkpointing=word,  # type: ignore[arg-type]
                        )  # fmt: skip
                        context = Context(spec=spec, job=job, cluster=cluster)
                        if not broken(strategy, context):
                            yield Cell(spec=spec, config=config, job=job, strategy=strategy)


def spread(found: list[Cell], most: int) -> list[Cell]:
    """`most` of them, evenly over the grid, so that a short measurement sees every axis."""
    if len(found) <= most:
        return found
    stride = next(s for s in range(len(found) * 618 // 1000, 0, -1) if _coprime(s, len(found)))
    return [found[i * stride % len(found)] for i in range(most)]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def plan_of(cell: Cell, cluster: Cluster) -> Plan:
    """The plan that runs this cell; NotFeasible where it does not fit."""
    fixed = {
        name: int(getattr(Candidates.of([cell.strategy]), name)[0])
        for name in ("zero", "dp", "pp", "micro_batch", "grad_accum", "activation_checkpointing")
    }
    return make_plan(cell.spec, cell.config, cell.job, cluster, fixed=fixed)


def measure_grid(*, steps: int, most: int, out: Path, keep: bool) -> None:
    """Measure, print, write. `keep` = write the files and append to own measurements."""
    from outlay.planner.probe import probe
    from outlay.runner.commands.probe import with_rates
    from outlay.runner.measure import TimedStrategy, time_strategies
    from outlay.runner.pool import RankPool

    cluster = with_rates(probe())
    chosen, plans = [], []
    for cell in spread(list(cells(cluster)), most):
        try:
            plans.append(plan_of(cell, cluster))
            chosen.append(cell)
        except NotFeasible as error:
            click.echo(f"left out: {cell.spec.name} {cell.strategy.label()}: {error}", err=True)
    if not plans:
        raise UsageError("no run of the grid fits on this machine")
    threads = max(1, (cluster.host.cores if cluster.host else 1) // cluster.ranks)
    click.echo(f"{len(plans)} runs of {steps} steps, twice each", err=True)
    with RankPool(cluster.ranks, threads_per_rank=threads) as pool:
        timed = time_strategies(plans, pool=pool, steps=steps, repeats=2)
    rows, errors = [], []
    for number, (cell, timing) in enumerate(zip(chosen, timed, strict=True)):
        if isinstance(timing, OutlayError) or not isinstance(timing, TimedStrategy):
            click.echo(f"failed: {cell.spec.name} {cell.strategy.label()}: {timing}", err=True)
            continue
        found = evaluate(cell.spec, cell.job, cluster, Candidates.of([cell.strategy]), own=False)
        assert found.step is not None, "the cluster's rates were measured"
        predicted_s = float(found.step.time_s[0])
        errors.append(predicted_s / timing.step_s - 1)
        click.echo(
            f"{cell.spec.name:<14} seq {cell.job.seq_len:<5} {cell.strategy.label():<28} "
            f"measured {timing.step_s * 1e3:7.1f} ms, predicted {predicted_s * 1e3:7.1f} ms ({errors[-1]:+.0%})"
        )
        rows.append(_row(cell, cluster, number, timing.step_s, steps))
        if keep:
            append(
                spec=cell.spec, job=cell.job, cluster=cluster, strategy=cell.strategy,
                software=software_for(cluster).family, measured_s=timing.step_s, predicted_s=predicted_s,
                name=rows[-1]["id"], measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )  # fmt: skip
    if not rows:
        raise UsageError("every run of the grid failed", why="the reasons are above")
    typical = statistics.median(map(abs, errors))
    click.echo(f"median error {typical:.1%}, bias {statistics.median(errors):+.1%}")
    if keep:
        _write(out, rows, cluster)


def _row(
    cell: Cell, cluster: Cluster, number: int, measured_s: float, steps: int
) -> dict[str, Any]:
    """The run as a case, measured."""
    block, s, job = cell.spec.blocks[0], cell.strategy, cell.job
    now = datetime.now(UTC)
    source = f"own-{now:%Y%m%d-%H%M}"
    values = {
        "id": f"{source}-{number:03d}", "source": source, "model": cell.spec.name, "arch": "llama",
        "layers": cell.spec.layers, "hidden": cell.spec.hidden, "heads": block.attention.heads,
        "kv_heads": block.attention.kv_heads, "ffn": block.mlp.ffn, "vocab": cell.spec.vocab,
        "seq_len": job.seq_len, "gpu": cluster.accelerator.name, "gpus": cluster.ranks,
        "gpus_per_node": cluster.ranks_per_node, "interconnect": cluster.intra.kind,
        "framework": "deepspeed", "precision": job.precision, "zero": s.zero, "tp": s.tp, "pp": s.pp,
        "dp": s.dp, "micro_batch": s.micro_batch, "global_batch": s.global_batch,
        "activation_checkpointing": s.activation_checkpointing, "optimizer": job.optimizer.name,
        "attention": job.attention, "oom": 0, "measured_step_s": f"{measured_s:.6g}",
        "notes": f"measured {now:%Y-%m-%d}; median of 2 repeats of {steps} steps",
    }  # fmt: skip
    return dict.fromkeys(COLUMNS_IN, "") | values


def _write(out: Path, rows: list[dict[str, Any]], cluster: Cluster) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS_IN, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out, buffer.getvalue())
    beside = out.with_suffix(".cluster.yaml")
    write_text(beside, to_yaml(cluster))
    click.echo(f"wrote {out} ({len(rows)} runs) and {beside}", err=True)

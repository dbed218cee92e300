"""Every strategy of the demo's search, really run on this machine: was the right one chosen?

    python -m benchmarks.grid [--steps 20] [--repeats 3] [--out FILE.csv]

Times each strategy in interleaved repeats in the same living ranks, measures the peak memory of each
in ranks of its own, and prints: how far the chosen strategy is from the fastest, and the errors of
memory and step time. Writes the measurements as CSV with the columns of `outlay estimate --cases`,
and the cluster with its measured rates beside it as YAML.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from outlay.planner.cases import COLUMNS_IN
from outlay.planner.planning import make_plan
from outlay.planner.search import SearchResult, search
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.files import to_yaml, write_text
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError
from outlay.profiles.units import GIB, MIB

MEASURED = Path(__file__).parent.parent / "profiles" / "measurements"


def measured_cluster(ranks: int | None = None) -> Cluster:
    """This machine with its rates."""
    from outlay.planner.probe import probe
    from outlay.runner.commands.probe import with_rates

    return with_rates(probe(ranks=ranks))


def demo_question(cluster: Cluster) -> tuple[ModelSpec, dict[str, Any], Job]:
    """The demo's model and job."""
    from outlay.runner.commands.demo import CONFIG, _job

    spec = spec_from_config(CONFIG, name="demo-llama-6.5m", source="demo")
    job = _job(Path(), cluster, 1.0, 1.0, 0)
    return spec, CONFIG, dataclasses.replace(job, data=None, budget=())


def plans_of(
    result: SearchResult, spec: ModelSpec, config: dict[str, Any], job: Job, cluster: Cluster
) -> list[Plan]:
    """One plan for each legal strategy, best predicted first."""
    from outlay.runner.measure import with_strategy

    base = make_plan(spec, config, job, cluster)
    return [
        with_strategy(base, **dataclasses.asdict(result.estimates.candidates.strategy(int(i))))
        for i in result.order
    ]


def row_of(
    plan: Plan, spec: ModelSpec, cluster: Cluster, number: int, source: str
) -> dict[str, Any]:
    """Configuration columns of a measurement."""
    block, s, job = spec.blocks[0], plan.strategy, plan.job
    values = {
        "id": f"{source}-{number:03d}", "source": source, "model": spec.name, "arch": "llama",
        "n_params": plan.model.parameters, "layers": spec.layers, "hidden": spec.hidden,
        "heads": block.attention.heads, "kv_heads": block.attention.kv_heads, "ffn": block.mlp.ffn,
        "vocab": spec.vocab, "seq_len": job.seq_len, "gpu": cluster.accelerator.name,
        "gpus": cluster.ranks, "gpus_per_node": cluster.ranks_per_node, "interconnect": cluster.intra.kind,
        "framework": "deepspeed", "precision": job.precision, "zero": s.zero, "tp": s.tp, "pp": s.pp,
        "dp": s.dp, "micro_batch": s.micro_batch, "global_batch": s.global_batch,
        "activation_checkpointing": s.activation_checkpointing, "optimizer": job.optimizer.name,
        "attention": job.attention, "memory_kind": "host_growth", "oom": 0,
    }  # fmt: skip
    return dict.fromkeys(COLUMNS_IN, "") | values


def measure_memory(plans: Sequence[Plan]) -> list[list[int]]:
    """Peak growth by rank of each plan; empty where it failed."""
    from outlay.runner.memory_probe import run_memory_probe

    found = []
    for i, plan in enumerate(plans):
        try:
            readings = run_memory_probe(plan)
        except OutlayError as error:
            click.echo(f"memory of {plan.strategy.label()}: {error}", err=True)
            found.append([])
            continue
        found.append([r.growth_bytes for r in readings])
        peak = max(found[-1]) / MIB
        click.echo(f"memory {i + 1}/{len(plans)} {plan.strategy.label()}: {peak:.0f} MiB", err=True)
    return found


@dataclasses.dataclass(frozen=True)
class Score:
    """What the grid shows."""

    chosen: str
    chosen_s: float
    fastest: str
    fastest_s: float
    time_errors: list[float]
    memory_errors: list[float]

    def text(self) -> str:
        def line(name: str, errors: list[float]) -> str:
            sizes = sorted(abs(e) for e in errors)
            return (
                f"{name}: {len(errors)} strategies, median error {statistics.median(sizes):.1%}, "
                f"worst {sizes[-1]:.1%}, bias {statistics.median(errors):+.1%}"
            )

        return "\n".join([
            f"chosen   {self.chosen}: {self.chosen_s * 1e3:.0f} ms",
            f"fastest  {self.fastest}: {self.fastest_s * 1e3:.0f} ms",
            f"the chosen one takes {self.chosen_s / self.fastest_s - 1:+.1%}",
            line("step time", self.time_errors),
            line("memory   ", self.memory_errors),
        ])  # fmt: skip


def score(spec: ModelSpec, job: Job, cluster: Cluster, rows: Sequence[dict[str, Any]]) -> Score:
    """Predict the rows anew (the figures may have been fitted since) and compare."""
    result = search(spec, job, cluster)
    e = result.estimates
    assert e.step is not None
    index = {e.candidates.strategy(i).label(): i for i in range(len(e))}
    keyed = {label_of(row): row for row in rows}
    times, memories = [], []
    for label, row in keyed.items():
        i = index[label]
        if row["measured_step_s"]:
            times.append(float(e.step.time_s[i]) / float(row["measured_step_s"]) - 1)
        if row["measured_memory_gib"]:
            memories.append(
                float(e.memory.allocated[i]) / GIB / float(row["measured_memory_gib"]) - 1
            )
    timed = {k: float(r["measured_step_s"]) for k, r in keyed.items() if r["measured_step_s"]}
    fastest = min(timed, key=lambda k: timed[k])
    chosen = result.best.label()
    return Score(chosen, timed[chosen], fastest, timed[fastest], times, memories)


def label_of(row: dict[str, Any]) -> str:
    from outlay.planner.spec.strategy import Strategy

    dp, micro = int(row["dp"]), int(row["micro_batch"])
    return Strategy(
        zero=int(row["zero"]), dp=dp, tp=int(row["tp"]), pp=int(row["pp"]), micro_batch=micro,
        grad_accum=int(row["global_batch"]) // (dp * micro),
        activation_checkpointing=row["activation_checkpointing"],
    ).label()  # fmt: skip


def read_measured(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@click.command()
@click.option("--steps", default=20, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--out", type=Path, help="CSV to write (default: profiles/measurements/cpu-grid.csv)."
)
@click.option("--only-score", is_flag=True, help="Score what was measured before; run nothing.")
@click.option("--no-memory", is_flag=True)
def main(steps: int, repeats: int, out: Path | None, only_score: bool, no_memory: bool) -> None:
    """The grid of the demo."""
    from outlay.planner.hardware import read_cluster
    from outlay.runner.measure import TimedStrategy, time_strategies
    from outlay.runner.pool import RankPool

    out = out or MEASURED / "cpu-grid.csv"
    cluster_file = out.with_suffix(".cluster.yaml")
    if only_score:
        cluster = read_cluster(cluster_file)
        spec, _, job = demo_question(cluster)
        click.echo(score(spec, job, cluster, read_measured(out)).text())
        return
    cluster = measured_cluster()
    spec, config, job = demo_question(cluster)
    plans = plans_of(search(spec, job, cluster), spec, config, job, cluster)
    click.echo(f"{len(plans)} strategies x {repeats} repeats x {steps} steps", err=True)
    threads = max(1, (cluster.host.cores if cluster.host else 1) // cluster.ranks)
    started = time.monotonic()
    with RankPool(cluster.ranks, threads_per_rank=threads) as pool:
        timed = time_strategies(
            plans, pool=pool, steps=steps, repeats=repeats,
            progress=lambda i, r, s: click.echo(
                f"{time.monotonic() - started:6.0f} s  repeat {r + 1}  {plans[i].strategy.label()}: {s * 1e3:.0f} ms",
                err=True,
            ),
        )  # fmt: skip
    memory: list[list[int]] = [[] for _ in plans] if no_memory else measure_memory(plans)
    rows = []
    for number, (plan, timing, growth) in enumerate(zip(plans, timed, memory, strict=True)):
        row = row_of(plan, spec, cluster, number, "outlay-cpu-grid")
        row["measured_memory_gib"] = f"{max(growth) / GIB:.4f}" if growth else ""
        notes = [f"measured {datetime.now(UTC).date()}"]
        if cluster.host:
            notes[0] += f" on {cluster.host.cores} cores of {cluster.host.cpu_model}"
        if isinstance(timing, TimedStrategy):
            row["measured_step_s"] = f"{timing.step_s:.4f}"
            repeated = " ".join(f"{s:.4f}" for s in timing.repeats_s)
            notes.append(f"medians of {steps} steps in {repeats} interleaved repeats: {repeated} s")
        else:
            notes.append(str(timing)[:300])
        if growth:
            by_rank = " ".join(f"{g / GIB:.4f}" for g in growth)
            notes.append(f"memory by rank: {by_rank} GiB")
        row["notes"] = "; ".join(notes)
        rows.append(row)
    with tempfile.SpooledTemporaryFile(mode="w+", newline="") as buffer:
        writer = csv.DictWriter(buffer, COLUMNS_IN, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        buffer.seek(0)
        write_text(out, buffer.read())
    write_text(cluster_file, to_yaml(cluster))
    click.echo(score(spec, job, cluster, rows).text())


if __name__ == "__main__":
    main()

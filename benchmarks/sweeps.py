"""Six jobs, each with many strategies really run on this machine: how much of the best is kept?

    python -m benchmarks.sweeps [--only 1 --only 4] [--most 14] [--steps 6] [--repeats 2] [--out FILE.csv]

For each job the search ranks every strategy; those timed are the chosen one and an even sample of the
rest, in interleaved repeats in the same living ranks. `kept` = fastest measured / chosen measured step
time; the bar is 95 % for each job. Rows are appended to the file, so the jobs can be run in pieces.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.grid import measured_cluster, plans_of
from outlay.planner.search import search
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Job
from outlay.planner.spec.plan import Plan

COLUMNS = ("job", "strategy", "predicted_s", "measured_s", "chosen", "measured_at")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One question: a shape, a sequence length, a batch."""

    name: str
    config: dict[str, Any]
    seq_len: int
    global_batch: int


def _llama(hidden: int, layers: int, vocab: int, *, heads: int = 4) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 32 * 32, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _gpt2(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "vocab_size": vocab, "n_embd": hidden, "n_layer": layers, "n_head": 4,
        "n_positions": 1024,
    }  # fmt: skip


SWEEPS = (
    Sweep(name="llama 3M, 128 x 8", config=_llama(192, 4, 4096), seq_len=128, global_batch=8),
    Sweep(name="llama 3M, 512 x 4", config=_llama(192, 4, 4096), seq_len=512, global_batch=4),
    Sweep(
        name="deep llama, 12 layers, 128 x 4",
        config=_llama(128, 12, 2048),
        seq_len=128,
        global_batch=4,
    ),
    Sweep(
        name="wide vocabulary, 256 x 4", config=_llama(128, 2, 32000), seq_len=256, global_batch=4
    ),
    Sweep(name="gpt2 4M, 256 x 8", config=_gpt2(256, 4, 4096), seq_len=256, global_batch=8),
    Sweep(name="llama 10M, 128 x 16", config=_llama(320, 6, 8192), seq_len=128, global_batch=16),
)


def sampled(plans: list[Plan], most: int) -> list[Plan]:
    """The chosen one and an even sample of the rest, in predicted order."""
    if len(plans) <= most:
        return plans
    step = (len(plans) - 1) / (most - 1)
    return [plans[round(i * step)] for i in range(most)]


def run_sweep(
    sweep: Sweep, cluster: Cluster, *, most: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows of COLUMNS for one job; a strategy that fails has an empty measurement."""
    from outlay.runner.measure import TimedStrategy, time_strategies
    from outlay.runner.pool import RankPool

    spec = spec_from_config(sweep.config, name="sweep", source="benchmarks/sweeps.py")
    job = Job(
        model="sweep",
        seq_len=sweep.seq_len,
        global_batch=sweep.global_batch,
        steps=100,
        precision="fp32",
    )
    plans = sampled(plans_of(search(spec, job, cluster), spec, sweep.config, job, cluster), most)
    threads = max(1, (cluster.host.cores if cluster.host else 1) // cluster.ranks)
    with RankPool(cluster.ranks, threads_per_rank=threads) as pool:
        timed = time_strategies(plans, pool=pool, steps=steps, repeats=repeats)
    predicted = search(spec, job, cluster).estimates
    assert predicted.step is not None
    by_label = {
        predicted.candidates.strategy(i).label(): float(predicted.step.time_s[i])
        for i in range(len(predicted))
    }
    return [
        {
            "job": sweep.name, "strategy": plan.strategy.label(),
            "predicted_s": f"{by_label[plan.strategy.label()]:.4f}",
            "measured_s": f"{t.step_s:.4f}" if isinstance(t, TimedStrategy) else "",
            "chosen": int(number == 0), "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        for number, (plan, t) in enumerate(zip(plans, timed, strict=True))
    ]  # fmt: skip


def kept(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """(share of the best throughput that the chosen strategy keeps, the fastest strategy)."""
    timed = {r["strategy"]: float(r["measured_s"]) for r in rows if r["measured_s"]}
    chosen = next(r["strategy"] for r in rows if int(r["chosen"]))
    fastest = min(timed, key=lambda k: timed[k])
    return timed[fastest] / timed[chosen], fastest


@click.command()
@click.option("--only", type=click.IntRange(1, len(SWEEPS)), multiple=True, help="Of 1 to 6.")
@click.option("--most", default=14, show_default=True, help="Strategies a job.")
@click.option("--steps", default=6, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--out", type=Path, help="CSV that rows are appended to.")
def main(only: tuple[int, ...], most: int, steps: int, repeats: int, out: Path | None) -> None:
    """Run the sweeps and print what the chosen strategy keeps."""
    cluster = measured_cluster()
    for number in only or range(1, len(SWEEPS) + 1):
        sweep = SWEEPS[number - 1]
        started = time.monotonic()
        rows = run_sweep(sweep, cluster, most=most, steps=steps, repeats=repeats)
        share, fastest = kept(rows)
        click.echo(
            f"{number} {sweep.name}: {len(rows)} strategies, chosen {rows[0]['strategy']} keeps {share:.1%} "
            f"of {fastest} ({time.monotonic() - started:.0f} s)"
        )
        if out is not None:
            new = not out.exists()
            with out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()

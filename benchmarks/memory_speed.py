"""Candidates a second on one core that the estimate gets through: memory with its verdict, and both
memory and time.

python -m benchmarks.memory_speed
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import click  # noqa: E402

from outlay.planner.estimate.candidates import Candidates  # noqa: E402
from outlay.planner.estimate.estimator import evaluate, evaluate_memory  # noqa: E402
from outlay.planner.hardware import resolve_hardware  # noqa: E402
from outlay.planner.spec.families import resolve_model  # noqa: E402
from outlay.planner.spec.job import Job  # noqa: E402


def rate(work: Callable[[Candidates], object], grid: Candidates) -> float:
    """Candidates a second of processor time, the best of three passes."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        work(grid)
        best = min(best, time.process_time() - start)
    return len(grid) / best


def main() -> None:
    """Print both rates for a 70B dense model over a grid in which no two candidates are alike."""
    spec = resolve_model("llama-3-70b")[0]
    cluster = resolve_hardware("h100-sxm:1024", inter_node_gbps=3200)
    job = Job(model=spec.name, seq_len=4096, global_batch=1024, steps=1, precision="bf16")
    grid = Candidates.grid(
        zero=[0, 1, 2, 3], dp=[1, 2, 4, 8, 16, 32, 64, 128], tp=[1, 2, 4, 8], pp=[1, 2, 4, 8],
        micro_batch=list(range(1, 33)), activation_checkpointing=[0, 1, 2], grad_accum=[1, 8, 16],
        sequence_parallel=[0, 1], loss=[0, 1, 2],
    )  # fmt: skip
    memory = rate(lambda c: evaluate_memory(spec, job, cluster, c), grid)
    both = rate(lambda c: evaluate(spec, job, cluster, c, own=False), grid)
    click.echo(f"{len(grid)} distinct candidates, {spec.name}")
    click.echo(f"memory and its verdict: {memory / 1e6:.2f} million a second")
    click.echo(f"memory and time:        {both / 1e6:.2f} million a second")


if __name__ == "__main__":
    main()

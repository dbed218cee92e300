"""Candidates a second on one core that the memory estimate gets through.

python -m benchmarks.memory_speed
"""

from __future__ import annotations

import time

import click

from outlay.planner.estimate.buckets import reduce_buckets
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.efficiency import efficiency_for
from outlay.planner.estimate.memory import estimate_memory
from outlay.planner.estimate.software import DEEPSPEED
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.profiles.loader import accelerator

CHUNK = 4096
"""Candidates a pass: the arrays of one pass stay in the cache."""


def main() -> None:
    """Print the rate, the best of three passes over the same grid."""
    spec = resolve_model("llama-3-8b")[0]
    job = Job(model=spec.name, seq_len=4096, global_batch=1024, steps=1, precision="bf16")
    figures = efficiency_for(accelerator("h100-sxm"))
    grid = Candidates.grid(
        zero=[0, 1, 2, 3], dp=[1, 2, 4, 8, 16, 32, 64, 128], tp=[1, 2, 4, 8], pp=[1, 2, 4, 8],
        micro_batch=list(range(1, 33)), activation_checkpointing=[0, 1, 2],
        sequence_parallel=[0, 1], loss=[0, 1, 2],
    )  # fmt: skip
    chunks = [grid.take(slice(i, i + CHUNK)) for i in range(0, len(grid), CHUNK)]  # type: ignore[arg-type]
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for c in chunks:
            bucket = reduce_buckets(spec, c)
            estimate_memory(spec, job, c, bucket=bucket, figures=figures, software=DEEPSPEED)
        best = min(best, time.process_time() - start)
    click.echo(
        f"{len(grid)} candidates in {best:.3f} s: {len(grid) / best / 1e6:.2f} million a second"
    )


if __name__ == "__main__":
    main()

"""How long the searches take, whole processes: `python -m benchmarks.search_speed`.

Bars: `size` for Llama-3-70B on 15T tokens over the whole catalog, up to 16,384 accelerators, 3 s and
500 MB; `plan` for 405B on 1,024 H100, 1.5 s; the core a million candidates a second.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time

import click

SIZE = ("size", "--model", "llama-3-70b", "--tokens", "15T", "--seq-len", "8192")
PLAN = (
    "plan", "--model", "llama-3.1-405b", "--hardware", "h100-sxm:1024", "--inter-node-gbps", "3200",
    "--tokens", "15T", "--seq-len", "8192", "--global-batch", "2048",
)  # fmt: skip
COMMANDS = {
    "size, 70B, 15T tokens (runner)": SIZE,
    "size, 70B, 15T tokens (deepspeed)": (*SIZE, "--for", "deepspeed"),
    "size, 70B, 15T tokens (megatron)": (*SIZE, "--for", "megatron"),
    "size, no model, 5,000 USD in 14 days": ("size", "--budget", "5000usd", "--deadline", "14d"),
    "plan, 405B on 1,024 H100 (deepspeed)": (*PLAN, "--for", "deepspeed"),
    "plan, 405B on 1,024 H100 (megatron)": (*PLAN, "--for", "megatron"),
}
_CHILD = """
import json, resource, sys, time
start = time.perf_counter()
sys.argv = ["outlay", *json.loads(sys.argv[1])]
from outlay.runner.cli import cli
code = 0
try:
    cli(standalone_mode=False)
except Exception as error:
    code = str(error)
heavy = sorted({"torch", "pandas", "deepspeed", "transformers"} & set(sys.modules))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "rss_mb": usage.ru_maxrss / 1024, "heavy": heavy}), file=sys.stderr)
"""


def once(args: tuple[str, ...]) -> tuple[float, dict[str, object]]:
    """(seconds of the whole process, what it says of itself)."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(args)], cwd=folder, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return time.perf_counter() - start, json.loads(done.stderr.splitlines()[-1])


def core_rate() -> tuple[float, float]:
    """Candidates a second: memory and time of all; memory of all and time of those that fit (the search)."""
    import numpy as np

    from outlay.planner.estimate.estimator import evaluate, evaluate_memory, with_step
    from outlay.planner.estimate.interval import TIGHT_RISK
    from outlay.planner.hardware import resolve_hardware
    from outlay.planner.search import candidates_for
    from outlay.planner.space import TARGETS
    from outlay.planner.spec.families import resolve_model
    from outlay.planner.spec.job import Job

    spec, _ = resolve_model("llama-3.1-405b")
    cluster = resolve_hardware("h100-sxm:1024", inter_node_gbps=3200)
    job = Job(model="x", seq_len=8192, global_batch=2048, steps=1000, precision="bf16")
    c, _ = candidates_for(spec, job, cluster, {}, target=TARGETS["deepspeed"])
    many = c.take(np.resize(np.arange(len(c)), 1_000_000))
    evaluate(spec, job, cluster, many)
    start = time.perf_counter()
    evaluate(spec, job, cluster, many)
    both = len(many) / (time.perf_counter() - start)
    start = time.perf_counter()
    fits = evaluate_memory(spec, job, cluster, many)
    with_step(spec, job, cluster, fits.take(fits.risk <= TIGHT_RISK))
    return both, len(many) / (time.perf_counter() - start)


@click.command()
@click.option("--repeats", default=3, show_default=True)
def main(repeats: int) -> None:
    """Median of whole processes; the largest memory; the core's rate."""
    for name, args in COMMANDS.items():
        runs = [once(args) for _ in range(repeats)]
        said = runs[-1][1]
        seconds = statistics.median(s for s, _ in runs)
        click.echo(
            f"{name:40s} {seconds:5.2f} s  {said['rss_mb']:4.0f} MB  exit {said['code']}  "
            f"heavy imports: {said['heavy'] or 'none'}"
        )
    both, searched = core_rate()
    click.echo(
        f"core: {both / 1e6:.2f} M candidates a second, memory and time of all; "
        f"{searched / 1e6:.2f} M as the search does it, memory before time"
    )


if __name__ == "__main__":
    main()

"""Is it worth ending the learning rate within the money? Annealed against cut, at the same spend.

    python -m benchmarks.anneal --out DIR --seed 0 [--seed 1 …] [--budget 100s]

The demo's model and text, a schedule three times as long as the budget holds, and `outlay run` with
`--when-over anneal` and with `--when-over cut`; prints the held-out loss of both. Each run is done
once: called again with the same --out, only what is missing is run.

Both are real runs under the same real budget: what annealing itself costs, or a slower machine, is in the
result. Their numbers of steps are printed, for they may differ by what else the machine does; small
batches give each some hundred steps, so that a few more or fewer decide nothing.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

POLICIES = ("anneal", "cut")
TOO_LONG = 3.0
"""Steps of the schedule over those that the plan expects within the budget."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2))
@click.option("--budget", default="100s", show_default=True)
@click.option("--global-batch", default=4, show_default=True, help="Sequences a step.")
def main(out: Path, seeds: tuple[int, ...], budget: str, global_batch: int) -> None:
    """Annealed within the money against cut at the same spend."""
    for seed in seeds:
        plan = long_plan(out, seed=seed, budget=budget, global_batch=global_batch)
        found = {policy: _run(out, plan, seed, policy) for policy in POLICIES}
        texts = [
            f"{policy} {o['heldout_loss']:.4f} ({o['steps']} steps, {o['wall_s']:.1f} s)"
            for policy, o in found.items()
        ]
        click.echo(f"seed {seed}: " + ", ".join(texts))


def long_plan(
    out: Path, *, seed: int, budget: str, global_batch: int, config: dict[str, Any] | None = None
) -> Path:
    """The demo's job with three times the steps that are expected within the budget.

    `config`: of another model than the demo's, with its vocabulary.
    """
    from outlay.planner.planning import make_plan
    from outlay.planner.probe import probe
    from outlay.planner.spec.families import resolve_model
    from outlay.planner.spec.files import to_json, to_yaml, write_text
    from outlay.planner.spec.job import Budget, Data, Job, Optimizer, Schedule
    from outlay.runner.commands import demo
    from outlay.runner.commands.probe import with_rates
    from outlay.runner.data.corpus import standard_library_files
    from outlay.runner.data.prepare import prepare

    path = out / f"plan-{seed}.yaml"
    if path.exists():
        return path
    out.mkdir(parents=True, exist_ok=True)
    data = out / f"data-{seed}"
    if not data.exists():
        prepare(
            standard_library_files(), data, seed=seed, vocab_size=demo.VOCAB_SIZE,
            max_bytes=demo.CORPUS_BYTES,
        )  # fmt: skip
    file = out / "model" / "config.json"
    write_text(file, to_json(config or demo.CONFIG))
    spec, loaded = resolve_model(str(file))
    cluster = with_rates(probe(folder=out, price_usd_per_h=demo.DEFAULT_PRICE))
    limit = Budget.parse(budget)
    job = Job(
        model="demo-llama-6.5m" if config is None else str(file),
        seq_len=demo.SEQ_LEN,
        global_batch=global_batch,
        steps=100,
        precision="fp32",
        optimizer=Optimizer(lr=demo.LEARNING_RATE),
        schedule=Schedule(warmup_steps=10, final_fraction=0.1),
        data=Data(path=str(data.resolve()), format="tokens"),
        budget=(limit,),
        seed=seed,
    )
    step_s = float(make_plan(spec, loaded, job, cluster).estimate["step"]["time_s"])
    steps = int(TOO_LONG * limit.amount * 3600 / step_s)
    plan = make_plan(spec, loaded, dataclasses.replace(job, steps=steps), cluster)
    write_text(path, to_yaml(plan))
    return path


def _run(out: Path, plan: Path, seed: int, policy: str) -> dict[str, Any]:
    folder = out / f"run-{seed}-{policy}"
    if not (folder / "outcome.json").exists():
        command = [sys.executable, "-m", "outlay.runner", "run", str(plan), "--dir", str(folder)]
        command += ["--when-over", policy, "--yes", "--quiet", "--ledger", str(out / "ledger")]
        code = subprocess.run(command, check=False).returncode
        if code != 4:
            raise click.ClickException(f"{folder} ended with exit code {code}")
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return outcome


if __name__ == "__main__":
    main()

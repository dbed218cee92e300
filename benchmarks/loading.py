"""Memory of loading a model into DeepSpeed ranks on CPU against the estimate's `phases.load`.

    python -m benchmarks.loading [--only 0,3]

A model of 45 M parameters in sharded safetensors is loaded by two gloo ranks under each ZeRO stage,
tensor parallel and offload to NVMe; nothing is stepped. Measured: each rank's growth of resident memory
(`runner/memory_probe.py`), beside what the whole model takes in one process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.memory_deepspeed import cpu_ranks
from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate_memory
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.phases import PHASES
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.units import MIB

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 640, "intermediate_size": 1760,
    "num_hidden_layers": 7, "num_attention_heads": 10, "num_key_value_heads": 10,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
SHARD_BYTES = 40_000_000
_NVME: dict[str, Any] = {"offload_optimizer": "nvme", "offload_param": "nvme"}
CASES = (
    Strategy(zero=0, dp=2),
    Strategy(zero=1, dp=2),
    Strategy(zero=2, dp=2),
    Strategy(zero=3, dp=2),
    Strategy(zero=1, tp=2),
    Strategy(zero=3, tp=2),
    Strategy(zero=3, dp=2, **_NVME),
)
IN_CI = (1, 3, 4)


def plan_of(strategy: Strategy, weights: Path | None) -> Plan:
    """The plan that the ranks load."""
    spec, cluster = spec_from_config(CONFIG, name="llama-45m", source="benchmark"), cpu_ranks()
    job = Job(
        model="llama-45m", seq_len=64, global_batch=strategy.global_batch, steps=1, precision="fp32",
        optimizer=Optimizer(lr=1e-4),
    )  # fmt: skip
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="benchmark", job=job, cluster=cluster,
        strategy=strategy, estimate={}, considered=1, feasible=1,
        deepspeed=deepspeed_config(job, strategy, spec, cluster),
        model=ModelSource(
            name="llama-45m", source="benchmark", parameters=parameter_counts(spec).total,
            config=CONFIG, weights=None if weights is None else str(weights),
        ),
    )  # fmt: skip


def write_weights(folder: Path) -> None:
    """Random weights as sharded safetensors, written by one process."""
    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    plan = plan_of(CASES[0], None)
    model = build_model(plan.model, precision="fp32", attention="sdpa", seed=1)
    export_safetensors(model.state_dict(), plan, folder, None, shard_bytes=SHARD_BYTES)


def predicted_bytes(plan: Plan) -> float:
    """`phases.load` of the heaviest rank, less what a process is before it loads."""
    spec = spec_from_config(plan.model.config, name=plan.model.name, source="benchmark")
    found = evaluate_memory(spec, plan.job, plan.cluster, Candidates.of([plan.strategy])).memory
    load = found.each_phase[PHASES.index("load")][0]
    return float(load - found.parts["runtime"][0])


def row_of(
    strategy: Strategy, weights: Path, measure: Callable[[Plan], list[int]]
) -> dict[str, Any]:
    """Load one case, and predict it."""
    plan = plan_of(strategy, weights)
    if strategy.offload_optimizer == "nvme":
        from outlay.runner.swap import make_room, placed

        make_room(plan, weights.parent)
        plan = placed(plan, weights.parent)
    expected, growth = predicted_bytes(plan), measure(plan)
    return {
        "strategy": strategy.label(), "predicted_bytes": round(expected), "measured_bytes": max(growth),
        "error": expected / max(growth) - 1, "whole_bytes": 4 * plan.model.parameters,
    }  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['strategy']:<36} {row['predicted_bytes'] / MIB:7.1f} MiB predicted, "
        f"{row['measured_bytes'] / MIB:7.1f} measured {row['error']:+7.1%}, "
        f"{row['measured_bytes'] / row['whole_bytes']:.2f} of the whole model"
    )


@click.command()
@click.option("--only", help="Numbers of cases, like 0,3 (default: all).")
def main(only: str | None) -> None:
    """Predicted and measured memory of loading."""
    from benchmarks.memory_deepspeed import in_living_ranks
    from outlay.runner.host import build_ops, default_extensions_dir, prepare_environment

    numbers = range(len(CASES)) if only is None else [int(n) for n in only.split(",")]
    if any(CASES[n].offload_optimizer == "nvme" for n in numbers):
        environment = prepare_environment(2, 1, "cpu", default_extensions_dir())
        build_ops(("AsyncIOBuilder",), environment)
    with tempfile.TemporaryDirectory() as folder, in_living_ranks(steps=0) as measure:
        weights = Path(folder) / "weights"
        write_weights(weights)
        for number in numbers:
            click.echo(line_of(row_of(CASES[number], weights, measure)))


if __name__ == "__main__":
    main()

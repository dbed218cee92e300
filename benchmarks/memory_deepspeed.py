"""Memory of real DeepSpeed ranks on CPU against the estimate: 28 configurations unlike the demo's.

    python -m benchmarks.memory_deepspeed [--only 0-7] [--separate] [--out FILE.csv]
    python -m benchmarks.memory_deepspeed --score profiles/measurements/cpu-memory.csv

Two families (llama-like and gpt2-like), ZeRO 0 to 3, offload, pipeline, micro-batch, sequence length,
checkpointing, attention. Each is built and stepped in two living gloo ranks and its growth of resident
memory is read (`runner/memory_probe.py`); `--separate` starts ranks of its own for each. Prints
predicted and measured bytes, writes them as CSV, and ends with median, worst and bias. `--score`
predicts anew what such a file measured; nothing is run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate_memory
from outlay.planner.estimate.memory import PHASES
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.cluster import Cluster, Link
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.files import write_text
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import OutlayError, UsageError
from outlay.profiles.loader import Accelerator
from outlay.profiles.units import MIB

RANKS = 2
STEPS = 3
COLUMNS = (
    "number", "model", "parameters", "seq_len", "attention", "strategy", "predicted_bytes",
    "measured_bytes", "measured_by_rank_bytes", "error", "peak_phase",
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-13m": {
        "model_type": "llama", "vocab_size": 6000, "hidden_size": 320, "intermediate_size": 880,
        "num_hidden_layers": 7, "num_attention_heads": 5, "num_key_value_heads": 5,
        "max_position_embeddings": 1024, "tie_word_embeddings": False,
    },
    "gpt2-14m": {
        "model_type": "gpt2", "vocab_size": 10000, "n_embd": 384, "n_layer": 6, "n_head": 6,
        "n_positions": 1024, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
_L, _G = "llama-13m", "gpt2-14m"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    model: str
    seq_len: int
    strategy: Strategy
    attention: str = "sdpa"


def _case(model: str, seq_len: int, attention: str = "sdpa", **strategy: Any) -> Case:
    return Case(
        model=model,
        seq_len=seq_len,
        attention=attention,
        strategy=Strategy(**{"dp": RANKS, **strategy}),
    )


_FULL: dict[str, Any] = {"activation_checkpointing": "full"}
_PIPE: dict[str, Any] = {"dp": 1, "pp": 2}
_AWAY: dict[str, Any] = {"offload_optimizer": "cpu"}
CASES = (
    _case(_L, 384, zero=0, micro_batch=2),
    _case(_L, 128, zero=1, micro_batch=6, grad_accum=2),
    _case(_L, 512, zero=2, micro_batch=1, grad_accum=2),
    _case(_L, 192, zero=3, micro_batch=4),
    _case(_L, 512, zero=0, micro_batch=4, **_FULL),
    _case(_L, 256, zero=1, micro_batch=8, **_FULL),
    _case(_L, 320, zero=2, micro_batch=3, grad_accum=2, **_FULL),
    _case(_L, 512, zero=3, micro_batch=2, **_FULL),
    _case(_L, 192, zero=0, micro_batch=4, grad_accum=4, **_PIPE),
    _case(_L, 384, zero=1, micro_batch=2, grad_accum=3, **_PIPE, **_FULL),
    _case(_L, 512, "eager", zero=1, micro_batch=1),
    _case(_L, 256, "eager", zero=3, micro_batch=2, grad_accum=2),
    _case(_G, 256, zero=0, micro_batch=3, grad_accum=2),
    _case(_G, 512, zero=1, micro_batch=2),
    _case(_G, 128, zero=2, micro_batch=8),
    _case(_G, 384, zero=3, micro_batch=2, grad_accum=2),
    _case(_G, 256, zero=0, micro_batch=6, **_FULL),
    _case(_G, 640, zero=1, micro_batch=2, grad_accum=2, **_FULL),
    _case(_G, 192, zero=3, micro_batch=5, **_FULL),
    _case(_G, 256, zero=0, micro_batch=2, grad_accum=4, **_PIPE),
    _case(_G, 512, zero=1, micro_batch=2, grad_accum=2, **_PIPE, **_FULL),
    _case(_G, 384, "eager", zero=2, micro_batch=2),
    _case(_G, 64, zero=3, micro_batch=1),
    _case(_L, 64, zero=1, micro_batch=2, grad_accum=2),
    _case(_L, 256, zero=1, micro_batch=3, **_AWAY),
    _case(_G, 192, zero=2, micro_batch=2, grad_accum=2, **_AWAY, **_FULL),
    _case(_G, 128, zero=3, micro_batch=4, **_AWAY),
    _case(_L, 384, zero=3, micro_batch=2, offload_param="cpu", **_AWAY, **_FULL),
)
MEASURED = Path(__file__).parent.parent / "profiles" / "measurements" / "cpu-memory.csv"
"""All cases as measured once on the machine that docs/log.md names."""
IN_CI = (3, 9, 11, 14, 16, 24)
"""Of the cases, six that differ in family, stage, pipeline, attention, checkpointing and offload."""


def cpu_ranks() -> Cluster:
    """Two CPU processes: memory needs no rates of this machine."""
    return Cluster(
        accelerator=Accelerator(name="cpu", title="CPU", vendor="any", kind="cpu"),
        nodes=1,
        ranks_per_node=RANKS,
        usable_bytes=8 << 30,
        intra=Link(kind="shm", bytes_per_s=1e9, latency_s=1e-4, source="not used for memory"),
        inter=None,
        source="benchmark",
    )


def plan_of(case: Case) -> Plan:
    """The plan that the ranks build."""
    config, cluster, s = MODELS[case.model], cpu_ranks(), case.strategy
    spec = spec_from_config(config, name=case.model, source="benchmark")
    job = Job(
        model=case.model, seq_len=case.seq_len, global_batch=s.global_batch, steps=STEPS,
        precision="fp32", optimizer=Optimizer(lr=1e-4), attention=case.attention,  # type: ignore[arg-type]
    )  # fmt: skip
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="benchmark", job=job, cluster=cluster, strategy=s,
        model=ModelSource(
            name=case.model, source="benchmark", parameters=parameter_counts(spec).total, config=config
        ),
        estimate={}, deepspeed=deepspeed_config(job, s, spec, cluster), considered=1, feasible=1,
    )  # fmt: skip


def predicted(plan: Plan) -> tuple[float, str]:
    """(bytes of the heaviest rank as `host_growth` shows them, phase of the peak)."""
    spec = spec_from_config(plan.model.config, name=plan.model.name, source="benchmark")
    found = evaluate_memory(
        spec, plan.job, plan.cluster, Candidates.of([plan.strategy]), step_only=True
    ).memory
    return float(found.in_kind("host_growth")[0]), PHASES[int(found.peak_phase[0])]


@contextlib.contextmanager
def in_living_ranks(steps: int = STEPS) -> Iterator[Callable[[Plan], list[int]]]:
    """Growth by rank of a plan, measured in one pool of ranks whose malloc gives memory back."""
    from outlay.runner.host import build_ops, prepare_environment
    from outlay.runner.memory_probe import MALLOC
    from outlay.runner.pool import RankPool

    pool = RankPool(RANKS)
    before = {name: os.environ.get(name) for name in MALLOC}
    build_ops(("CPUAdamBuilder",), prepare_environment(RANKS, 1, "cpu", pool.extensions_dir))
    os.environ.update(MALLOC)
    try:
        pool.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def measure(plan: Plan) -> list[int]:
        readings = pool.call("outlay.runner.memory_probe:reading_in_rank", plan, steps)
        return [r.growth_bytes for r in readings]

    with contextlib.closing(pool):
        yield measure


def in_ranks_of_its_own(plan: Plan) -> list[int]:
    """The same in fresh processes, as `outlay run` measures it: slower, nothing left over from before."""
    from outlay.runner.memory_probe import run_memory_probe

    return [r.growth_bytes for r in run_memory_probe(plan, STEPS)]


def row_of(number: int, measure: Callable[[Plan], list[int]]) -> dict[str, Any]:
    """Measure and predict one case."""
    case = CASES[number]
    plan = plan_of(case)
    expected, phase = predicted(plan)
    growth = measure(plan)
    return {
        "number": number, "model": case.model, "parameters": plan.model.parameters,
        "seq_len": case.seq_len, "attention": case.attention, "strategy": case.strategy.label(),
        "predicted_bytes": round(expected), "measured_bytes": max(growth),
        "measured_by_rank_bytes": " ".join(map(str, growth)),
        "error": round(expected / max(growth) - 1, 4), "peak_phase": phase,
    }  # fmt: skip


def scored(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `--out` wrote, predicted by the present formulas."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(rows[0]) != set(COLUMNS):
        raise UsageError(f"{path} was not written by this benchmark", do="give a file of --out")
    growth = {int(r["number"]): [int(b) for b in r["measured_by_rank_bytes"].split()] for r in rows}
    return [row_of(number, lambda plan, g=g: g) for number, g in growth.items()]  # type: ignore[misc]


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['number']:>2} {row['model']:<9} s{row['seq_len']:<4}{row['attention']:<6}"
        f"{row['strategy']:<34} {row['predicted_bytes'] / MIB:7.1f} MiB predicted, "
        f"{row['measured_bytes'] / MIB:7.1f} measured {row['error']:+7.1%}  {row['peak_phase']}"
    )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Median, worst and bias of the relative error."""
    errors = [float(row["error"]) for row in rows]
    sizes = sorted(abs(e) for e in errors)
    return (
        f"{len(rows)} configurations: median error {statistics.median(sizes):.1%}, "
        f"worst {sizes[-1]:.1%}, bias {statistics.median(errors):+.1%}"
    )


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return list(range(len(CASES)))
    try:
        parts = [part.split("-") for part in text.split(",")]
        found = [n for p in parts for n in range(int(p[0]), int(p[-1]) + 1)]
    except ValueError:
        raise UsageError(f"--only {text!r} is no list of numbers", do="like 0-7,12") from None
    if not found or min(found) < 0 or max(found) >= len(CASES):
        raise UsageError(f"--only {text}: the cases are 0 to {len(CASES) - 1}")
    return found


def _written(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@click.command()
@click.option("--only", help="Numbers of cases, like 0-7,12 (default: all).")
@click.option("--separate", is_flag=True, help="Ranks of its own for each case.")
@click.option("--out", type=Path, help="CSV to write.")
@click.option("--score", type=click.Path(exists=True, path_type=Path), help="Score a CSV of --out.")
def main(only: str | None, separate: bool, out: Path | None, score: Path | None) -> None:
    """Predicted and measured memory of DeepSpeed ranks on CPU."""
    try:
        if score is not None:
            rows = scored(score)
            click.echo("\n".join([*map(line_of, rows), summary(rows)]))
            return
        numbers = _numbers(only)
        rows = []
        with contextlib.nullcontext(in_ranks_of_its_own) if separate else in_living_ranks() as how:
            for number in numbers:
                rows.append(row_of(number, how))
                click.echo(line_of(rows[-1]))
                if out is not None:  # each time: an interrupted run keeps what it has
                    write_text(out, _written(rows))
        click.echo(summary(rows))
    except OutlayError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()

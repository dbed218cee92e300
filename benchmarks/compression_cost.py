"""Memory and step time that compression adds, measured in two CPU ranks, against the estimate.

    python -m benchmarks.compression_cost [--only 0,3] [--memory | --time [--cpu]] [--out FILE.csv]
    python -m benchmarks.compression_cost --only 2,3,5,8 --one-process

Each case is built and stepped beside the same job without compression: the growth of resident memory by
`runner/memory_probe.py`, and the ratio of their step times, taken in turn (plain, compressed, plain) in the same
living ranks, so that a slow machine slows both; with `--cpu` in CPU seconds of a rank, which other work disturbs
less, and in which waiting for the other rank does not count. `--one-process`: the ratio alone, in CPU seconds of
plain torch in this process; it has no data parallelism in it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.memory_deepspeed import MODELS, Case, in_living_ranks, plan_of, predicted
from outlay.planner.spec.compress import Compression, Distill, Pruning, Qat
from outlay.planner.spec.files import write_text
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.units import MIB
from outlay.runner.pool import RankPool

MODEL = "llama-13m"
TEACHER: dict[str, Any] = {**MODELS[MODEL], "num_hidden_layers": 12}
RATES = Path(__file__).parent.parent / "profiles" / "measurements" / "cpu-grid.cluster.yaml"
TIMED = 5
COLUMNS = (
    "number", "what", "strategy", "plain_bytes", "measured_bytes", "predicted_bytes", "error",
    "plain_error", "measured_ratio", "predicted_ratio", "ratio_error",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Costly:
    """One compression under one strategy."""

    what: str
    compress: Callable[[str], Compression]
    """Given the teacher's folder."""
    strategy: Strategy
    seq_len: int = 256


def _strategy(**how: Any) -> Strategy:
    return Strategy(**{"dp": 2, "micro_batch": 2, "grad_accum": 1, **how})


def _qat(**how: Any) -> Callable[[str], Compression]:
    return lambda _: Compression(qat=Qat(**how))


def _distill(**how: Any) -> Callable[[str], Compression]:
    return lambda teacher: Compression(distill=Distill(teacher=teacher, **how))


def _masks(_: str) -> Compression:
    return Compression(pruning=Pruning(sparsity=0.5))


CASES = (
    Costly(what="masks", compress=_masks, strategy=_strategy(zero=0)),
    Costly(what="masks", compress=_masks, strategy=_strategy(zero=2)),
    Costly(what="int8 QAT", compress=_qat(bits=8, activation_bits=8), strategy=_strategy(zero=0)),
    Costly(what="int4 QAT", compress=_qat(bits=4, group=16), strategy=_strategy(zero=2)),
    Costly(what="int4 QAT", compress=_qat(bits=4, group=16), strategy=_strategy(zero=3)),
    Costly(what="teacher", compress=_distill(), strategy=_strategy(zero=0)),
    Costly(what="teacher, split", compress=_distill(teacher_zero=3), strategy=_strategy(zero=2)),
    Costly(what="teacher, hidden", compress=_distill(hidden=1.0), strategy=_strategy(zero=0)),
    Costly(what="cached logits", compress=_distill(top_k=64), strategy=_strategy(zero=0)),
)  # fmt: skip


def step_s_in_rank(plan: Any, cpu: bool) -> float:
    """Median seconds of a step, after two that warm up; `cpu`: that this process computed."""
    import torch

    from outlay.runner.engine import Engine

    clock = time.process_time if cpu else time.monotonic
    engine = Engine.build(plan)
    try:
        if engine.distiller is not None:
            engine.distiller.pretend()
        shape = (plan.strategy.micro_batch, plan.job.seq_len)
        ids = torch.randint(int(plan.model.config["vocab_size"]), shape)
        times = []
        for i in range(TIMED + 2):
            if engine.compressor is not None:
                engine.compressor.before_step(TIMED, TIMED + 2)
            began_s = clock()
            engine.train_step([ids] * plan.strategy.grad_accum)
            if i >= 2:
                times.append(clock() - began_s)
        return statistics.median(times)
    finally:
        engine.close()


def write_teacher(folder: Path) -> None:
    """An untrained model of more blocks, as a folder of transformers."""
    from outlay.planner.spec.plan import ModelSource
    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    plan = plan_of(Case(model=MODEL, seq_len=64, strategy=_strategy(zero=0)))
    source = ModelSource(name="teacher", source="benchmark", parameters=0, config=TEACHER)
    model = build_model(source, precision="fp32", attention="sdpa", seed=1)
    export_safetensors(model.state_dict(), dataclasses.replace(plan, model=source), folder)


def plans_of(case: Costly, teacher: str) -> tuple[Any, Any]:
    """(plain, compressed)."""
    plain = plan_of(Case(model=MODEL, seq_len=case.seq_len, strategy=case.strategy))
    job = dataclasses.replace(plain.job, compress=case.compress(teacher))
    return plain, dataclasses.replace(plain, job=job)


def cpu_s_of_a_step(plan: Any) -> float:
    """Median CPU seconds of a step of plain torch in this process, after one that warms up."""
    import types

    import torch

    from outlay.runner.compress import qat
    from outlay.runner.compress.distill import Distiller
    from outlay.runner.compress.training import prepare
    from outlay.runner.model import Filler, causal_lm_loss, skeleton

    model = skeleton(plan.model, precision="fp32", attention="sdpa")
    prepare(model, plan)
    Filler(model, plan.model, seed=0, device=torch.device("cpu")).fill("")
    if plan.job.compress is not None and plan.job.compress.qat is not None:
        qat.switch(model, True)

    class Plain:
        """As much of an engine as the distiller asks for."""

        module = model

        def __call__(self, **inputs: Any) -> Any:
            return model(**inputs)

    engine: Any = types.SimpleNamespace(plan=plan, deepspeed=Plain(), device=torch.device("cpu"))
    distiller = Distiller.of(engine)
    if distiller is not None:
        distiller.pretend()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shape = (plan.strategy.micro_batch, plan.job.seq_len)
    ids = torch.randint(int(plan.model.config["vocab_size"]), shape)
    times = []
    for _ in range(4):
        began_s = time.process_time()
        if distiller is not None:
            loss = distiller.loss(ids)
        else:
            loss = causal_lm_loss(model(input_ids=ids).logits, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began_s)
    return statistics.median(times[1:])


def ratio_predicted(plain: Any, compressed: Any) -> float:
    """Of the estimated step times on the machine whose rates the measured grid goes with."""
    from outlay.planner.estimate.candidates import Candidates
    from outlay.planner.estimate.estimator import evaluate
    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.families import spec_from_config
    from outlay.planner.spec.files import parse, read_mapping

    cluster = parse(Cluster, read_mapping(RATES), path=RATES)
    spec = spec_from_config(plain.model.config, name=MODEL, source="benchmark")
    times = []
    for plan in (plain, compressed):
        found = evaluate(spec, plan.job, cluster, Candidates.of([plan.strategy]), own=False)
        assert found.step is not None
        times.append(float(found.step.time_s[0]))
    return times[1] / times[0]


def ratio_measured(plain: Any, compressed: Any, call: Callable[[Any], float]) -> float:
    """Mean of two compressed runs over the mean of the three plain ones around them."""
    times = [call(plan) for plan in (plain, compressed, plain, compressed, plain)]
    return statistics.mean(times[1::2]) / statistics.mean(times[::2])


def row_of(
    number: int,
    teacher: str,
    measure: Callable[[Any], list[int]] | None,
    call: Callable[[Any], float] | None,
) -> dict[str, Any]:
    """Measure and predict one case; `measure` null: time alone; `call` null: memory alone."""
    case = CASES[number]
    plain, compressed = plans_of(case, teacher)
    row = dict.fromkeys(COLUMNS) | {
        "number": number, "what": case.what, "strategy": case.strategy.label()
    }  # fmt: skip
    if measure is not None:
        growth = [max(measure(plan)) for plan in (plain, compressed)]
        expected, _ = predicted(compressed)
        row |= {
            "plain_bytes": growth[0], "measured_bytes": growth[1], "predicted_bytes": round(expected),
            "error": round(expected / growth[1] - 1, 4),
            "plain_error": round(predicted(plain)[0] / growth[0] - 1, 4),
        }  # fmt: skip
    if call is not None:
        ratio, wanted = ratio_measured(plain, compressed, call), ratio_predicted(plain, compressed)
        row |= {
            "measured_ratio": round(ratio, 3), "predicted_ratio": round(wanted, 3),
            "ratio_error": round(wanted / ratio - 1, 4),
        }  # fmt: skip
    return row


def line_of(row: dict[str, Any]) -> str:
    """For the terminal."""
    parts = [f"{row['number']:>2} {row['what']:<16}{row['strategy']:<20}"]
    if row["measured_bytes"] is not None:
        parts.append(
            f"{row['predicted_bytes'] / MIB:7.1f} MiB predicted, {row['measured_bytes'] / MIB:7.1f} measured "
            f"{row['error']:+7.1%} (plain {row['plain_bytes'] / MIB:.1f}, {row['plain_error']:+.1%})"
        )
    if row["measured_ratio"] is not None:
        parts.append(
            f"step {row['predicted_ratio']:.2f} times predicted, {row['measured_ratio']:.2f} measured "
            f"{row['ratio_error']:+.1%}"
        )
    return " ".join(parts)


def _in_ranks(pool: RankPool, cpu: bool) -> Callable[[Any], float]:
    return lambda plan: max(pool.call("benchmarks.compression_cost:step_s_in_rank", plan, cpu))


def _in_one_process(numbers: list[int], teacher: str) -> None:
    for number in numbers:
        plain, compressed = plans_of(CASES[number], teacher)
        ratio = ratio_measured(plain, compressed, cpu_s_of_a_step)
        wanted = ratio_predicted(plain, compressed)
        click.echo(
            f"{number:>2} {CASES[number].what:<16} step {wanted:.2f} times predicted, {ratio:.2f} measured "
            f"{wanted / ratio - 1:+.1%}"
        )


@click.command()
@click.option("--only", help="Numbers of cases, like 0,3,5 (default: all).")
@click.option("--memory", is_flag=True, help="Memory alone.")
@click.option("--time", "timed", is_flag=True, help="Step time alone, in the two ranks.")
@click.option("--cpu", is_flag=True, help="That in CPU seconds.")
@click.option(
    "--one-process", is_flag=True, help="The ratio alone, in CPU seconds of this process."
)
@click.option("--out", type=Path, help="CSV to write.")
def main(
    only: str | None, memory: bool, timed: bool, cpu: bool, one_process: bool, out: Path | None
) -> None:  # fmt: skip
    """Predicted and measured cost of compressing."""
    numbers = range(len(CASES)) if only is None else [int(n) for n in only.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        teacher = Path(folder) / "teacher"
        write_teacher(teacher)
        if one_process:
            _in_one_process(list(numbers), str(teacher))
            return
        measure = None if timed else stack.enter_context(in_living_ranks())
        call = None if memory else _in_ranks(stack.enter_context(RankPool(2)), cpu)
        for number in numbers:
            rows.append(row_of(number, str(teacher), measure, call))
            click.echo(line_of(rows[-1]))
    if out is not None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(out, buffer.getvalue())


if __name__ == "__main__":
    main()

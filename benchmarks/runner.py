"""Tokens a second of `outlay run` against the loops that a person would write instead.

    python -m benchmarks.runner [--case 0 …] [--rounds N] [--block-s S] [--out FILE.csv]

Against (a) the plainest DeepSpeed loop, (b) Hugging Face's Trainer with DeepSpeed, (c) Accelerate with DeepSpeed, all
on one plan: model and first weights, data and order, DeepSpeed configuration, seed, precision, ranks, micro-batch.
`outlay run` is the command itself: supervisor, meter under a budget, ledger, events, TensorBoard, forecast. All four
live at once, each with ranks of its own, and three of them are stopped (SIGSTOP) while one works for `--block-s`
seconds; a round is one block of each, and each round begins with another. So starting is not in it, and what slows
the machine slows all. The first steps of a block are left out (the first was cut by the stop, the next ones fill
caches). Nobody saves or evaluates within the blocks. Ratios are per round, of the mean step times of its blocks; shown
is their median, with a bound by the bootstrap over rounds. Written to run on the GPUs of one machine as well
(`--precision bf16`), where it has not been tried.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from outlay.planner.spec.strategy import Strategy
from outlay.runner.processes import RENDEZVOUS, SUPERVISOR

NAMES = ("outlay", "deepspeed", "trainer", "accelerate")
LEFT_OUT = 2
"""Steps at the beginning of a block."""
LEAST_STEPS = 5
"""Timed in a block; fewer say too little."""
WARM_UP = 12
"""Steps of each before the first block: outlay saves and evaluates for the first time after three."""
STEPS = 1_000_000
BAR = 0.98
COLUMNS = (
    "model", "zero", "ranks", "precision", "against", "rounds", "ratio", "lower", "step_ms",
    "their_step_ms",
)  # fmt: skip
DRAWS = 10_000
PERCENTILE = 2.5
"""The lower end of a two-sided 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama and its batch."""

    hidden: int
    layers: int
    seq_len: int
    micro_batch: int


SHORT = Size(hidden=192, layers=4, seq_len=128, micro_batch=2)
LONG = Size(hidden=384, layers=6, seq_len=256, micro_batch=2)
VOCAB = 4096
CASES: tuple[tuple[str, Size, int], ...] = (
    *(("short", SHORT, zero) for zero in range(4)),
    ("long", LONG, 1),
    ("long", LONG, 3),
)
"""(name, size, ZeRO stage)."""


def config_of(size: Size) -> dict[str, Any]:
    """Of transformers."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": size.hidden,
        "intermediate_size": 8 * size.hidden // 3,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.hidden // 64,
        "max_position_embeddings": size.seq_len,
        "tie_word_embeddings": False,
    }


def plan_of(size: Size, zero: int, ranks: int, precision: str, data: Path) -> Any:
    """A plan for the accelerators of this machine; nothing is searched or estimated."""
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.estimate.parameters import parameter_counts
    from outlay.planner.probe import probe
    from outlay.planner.spec.families import spec_from_config
    from outlay.planner.spec.job import Budget, Data, Job, Optimizer, Schedule
    from outlay.planner.spec.plan import ModelSource, Plan

    cluster = probe(ranks=ranks, price_usd_per_h=0.1)
    config, strategy = config_of(size), Strategy(dp=ranks, zero=zero, micro_batch=size.micro_batch)
    spec = spec_from_config(config, name="llama", source="benchmark")
    job = Job(
        model="llama",
        seq_len=size.seq_len,
        global_batch=strategy.global_batch,
        steps=STEPS,
        precision=precision,  # type: ignore[arg-type]
        optimizer=Optimizer(lr=1e-4),
        schedule=Schedule(name="constant"),
        data=Data(path=str(data.resolve()), format="tokens"),
        budget=(Budget.parse("1000usd"),),
        save_every=STEPS,
        seed=0,
    )
    return Plan(
        created="2026-01-01T00:00:00Z",
        outlay_version="benchmark",
        job=job,
        cluster=cluster,
        strategy=strategy,
        model=ModelSource(
            name="llama",
            source="benchmark",
            parameters=parameter_counts(spec).total,
            config=config,
        ),
        estimate={},
        deepspeed=deepspeed_config(job, strategy, spec, cluster),
        considered=1,
        feasible=1,
    )


class Contender:
    """One of the four: its processes, which are stopped but in their blocks, and the clock of its steps."""

    def __init__(self, name: str, plan: Path, ranks: int, folder: Path) -> None:
        self.name, self._folder = name, folder
        folder.mkdir()
        self._file = folder / ("run/events.jsonl" if name == "outlay" else "stamps")
        self._position = 0
        self.losses: list[float] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped: list[psutil.Process] = []
        if name == "outlay":
            self._start(
                ["outlay.runner", "run", str(plan), "--dir", str(folder / "run"), "--yes"],
                {"OUTLAY_LEDGER": str(folder / "ledger"), "OUTLAY_MEASUREMENTS": "off"},
            )
            return
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            own |= {"LOCAL_WORLD_SIZE": str(ranks), "OUTLAY_BENCHMARK_DIR": str(folder / "hf")}
            own[RENDEZVOUS] = f"file://{folder}/store"
            self._start(["benchmarks.runner_loops", name, str(plan), str(self._file)], own)

    def _start(self, arguments: list[str], environment: dict[str, str]) -> None:
        with (self._folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    env={**os.environ, **environment, SUPERVISOR: str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _all(self) -> list[psutil.Process]:
        """Its processes and what they started; parents first."""
        found = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one = psutil.Process(process.pid)
                found += [one, *one.children(recursive=True)]
        return found

    def stop(self) -> None:
        """Let none of its processes run."""
        self._stopped = self._all()
        for process in self._stopped:
            process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        for process in self._stopped:
            process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL ends stopped processes, too."""
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for own in self._processes:
            own.wait()

    def new_steps(self) -> list[float]:
        """When steps have ended since the last look, seconds of a clock of its own."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as handle:
            handle.seek(self._position)
            block = handle.read()
        whole = block[: block.rfind(b"\n") + 1]
        self._position += len(whole)
        read = self._event if self.name == "outlay" else self._stamp
        return [at_s for line in whole.splitlines() if (at_s := read(line)) is not None]

    def _event(self, line: bytes) -> float | None:
        event = json.loads(line)
        if event["kind"] != "step":
            return None
        self.losses.append(float(event["data"]["loss"]))
        return float(event["elapsed_s"])

    def _stamp(self, line: bytes) -> float | None:
        kind, value = line.decode().split()
        if kind == "loss":
            self.losses.append(float(value))
            return None
        return float(value)

    def warm_up(self, timeout_s: float) -> None:
        """Wait for its first steps, then stop it."""
        end_s, steps = time.monotonic() + timeout_s, 0
        while (steps := steps + len(self.new_steps())) < WARM_UP:
            if time.monotonic() > end_s or any(p.poll() is not None for p in self._processes):
                tail = (self._folder / "log").read_text(errors="replace")[-3000:]
                raise click.ClickException(f"{self.name} made {steps} steps of {WARM_UP}:\n{tail}")
            time.sleep(0.2)
        self.stop()

    def block(self, seconds: float) -> float:
        """Seconds a step, of the steps within a block; longer where too few have ended by then."""
        self.new_steps()
        times: list[float] = []
        until_s = time.monotonic() + 10 * seconds
        self.go_on()
        while len(times) <= LEFT_OUT + LEAST_STEPS and time.monotonic() < until_s:
            time.sleep(seconds)
            times += self.new_steps()
        self.stop()
        times = (times + self.new_steps())[LEFT_OUT:]
        if len(times) <= LEAST_STEPS:
            few = f"{len(times)} steps of {self.name} in {10 * seconds:g} s"
            raise click.ClickException(f"{few}: give a longer --block-s")
        return (times[-1] - times[0]) / (len(times) - 1)


@contextlib.contextmanager
def living(plan: Path, ranks: int, folder: Path, timeout_s: float) -> Iterator[list[Contender]]:
    """All four, started one after the other, and stopped."""
    started: list[Contender] = []
    try:
        for name in NAMES:
            started.append(Contender(name, plan, ranks, folder / name))
            started[-1].warm_up(timeout_s)
        yield started
    finally:
        for contender in started:
            contender.kill()


def check_same(contenders: Sequence[Contender]) -> str:
    """The first losses, which must agree: else they do not train the same."""
    from benchmarks.runner_loops import LOSSES

    first = {c.name: c.losses[:LOSSES] for c in contenders}
    apart = max(abs(a - b) for x in first.values() for a, b in zip(first["outlay"], x, strict=True))
    if apart > 1e-3:
        raise click.ClickException(f"the four do not train the same: {first}")
    return f"losses of the first {LOSSES} steps within {apart:.1e} of each other"


def lower_bound(ratios: Sequence[float]) -> tuple[float, float]:
    """(median over the rounds, its lower 95 % bound by resampling rounds).

    The median, because whatever else runs on a machine hits some blocks hard and most not at all.
    """
    given = np.array(ratios)
    made = np.random.Generator(np.random.PCG64(0))
    draws = np.median(made.choice(given, size=(DRAWS, len(given))), axis=1)
    return float(np.median(given)), float(np.percentile(draws, PERCENTILE))


def rounds_of(contenders: list[Contender], rounds: int, block_s: float) -> dict[str, list[float]]:
    """Seconds a step by contender and round; every round begins with another."""
    took: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            took[contender.name].append(contender.block(block_s))
    return took


def measure(
    name: str, plan: Any, folder: Path, *, rounds: int, block_s: float, timeout_s: float
) -> list[dict[str, Any]]:
    """One case: a row for each that outlay is compared with."""
    from outlay.planner.spec.files import to_yaml, write_text
    from outlay.runner.launch import rank_environment

    path, strategy = folder / "plan.yaml", plan.strategy
    write_text(path, to_yaml(plan))
    os.environ.update(rank_environment(plan))
    with living(path, strategy.world, folder, timeout_s) as contenders:
        click.echo(f"{name}, ZeRO-{strategy.zero}: {check_same(contenders)}", err=True)
        took = rounds_of(contenders, rounds, block_s)
    shown = {other: [round(1e3 * s, 2) for s in times] for other, times in took.items()}
    click.echo(f"ms a step by round: {json.dumps(shown)}", err=True)
    rows = []
    for other in NAMES[1:]:
        ratio, lower = lower_bound(
            [b / a for a, b in zip(took["outlay"], took[other], strict=True)]
        )
        rows.append(
            {
                "model": name, "zero": strategy.zero, "ranks": strategy.world, "precision": plan.job.precision,
                "against": other, "rounds": rounds, "ratio": round(ratio, 4), "lower": round(lower, 4),
                "step_ms": round(1e3 * statistics.median(took["outlay"]), 2),
                "their_step_ms": round(1e3 * statistics.median(took[other]), 2),
            }
        )  # fmt: skip
        click.echo(line_of(rows[-1]))
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One comparison, for a person."""
    missed = "" if row["lower"] >= BAR else f": below {BAR}"
    return (
        f"{row['model']}, ZeRO-{row['zero']}, {row['ranks']} ranks, {row['precision']}: "
        f"outlay {row['step_ms']:.1f} ms a step, {row['against']} {row['their_step_ms']:.1f}; "
        f"tokens/s {row['ratio']:.4f}, at least {row['lower']:.4f} "
        f"(95 %, {row['rounds']} rounds){missed}"
    )


@click.command()
@click.option("--case", "cases", type=click.IntRange(0, len(CASES) - 1), multiple=True)
@click.option("--rounds", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--block-s", type=click.FloatRange(min=0.5), default=3.0, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32")
@click.option("--start-timeout-s", default=240.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="CSV, appended to.")
def main(
    cases: tuple[int, ...],
    rounds: int,
    block_s: float,
    ranks: int,
    precision: str,
    start_timeout_s: float,
    out: Path | None,
) -> None:
    """Compare in living ranks, block by block."""
    from outlay.runner.data.corpus import standard_library_files
    from outlay.runner.data.prepare import prepare

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that nothing stopped is left behind
    with tempfile.TemporaryDirectory(prefix="outlay-speed-") as name:
        root = Path(name)
        prepare(
            standard_library_files(), root / "data", seed=0, vocab_size=VOCAB, max_bytes=4 << 20
        )
        for number in cases or range(len(CASES)):
            title, size, zero = CASES[number]
            folder = root / f"case-{number}"
            folder.mkdir()
            plan = plan_of(size, zero, ranks, precision, root / "data")
            how = {"rounds": rounds, "block_s": block_s, "timeout_s": start_timeout_s}
            rows = measure(title, plan, folder, **how)
            if out is not None:
                append(out, rows)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """To a CSV file, with a header where it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

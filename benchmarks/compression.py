"""What each compression costs in quality: one small model on real text, by seed. Writes docs/compression.md.

    python -m benchmarks.compression [--seeds 0,1,2] [--steps 1200] [--more 300] [--work FOLDER] [--write]

A Llama of 0.4 M parameters on the source of Python's standard library, trained by the engine of `outlay run` in one
living rank. From the trained dense model, each with as many steps more on the same text: dense (the control, from
which all that is compressed after training is made); with int8 and int4 quantization-aware training; pruned by
schedule; with half of its MLP's channels gone. A small student, alone and taught by the dense model. Each is
exported and read by what `outlay eval` reads with, on the same held-out files.

About six minutes of one core a seed. Every training, every row and every timing is kept in FOLDER and not done
again, so that it can be stopped; `--parts` does some of it (`--seeds 1 --parts train,losses` in a process of its own).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from outlay.planner.spec.compress import Compression, Distill, Pruning, Qat, Shrink
from outlay.planner.spec.files import plain, to_json, write_text
from outlay.planner.spec.packing import Packing

VOCAB, SEQ_LEN, BATCH = 512, 128, 8
LR, MORE_LR = 2e-3, 1e-4
"""Peaks of the first training and of what follows it, both of a cosine to a tenth."""
CORPUS_BYTES = 8_000_000
HELDOUT_WINDOWS = 1000
PATIENCE_S = 7200.0
"""A training takes one to three minutes of a core; other work may want the core, too."""
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
STUDENT: dict[str, Any] = {
    **CONFIG, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 1,
}  # fmt: skip
GROUP = 32
TEMPERATURE, TAUGHT = 1.0, 0.5
"""Of the distillation: what both models' logits are divided by, and the teacher's part of the loss."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; figures by seed."""

    what: str
    against: str
    """The variant that it is compared with."""


DENSE, CONTROL = "dense", "dense, trained on"
ROWS = (
    Row(what=DENSE, against=DENSE),
    Row(what=CONTROL, against=DENSE),
    Row(what="int8 after training", against=CONTROL),
    Row(what="int8 QAT", against=CONTROL),
    Row(what="int4 after training", against=CONTROL),
    Row(what="int4 QAT", against="int4 after training"),
    Row(what="50 % at one stroke", against=CONTROL),
    Row(what="50 % by schedule", against="50 % at one stroke"),
    Row(what="2:4 at one stroke", against=CONTROL),
    Row(what="2:4 by schedule", against="2:4 at one stroke"),
    Row(what="half the channels", against=DENSE),
    Row(what="half the channels, trained on", against="half the channels"),
    Row(what="student alone", against=CONTROL),
    Row(what="student distilled", against="student alone"),
)
TIMED = ("half the channels", "student alone")
"""Rows whose speed may differ from dense's."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How long is trained."""

    first: int
    more: int
    student: int

    def folder(self, seed: int) -> str:
        """Of one seed's results."""
        return f"seed-{seed}-{self.first}-{self.more}-{self.student}"


def plan_for(
    config: dict[str, Any], steps: int, seed: int, compress: Compression | None = None,
    weights: Path | None = None, lr: float | None = None,
) -> Any:  # fmt: skip
    """One rank, fp32, cosine to a tenth; `weights`: the folder that it goes on from, in another order of the text."""
    from benchmarks.memory_deepspeed import cpu_ranks
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.spec.families import spec_from_config
    from outlay.planner.spec.job import Job, Optimizer, Schedule
    from outlay.planner.spec.plan import ModelSource, Plan
    from outlay.planner.spec.strategy import Strategy

    strategy = Strategy(dp=1, zero=0, micro_batch=BATCH)
    cluster = dataclasses.replace(cpu_ranks(), ranks_per_node=1)
    spec = spec_from_config(config, name="compression", source="benchmark")
    job = Job(
        model="compression", seq_len=SEQ_LEN, global_batch=BATCH, steps=steps, precision="fp32",
        optimizer=Optimizer(lr=lr or (LR if weights is None else MORE_LR)),
        schedule=Schedule(warmup_steps=min(20, steps // 10)), compress=compress,
        seed=seed + (0 if weights is None else 1000),
    )  # fmt: skip
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="benchmark", job=job, cluster=cluster,
        strategy=strategy, estimate={}, considered=1, feasible=1,
        model=ModelSource(
            name="compression", source="benchmark", parameters=0, config=config,
            weights=None if weights is None else str(weights),
        ),
        deepspeed=deepspeed_config(job, strategy, spec, cluster),
    )  # fmt: skip


def train_in_rank(plan: Any, data: str, out: str) -> dict[str, Any]:
    """The loop of `outlay run` without budget and checkpoints; exports dense weights into `out`."""
    import time

    import torch

    from outlay.runner.data.dataset import TokenDataset
    from outlay.runner.engine import Engine
    from outlay.runner.export import export_safetensors
    from outlay.runner.schedule import Decay

    job = plan.job
    dataset = TokenDataset(Path(data), seq_len=SEQ_LEN, seed=job.seed)
    decay = Decay(job.schedule, job.optimizer.lr, job.steps)
    engine = Engine.build(plan)
    try:
        began_s = time.monotonic()
        for step in range(job.steps):
            engine.set_lr(decay.rate(step))
            if engine.compressor is not None:
                engine.compressor.before_step(step, job.steps)
            batch = dataset.batch(step, 0, 0, dp_size=1, micro_batch=BATCH, grad_accum=1)
            engine.train_step([torch.from_numpy(batch)])
        took_s = time.monotonic() - began_s
        report = {} if engine.compressor is None else engine.compressor.report()
        state = engine.gather_state_dict()
        assert state is not None
        export_safetensors(state, plan, Path(out), dataset.tokenizer_path)
    finally:
        engine.close()
    return {"train_s": took_s, "zeros": report.get("zeros"), "masked": report.get("weights")}


def variants(work: Path, steps: Steps, seed: int) -> dict[str, Any]:
    """Plans by name; those that start from another's weights come later."""
    dense, control = work / slug(DENSE), work / slug(CONTROL)
    halved = {**CONFIG, "intermediate_size": CONFIG["intermediate_size"] // 2}

    def more(compress: Compression | None = None) -> Any:
        return plan_for(CONFIG, steps.more, seed, compress, weights=dense)

    def stroke(**pruning: Any) -> Any:
        """A step that takes weights away and changes no other: nothing recovers."""
        pruned = Compression(pruning=Pruning(schedule="one_shot", **pruning))
        return plan_for(CONFIG, 1, seed, pruned, weights=control, lr=1e-12)

    taught = Distill(teacher=str(dense), temperature=TEMPERATURE, weight=TAUGHT)
    return {
        DENSE: plan_for(CONFIG, steps.first, seed),
        CONTROL: more(),
        "int8 QAT": more(Compression(qat=Qat(bits=8, activation_bits=8))),
        "int4 QAT": more(Compression(qat=Qat(bits=4, group=GROUP))),
        "50 % at one stroke": stroke(sparsity=0.5),
        "50 % by schedule": more(Compression(pruning=Pruning(sparsity=0.5))),
        "2:4 at one stroke": stroke(pattern="2:4"),
        "2:4 by schedule": more(Compression(pruning=Pruning(pattern="2:4"))),
        "half the channels, trained on": plan_for(
            halved, steps.more, seed, weights=work / slug("half the channels")
        ),
        "student alone": plan_for(STUDENT, steps.student, seed),
        "student distilled": plan_for(STUDENT, steps.student, seed, Compression(distill=taught)),
    }


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def run_seed(work: Path, data: Path, steps: Steps, seed: int) -> None:
    """All trainings of one seed, then the packings; what is there is kept."""
    from outlay.runner.compress.structured import shrink_model
    from outlay.runner.pool import RankPool

    work.mkdir(parents=True, exist_ok=True)
    pool = RankPool(1, threads_per_rank=1)
    try:
        for name, plan in variants(work, steps, seed).items():
            if name.startswith("half") and not (work / slug("half the channels")).is_dir():
                half = work / slug("half the channels")
                shrink_model(work / slug(DENSE), half, Shrink(channels=0.5), [])
            done = work / f"{slug(name)}.json"
            if done.is_file():
                continue
            out = work / slug(name)
            task = ("benchmarks.compression:train_in_rank", plan, str(data), str(out))
            said = pool.call(*task, timeout_s=PATIENCE_S)[0]
            write_text(done, to_json(said))
            click.echo(f"seed {seed}: {name} {said['train_s']:.0f} s", err=True)
    finally:
        pool.close()
    for name, source, packing in packed():
        _pack(work, name, source, packing)


def packed() -> tuple[tuple[str, str, Packing], ...]:
    """(name, trained weights, how they are stored)."""
    int8, int4 = Packing(bits=8, dynamic=True), Packing(bits=4, group=GROUP)
    return (
        ("int8 after training", CONTROL, int8),
        ("int8 QAT", "int8 QAT", int8),
        ("int4 after training", CONTROL, int4),
        ("int4 QAT", "int4 QAT", int4),
    )


def folder_of(work: Path, name: str) -> Path:
    """Where a row's model lies: packed ones beside their dense weights."""
    return work / (slug(name) + ("-packed" if name in {n for n, _, _ in packed()} else ""))


def _pack(work: Path, name: str, source: str, packing: Packing) -> None:
    """As `outlay export --quantize` does it."""
    from outlay.runner.evaluate.load import hushed
    from outlay.runner.exported.choice import uniform
    from outlay.runner.exported.source import find
    from outlay.runner.exported.write import finish, new_partial, record_of, write

    out = folder_of(work, name)
    if out.is_dir():
        return
    found = find(work / slug(source), work)
    chosen, partial = uniform(found.dense, packing), new_partial(out)
    with hushed():
        write(found, chosen, partial)
    finish(record_of(found, chosen, partial, None), partial, out)


def measure_seed(work: Path, data: Path, rows: tuple[str, ...], repeats: int) -> None:
    """Rows against what they are compared with, on the same text; with `repeats` timed in turn, against dense."""
    from outlay.runner.evaluate.load import read_folder
    from outlay.runner.evaluate.report import evaluate
    from outlay.runner.evaluate.text import held_out

    text = held_out(data, seq_len=SEQ_LEN, sequences=HELDOUT_WINDOWS)
    for row in (row for row in ROWS if row.what in rows):
        kept = result_of(work, row.what, timed=repeats > 0)
        if kept.is_file():
            continue
        names = dict.fromkeys((DENSE if repeats else row.against, row.what))
        targets = [(name, read_folder(folder_of(work, name))) for name in names]
        made = plain(evaluate(targets, text, batch=BATCH, repeats=repeats))
        found = {"model": made["models"][-1], "text": made["text"]}
        write_text(kept, to_json({**found, "difference": (made["differences"] or [None])[0]}))


def result_of(work: Path, what: str, *, timed: bool) -> Path:
    """Where a row's figures are kept."""
    return work / f"{slug(what)}-{'speed' if timed else 'loss'}.json"


def is_complete(work: Path) -> bool:
    """Whether all rows of one seed were read, and timed where they are."""
    kept = [result_of(work, row.what, timed=False) for row in ROWS]
    kept += [result_of(work, what, timed=True) for what in TIMED]
    return all(path.is_file() for path in kept)


def read_seed(work: Path) -> dict[str, Any]:
    """All rows of one seed, those that were timed with their speeds."""
    found: dict[str, Any] = {}
    for row in ROWS:
        found[row.what] = json.loads(result_of(work, row.what, timed=False).read_text())
        if row.what in TIMED:
            speed = json.loads(result_of(work, row.what, timed=True).read_text())
            found[row.what]["speed"] = speed["difference"]
    return found


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", type=click.IntRange(20), default=1200, show_default=True, help="Dense.")
@click.option(
    "--more", type=click.IntRange(20), default=300, show_default=True, help="What follows dense."
)
@click.option("--student", type=click.IntRange(20), default=600, show_default=True)
@click.option("--work", type=Path, default=Path("outlay-compression"), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
@click.option("--parts", default="train,losses,speeds", show_default=True)
@click.option("--write", is_flag=True, help="Write docs/compression.md.")
def main(
    seeds: str, steps: int, more: int, student: int, work: Path, repeats: int, parts: str, write: bool
) -> None:  # fmt: skip
    """Train, compress, export and read all variants; print the table where all of it is there."""
    from benchmarks.compression_page import page
    from outlay.runner.data.corpus import standard_library_files
    from outlay.runner.data.prepare import prepare

    data = work / "data"
    if not data.is_dir():
        files = standard_library_files()
        prepare(files, data, seed=0, vocab_size=VOCAB, max_bytes=CORPUS_BYTES)
    long = Steps(first=steps, more=more, student=student)
    folders = {seed: work / long.folder(seed) for seed in map(int, seeds.split(","))}
    for seed, folder in folders.items():
        if "train" in parts:
            run_seed(folder, data, long, seed)
        if "losses" in parts:
            measure_seed(folder, data, tuple(row.what for row in ROWS), 0)
        if "speeds" in parts:
            measure_seed(folder, data, TIMED, repeats)
    if all(is_complete(folder) for folder in folders.values()):
        made = page({seed: read_seed(folder) for seed, folder in folders.items()}, long)
        click.echo(made)
        if write:
            write_text(Path(__file__).parent.parent / "docs" / "compression.md", made)


if __name__ == "__main__":
    main()

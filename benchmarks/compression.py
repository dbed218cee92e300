"""What each compression costs in quality: one small model on real text, by seed. Writes docs/compression.md.

    python -m benchmarks.compression [--seeds 0,1,2] [--steps 200] [--work FOLDER] [--write]

A Llama of 0.4 M parameters on the source of Python's standard library, trained by the engine of `outlay run` in one
living rank: dense; with int8 and int4 quantization-aware training; pruned by schedule and at one stroke; with half of
its MLP's channels gone and trained on; a smaller student alone and distilled. Each is exported and read by what
`outlay eval` reads with, on the same held-out files. What is in FOLDER is not done again, so that it can be
stopped; about 3 minutes a seed on one core.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from outlay.planner.spec.compress import Compression, Distill, Pruning, Qat, Shrink
from outlay.planner.spec.files import plain, to_json, write_text
from outlay.planner.spec.packing import Packing

VOCAB, SEQ_LEN, BATCH, LR = 512, 128, 8, 2e-3
CORPUS_BYTES = 3_000_000
HELDOUT_WINDOWS = 300
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; figures by seed."""

    what: str
    against: str
    """The variant that it is compared with."""


ROWS = (
    Row(what="dense", against="dense"),
    Row(what="int8 after training", against="dense"),
    Row(what="int8 QAT", against="dense"),
    Row(what="int4 after training", against="dense"),
    Row(what="int4 QAT", against="int4 after training"),
    Row(what="50 % at one stroke", against="dense"),
    Row(what="50 % by schedule", against="50 % at one stroke"),
    Row(what="2:4 at one stroke", against="dense"),
    Row(what="2:4 by schedule", against="2:4 at one stroke"),
    Row(what="half the channels", against="dense"),
    Row(what="half the channels, trained on", against="half the channels"),
    Row(what="student alone", against="dense"),
    Row(what="student distilled", against="student alone"),
)


def plan_for(
    config: dict[str, Any], steps: int, seed: int, compress: Compression | None = None,
    weights: str | None = None,
) -> Any:  # fmt: skip
    """One rank, fp32, cosine to a tenth."""
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
        optimizer=Optimizer(lr=LR), schedule=Schedule(warmup_steps=min(20, steps // 10)),
        compress=compress, seed=seed,
    )  # fmt: skip
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="benchmark", job=job, cluster=cluster,
        strategy=strategy, estimate={}, considered=1, feasible=1,
        model=ModelSource(
            name="compression", source="benchmark", parameters=0, config=config, weights=weights
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


def variants(work: Path, steps: int, seed: int) -> dict[str, Any]:
    """Plans by name; those that start from another's weights come later."""
    last = (steps - 1) / steps
    stroke = {"schedule": "one_shot", "start": last}
    return {
        "dense": plan_for(CONFIG, steps, seed),
        "int8 QAT": plan_for(
            CONFIG, steps, seed, Compression(qat=Qat(bits=8, activation_bits=8, start=0.5))
        ),
        "int4 QAT": plan_for(
            CONFIG, steps, seed, Compression(qat=Qat(bits=4, group=GROUP, start=0.5))
        ),
        "50 % at one stroke": plan_for(
            CONFIG, steps, seed, Compression(pruning=Pruning(sparsity=0.5, **stroke))
        ),
        "50 % by schedule": plan_for(
            CONFIG, steps, seed, Compression(pruning=Pruning(sparsity=0.5, end=0.7))
        ),
        "2:4 at one stroke": plan_for(
            CONFIG, steps, seed, Compression(pruning=Pruning(pattern="2:4", **stroke))
        ),
        "2:4 by schedule": plan_for(
            CONFIG, steps, seed, Compression(pruning=Pruning(pattern="2:4", end=0.7))
        ),
        "half the channels, trained on": plan_for(
            {**CONFIG, "intermediate_size": CONFIG["intermediate_size"] // 2}, steps // 2, seed,
            weights=str(work / slug("half the channels")),
        ),
        "student alone": plan_for(STUDENT, steps, seed),
        "student distilled": plan_for(
            STUDENT, steps, seed,
            Compression(distill=Distill(teacher=str(work / "dense"), temperature=2.0, weight=0.5)),
        ),
    }  # fmt: skip


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def run_seed(work: Path, data: Path, steps: int, seed: int) -> None:
    """All trainings of one seed, then the packings; what is there is kept."""
    from outlay.runner.compress.structured import shrink_model
    from outlay.runner.pool import RankPool

    work.mkdir(parents=True, exist_ok=True)
    pool = RankPool(1, threads_per_rank=1)
    try:
        for name, plan in variants(work, steps, seed).items():
            if name.startswith("half") and not (work / slug("half the channels")).is_dir():
                half = work / slug("half the channels")
                shrink_model(work / "dense", half, Shrink(channels=0.5), [])
            done = work / f"{slug(name)}.json"
            if done.is_file():
                continue
            out = work / slug(name)
            said = pool.call("benchmarks.compression:train_in_rank", plan, str(data), str(out))[0]
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
        ("int8 after training", "dense", int8),
        ("int8 QAT", "int8 QAT", int8),
        ("int4 after training", "dense", int4),
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


def measure_seed(work: Path, data: Path, repeats: int) -> dict[str, Any]:
    """Every row on the same text, the speeds of the three that may differ in turn."""
    from outlay.runner.evaluate.load import read_folder
    from outlay.runner.evaluate.report import evaluate
    from outlay.runner.evaluate.text import held_out

    text = held_out(data, seq_len=SEQ_LEN, sequences=HELDOUT_WINDOWS)
    found: dict[str, Any] = {}
    for row in ROWS:
        names = dict.fromkeys((row.against, row.what))
        targets = [(name, read_folder(folder_of(work, name))) for name in names]
        timed = repeats if row.what in ("half the channels", "student alone") else 0
        made = plain(evaluate(targets, text, batch=BATCH, repeats=timed))
        found[row.what] = {"model": made["models"][-1], "text": made["text"]}
        found[row.what]["difference"] = (made["differences"] or [None])[0]
    return found


def table(seeds: dict[int, dict[str, Any]]) -> str:
    """Markdown: means over seeds, and the range of the seeds."""
    lines = [
        "| variant | held-out loss | against | difference, by seed | weights | zeros |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        each = [seed[row.what] for seed in seeds.values()]
        losses = [e["model"]["loss"]["value"] for e in each]
        shown = f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        m = each[0]["model"]
        zeros = "" if m["nonzero"] is None else f"{1 - m['nonzero'] / m['parameters']:.2%}"
        by_seed = ", ".join(
            f"{e['difference']['loss']['value']:+.4f}" for e in each if e["difference"]
        )
        against = "" if row.what == "dense" else row.against
        lines.append(
            f"| {row.what} | {shown} | {against} | {by_seed} | {m['weights_bytes']:,} B | {zeros} |"
        )
    return "\n".join(lines)


def speeds(seeds: dict[int, dict[str, Any]]) -> str:
    """Ratios of time against dense, each with its interval."""
    lines = [
        "| against dense | parameters | one window, times | batch, times |",
        "|---|---|---|---|",
    ]
    for what in ("half the channels", "student alone"):
        for seed, rows in seeds.items():
            d, m = rows[what]["difference"], rows[what]["model"]
            window, batch = (
                f"{d[k]['value']:.2f} ({d[k]['low']:.2f} to {d[k]['high']:.2f})"
                for k in ("window", "batch")
            )
            lines.append(f"| {what}, seed {seed} | {m['parameters']:,} | {window} | {batch} |")
    return "\n".join(lines)


def page(seeds: dict[int, dict[str, Any]], steps: int) -> str:
    """docs/compression.md."""
    first = next(iter(seeds.values()))["dense"]
    text, parameters = first["text"], first["model"]["parameters"]
    return (
        "# What compression costs in quality\n\n"
        "<!-- Written by `python -m benchmarks.compression --write`. -->\n\n"
        f"A Llama of {parameters:,} parameters, {steps} steps of {BATCH} × {SEQ_LEN} tokens of Python's standard "
        f"library, seeds {', '.join(map(str, seeds))}, one CPU core; losses in nats a token on "
        f"{text['windows']} held-out windows of {text['units']} {text['unit']}s. A small, short-trained model: it says "
        "which way things go and that they work, not how much a large model loses.\n\n"
        "`difference`: of the loss on the same tokens, less is better. All trainings of a seed see the same text in "
        "the same order and take as many steps; QAT begins half way; schedules end at 70 % of the steps; "
        "*at one stroke* is pruned before the last step. *trained on*: half as many steps more.\n\n"
        f"{table(seeds)}\n\n## Speed\n\n{speeds(seeds)}\n\n"
        "Measured in turn with the dense model; 90 % intervals. Zeros alone make nothing faster on a CPU, and int4 "
        "is unpacked when it is loaded: only what is really smaller is faster. What these figures "
        "did not show is in the [log](log.md).\n"
    )


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", type=click.IntRange(4), default=200, show_default=True)
@click.option("--work", type=Path, default=Path("outlay-compression"), show_default=True)
@click.option("--repeats", type=int, default=20, show_default=True)
@click.option("--write", is_flag=True, help="Write docs/compression.md.")
def main(seeds: str, steps: int, work: Path, repeats: int, write: bool) -> None:
    """Train, compress, export and read all variants; print the table."""
    from outlay.runner.data.corpus import standard_library_files
    from outlay.runner.data.prepare import prepare

    data = work / "data"
    if not data.is_dir():
        files = standard_library_files()
        prepare(files, data, seed=0, vocab_size=VOCAB, max_bytes=CORPUS_BYTES)
    found: dict[int, dict[str, Any]] = {}
    for seed in map(int, seeds.split(",")):
        folder = work / f"seed-{seed}-steps-{steps}"
        run_seed(folder, data, steps, seed)
        result = folder / "result.json"
        if not result.is_file():
            write_text(result, to_json(measure_seed(folder, data, repeats)))
        found[seed] = json.loads(result.read_text())
    made = page(found, steps)
    click.echo(made)
    if write:
        write_text(Path(__file__).parent.parent / "docs" / "compression.md", made)


if __name__ == "__main__":
    main()

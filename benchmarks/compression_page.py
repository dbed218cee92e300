"""docs/compression.md from what `benchmarks/compression.py` measured: the tables, and what they are held against."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.compression import (
    BATCH,
    CONTROL,
    DENSE,
    GROUP,
    LR,
    MORE_LR,
    ROWS,
    SEQ_LEN,
    TAUGHT,
    TEMPERATURE,
    TIMED,
    Steps,
)

Seeds = dict[int, dict[str, Any]]


def table(seeds: Seeds) -> str:
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
        by_seed = ", ".join(_difference(e["difference"]) for e in each if e["difference"])
        against = "" if row.what == DENSE else row.against
        lines.append(
            f"| {row.what} | {shown} | {against} | {by_seed} | {m['weights_bytes']:,} B | {zeros} |"
        )
    return "\n".join(lines)


def _difference(difference: dict[str, Any]) -> str:
    """With a star where the 90 % interval over documents holds 0."""
    loss = difference["loss"]
    star = "*" if loss["low"] <= 0 <= loss["high"] else ""
    return f"{loss['value']:+.4f}{star}"


def speeds(seeds: Seeds) -> str:
    """Ratios of time against dense, each with its interval."""
    lines = [
        "| against dense | parameters | one window, times | batch, times |",
        "|---|---|---|---|",
    ]
    for what in TIMED:
        for seed, rows in seeds.items():
            d, m = rows[what]["speed"], rows[what]["model"]
            window, batch = (
                f"{d[k]['value']:.2f} ({d[k]['low']:.2f} to {d[k]['high']:.2f})"
                for k in ("window", "batch")
            )
            lines.append(f"| {what}, seed {seed} | {m['parameters']:,} | {window} | {batch} |")
    return "\n".join(lines)


def _introduction(seeds: Seeds, steps: Steps) -> str:
    first = next(iter(seeds.values()))[DENSE]
    text, parameters = first["text"], first["model"]["parameters"]
    return (
        f"A Llama of {parameters:,} parameters, {steps.first:,} steps of {BATCH} × {SEQ_LEN} tokens of Python's "
        f"standard library (peak rate {LR:g}), seeds {', '.join(map(str, seeds))}, one CPU core a seed; losses in "
        f"nats a token on {text['windows']} held-out windows of {text['units']} {text['unit']}s. A small model: it "
        "says which way things go and that they work, not how much a large model loses.\n\n"
        f"All that is compressed starts from the same dense model and has {steps.more:,} steps more, on the same "
        f"text in the same order at the same low rate (peak {MORE_LR:g}), as has the control, *{CONTROL}*. What is "
        "compressed *after training* or *at one stroke* is made from the control, so both sides of a difference saw "
        "equally many tokens; only *half the channels* is cut from the dense model. Quantization-aware training "
        "rounds from its first step; pruning *by schedule* rises during 60 % of the steps and recovers in the rest. "
        f"int4 is in groups of {GROUP} and of the same size on both sides. Both students take {steps.student:,} "
        "steps of the dense model's rate on the same text; the teacher of one is the dense model (temperature "
        f"{TEMPERATURE:g}, weight {TAUGHT:g}).\n\n"
        "`difference`: of the loss on the same tokens, less is better; a star where the 90 % interval over "
        "documents holds 0.\n\n"
    )  # fmt: skip


def page(seeds: Seeds, steps: Steps) -> str:
    """docs/compression.md."""
    return (
        "# What compression costs in quality\n\n"
        "<!-- Written by `python -m benchmarks.compression --write`. -->\n\n"
        f"{_introduction(seeds, steps)}{table(seeds)}\n\n## Speed\n\n{speeds(seeds)}\n\n"
        "Measured in turn with the dense model; 90 % intervals. Zeros alone make nothing faster on a CPU, and int4 "
        "is unpacked when it is loaded: only what is really smaller is faster. How the settings were come by, and "
        "what others did not show (at the rate at which this model still learns most, int4 QAT won nothing), is in the "
        "[log](log.md).\n"
    )

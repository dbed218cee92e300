"""What an exported folder says about itself: `outlay.json` for programs, README.md for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from outlay.profiles.units import format_bytes, format_count, format_seconds, format_usd

SCHEMA_EXPORT = "outlay/export@1"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One packable or pruned matrix."""

    name: str
    weights: int
    zeros: int
    """Of the weights as exported before packing."""
    stored: str
    """dense, int8, int8-dynamic or int4:gN."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it was trained on."""

    name: str
    train_sha256: str
    train_tokens: int
    train_files: int
    tokens_seen: int
    seq_len: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """The run: how, at what cost."""

    steps: int
    global_batch: int
    precision: str
    optimizer: str
    lr: float
    strategy: str
    hardware: str
    ranks: int
    started_from: str | None
    """Weights it began with; null = random ones."""
    wall_s: float | None
    cost_usd: float | None
    energy_kwh: float | None
    energy_source: str | None
    co2e_kg: float | None
    heldout_loss: float | None
    heldout_unigram: float | None
    planned: dict[str, Any]
    """step_s, cost_usd, device_bytes of the plan's estimate, where it has them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """`outlay.json`."""

    exported_at: str
    outlay_version: str
    model: str
    family: str
    parameters: int
    quantize: str
    """none, int8, int8-dynamic, int4:gN or mixed."""
    asked: dict[str, Any] | None
    """The job's `compress` block."""
    weights: int
    """In the matrices of the blocks."""
    zeros: int
    matrices: tuple[Matrix, ...]
    weights_bytes: int
    planned_bytes: int
    """What the formula of `outlay plan` says for this packing."""
    dense_bytes: int
    data: Data | None
    training: Training | None
    evaluation: dict[str, Any] | None
    """outlay/eval@1: dense and exported on held-out text; null = not asked for."""
    sensitivity: dict[str, Any] | None
    """How a mixture was chosen; null = one packing for all."""
    schema: str = field(default=SCHEMA_EXPORT)


def readme(r: Record) -> str:
    """The model card."""
    parts = [
        _front(r), f"# {r.model}\n", _what(r), _compression(r), _metrics(r), _data(r), _training(r),
        f"Exported by outlay {r.outlay_version} on {r.exported_at}. All of this with every matrix: "
        "`outlay.json`.\n",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _front(r: Record) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in ("outlay", r.family, *_packers(r))]
    return "\n".join([*lines, "---\n"])


def _packers(r: Record) -> list[str]:
    if r.quantize == "none":
        return []
    return ["torchao"] if r.quantize.startswith("int8") else ["compressed-tensors"]


def _what(r: Record) -> str:
    needs = "".join(f" and {name}" for name in _packers(r))
    return (
        f"A {r.family} with {format_count(r.parameters)} parameters ({r.parameters:,}). "
        f"Loads with transformers{needs}:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")\n```\n'
    )


def _compression(r: Record) -> str:
    ratio = r.weights_bytes / r.dense_bytes
    off = r.weights_bytes / r.planned_bytes - 1
    lines = [
        "## Size and compression\n",
        f"- Weights on disk: {format_bytes(r.weights_bytes)} ({r.weights_bytes:,} bytes), {ratio:.3f} of the dense "
        f"{format_bytes(r.dense_bytes)}; planned {r.planned_bytes:,} bytes ({off:+.2%}).",
    ]
    kinds: dict[str, int] = {}
    for m in r.matrices:
        kinds[m.stored] = kinds.get(m.stored, 0) + 1
    if r.quantize != "none":
        lines.append(
            f"- Quantization: {r.quantize} ("
            + ", ".join(f"{n} matrices {kind}" for kind, n in sorted(kinds.items()))
            + "); token table, norms and biases dense."
        )
    if r.quantize == "mixed" or r.quantize.startswith("int4"):
        lines.append(
            "- transformers unpacks these weights at the first forward pass: small on disk, not faster."
        )
    if r.weights:
        lines.append(
            f"- Zeros in the matrices of the blocks: {r.zeros:,} of {r.weights:,} ({r.zeros / r.weights:.4%}), counted."
        )
    if r.asked:
        said = {k: v for k, v in r.asked.items() if v is not None}
        lines += [f"- Asked for in training: {key}: `{value}`" for key, value in said.items()]
    return "\n".join(lines) + "\n"


def _metrics(r: Record) -> str:
    if r.evaluation is None and (r.training is None or r.training.heldout_loss is None):
        return "## Metrics\n\nNot evaluated.\n"
    lines = ["## Metrics\n"]
    if r.training is not None and r.training.heldout_loss is not None:
        t = r.training
        unigram = (
            "" if t.heldout_unigram is None else f" (a unigram model: {t.heldout_unigram:.4f})"
        )
        lines.append(
            f"- Held-out loss at the end of training: {t.heldout_loss:.4f} nats a token{unigram}."
        )
    if r.evaluation is not None:
        text = r.evaluation["text"]
        lines.append(
            f"- Read anew on {text['windows']} held-out windows of {text['seq_len']} tokens; 90 % intervals, "
            f"resampled by {text['unit']} ({text['units']}):\n"
        )
        lines += ["| | loss, nats a token | perplexity | weights |", "|---|---|---|---|"]
        for m in r.evaluation["models"]:
            lines.append(
                f"| {m['target']} | {_shown(m['loss'], 4)} | {_shown(m['perplexity'], 2)} "
                f"| {format_bytes(m['weights_bytes'])} |"
            )
        for d in r.evaluation["differences"]:
            lines.append(
                f"\n{d['target']} against {d['against']}: loss {_shown(d['loss'], 4, '+')}."
            )
    return "\n".join(lines) + "\n"


def _shown(m: dict[str, float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{m[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _data(r: Record) -> str:
    if r.data is None:
        return "## Data\n\nUnknown: these weights did not come from a run of outlay.\n"
    d = r.data
    return (
        "## Data\n\n"
        f"`{d.name}`: {d.train_tokens:,} tokens of {d.train_files:,} files to train on (sha256 of the tokens "
        f"{d.train_sha256[:16]}…), vocabulary {d.vocab_size:,}. "
        f"Seen in training: {d.tokens_seen:,} tokens in sequences of {d.seq_len}.\n"
    )


def _training(r: Record) -> str:
    t = r.training
    if t is None:
        return ""
    unknown = "unknown"
    rows = [
        ("steps", f"{t.steps:,} of {t.global_batch} sequences"),
        ("optimizer", f"{t.optimizer}, learning rate {t.lr:g}, {t.precision}"),
        ("plan", f"{t.strategy} on {t.ranks} × {t.hardware}"),
        ("started from", t.started_from or "random weights"),
        ("wall time", unknown if t.wall_s is None else format_seconds(t.wall_s)),
        ("cost", unknown if t.cost_usd is None else format_usd(t.cost_usd)),
        ("energy", unknown if t.energy_kwh is None else f"{t.energy_kwh:.4g} kWh ({t.energy_source})"),
        ("carbon", unknown if t.co2e_kg is None else f"{t.co2e_kg:.4g} kg CO2e"),
    ]  # fmt: skip
    shows = {"step_s": format_seconds, "cost_usd": format_usd, "device_bytes": format_bytes}
    names = {
        "step_s": "step time",
        "cost_usd": "cost of the steps",
        "device_bytes": "memory a rank",
    }
    rows += [
        (f"planned {names[key]}", shows[key](value))
        for key, value in t.planned.items()
        if value is not None
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"## Training, cost and energy\n\n| | |\n|---|---|\n{table}\n"

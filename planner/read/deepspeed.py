"""DeepSpeed's own JSON: what it says of batch, precision, optimizer and sharding."""

from __future__ import annotations

from typing import Any

from outlay.planner.read.document import Document, KeyPath
from outlay.planner.read.meaning import DEEPSPEED, MAIN, Meaning, Said, Section

AUTO = "auto"
BATCH = {
    "micro_batch": "train_micro_batch_size_per_gpu",
    "grad_accum": "gradient_accumulation_steps",
    "global_batch": "train_batch_size",
}
OPTIMIZER_NAMES = {
    "adam": "adam", "adamw": "adamw", "lamb": "lamb", "lion": "lion", "muon": "muon", "sgd": "sgd",
    "rmsprop": "rmsprop", "adafactor": "adafactor", "adagrad": "rmsprop",
}  # fmt: skip
"""DeepSpeed's and torch's names → ours, by what states they hold (Adagrad: one moment, as RMSprop)."""


def has_auto(value: Any) -> bool:
    """Whether `auto` stands anywhere in it."""
    if isinstance(value, dict):
        return any(has_auto(v) for v in value.values())
    return bool(value == AUTO)


def block(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested block; empty where it is missing or no mapping."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


MOST_WHOLE = 10**12
"""No count of sequences, tokens, ranks or elements in a configuration is larger."""


def whole(value: Any) -> int | None:
    """A whole number from 1 to MOST_WHOLE, or null."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and 1 <= value <= MOST_WHOLE and value == int(value) else None


def precision_of(config: dict[str, Any]) -> str | None:
    """bf16, fp16 or fp32; null where a Trainer's argument decides."""
    for name, blocks in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        for key in blocks:
            enabled = block(config, key).get("enabled")
            if enabled is True or str(enabled).lower() == "true":
                return name
    asked = [block(config, key).get("enabled") for key in ("bf16", "fp16")]
    return None if AUTO in asked else "fp32"


def values_of(
    config: dict[str, Any], document: str, prefix: KeyPath, text: Document
) -> dict[str, Said]:
    """What a DeepSpeed mapping says of the shared values."""
    found: dict[str, Said] = {}

    def say(name: str, value: Any, *path: str) -> None:
        real = (*prefix, *path)
        found[name] = Said(value=value, where=text.where(real), place=(document, real))

    for name, key in BATCH.items():
        value = whole(config.get(key))
        if value is not None:
            say(name, value, key)
    precision = precision_of(config)
    if precision is not None:
        key = precision if isinstance(config.get(precision), dict) else ""
        found["precision"] = Said(
            value=precision, where=text.where((*prefix, key) if key else prefix),
            default="" if key else "neither bf16 nor fp16 is enabled",
        )  # fmt: skip
    kind = block(config, "optimizer").get("type")
    if isinstance(kind, str) and kind.lower() in OPTIMIZER_NAMES:
        say("optimizer", OPTIMIZER_NAMES[kind.lower()], "optimizer", "type")
    for name, path in (
        ("tp", ("tensor_parallel", "autotp_size")), ("sp", ("sequence_parallel_size",)),
        ("pp", ("pipeline", "stages")), ("ep", ("expert_parallel", "autoep_size")),
    ):  # fmt: skip
        inner: Any = config
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if (size := whole(inner)) is not None:
            say(name, size, *path)
    interval = block(config, "pipeline").get("activation_checkpoint_interval")
    if isinstance(interval, int) and not isinstance(interval, bool):
        say(
            "checkpointing",
            "full" if interval else "none",
            "pipeline",
            "activation_checkpoint_interval",
        )
    return found


def read_deepspeed(document: Document) -> Meaning:
    """A ds_config.json on its own."""
    config = document.value
    notes: tuple[str, ...] = ()
    if has_auto(config):
        notes = ("it has `auto`: transformers' Trainer or accelerate is taken to fill it",)
    return Meaning(
        framework="deepspeed", documents={MAIN: document},
        section=Section(config=config, document=MAIN),
        values=values_of(config, MAIN, (), document), trainer=has_auto(config), notes=notes,
    )  # fmt: skip


def section_of(text: Document) -> Section:
    """The section that a DeepSpeed file of its own is."""
    return Section(config=text.value, document=DEEPSPEED)

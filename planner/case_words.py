"""The words of a cases file's columns, as people write them, in the project's own; what is unknown is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, get_args, get_type_hints

from outlay.planner.spec.job import Optimizer, Precision
from outlay.profiles.errors import UsageError

OPTIMIZERS: tuple[str, ...] = get_args(get_type_hints(Optimizer)["name"])
PRECISIONS: tuple[str, ...] = get_args(Precision)
CHECKPOINTING = ("none", "selective", "full")
MEMORY_KINDS = ("allocated", "reserved", "active", "device", "host_growth")
_ADAMS = ("adam", "adamw", "fused_adam", "fusedadam", "fused_adamw", "fused", "distributed_adam",
          "adamw_torch", "adamw_torch_fused", "adamw_hf", "cpu_adam")  # fmt: skip
_OPTIMIZER_WORDS = {
    **dict.fromkeys(_ADAMS, "adamw"),
    "adam": "adam", "adamw_8bit": "adamw_8bit", "adam_8bit": "adamw_8bit", "adam8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw",
    "sgd_momentum": "sgd",
}  # fmt: skip
_PRECISION_WORDS = {
    "": "bf16", "bfloat16": "bf16", "bf16_mixed": "bf16", "bf16_true": "bf16", "float16": "fp16",
    "half": "fp16", "fp16_mixed": "fp16", "16_mixed": "fp16", "float32": "fp32", "32": "fp32",
    "float8": "fp8", "mxfp8": "fp8",
}  # fmt: skip
_FUSED_ATTENTION = ("flash", "fa2", "fa3", "cudnn", "fused", "xformers", "mem_efficient")
_QUANTIZED = {"": "none", "none": "none", "no": "none", "nf4": "nf4", "nf4-dq": "nf4-dq",
              "4bit": "nf4", "int8": "int8", "8bit": "int8"}  # fmt: skip


def word(row: Mapping[str, str], key: str) -> str:
    """A cell without case and outer space."""
    return (row.get(key) or "").strip().lower()


def _plain(row: Mapping[str, str], key: str) -> str:
    return word(row, key).replace("-", "_").replace(" ", "_")


def _refuse(key: str, value: str, known: Any) -> NoReturn:
    raise UsageError(f"{key}: {value!r} is none of {', '.join(known)}")


def optimizer_of(row: Mapping[str, str]) -> Optimizer:
    """AdamW where the row says nothing."""
    text = _plain(row, "optimizer")
    name = _OPTIMIZER_WORDS.get(text or "adamw", text)
    if name not in OPTIMIZERS:
        _refuse("optimizer", text, OPTIMIZERS)
    momentum = 0.9 if text == "sgd_momentum" else 0.0
    return Optimizer(name=name, momentum=momentum)  # type: ignore[arg-type]


def precision_of(row: Mapping[str, str]) -> str:
    """bf16 where the row says nothing."""
    text = _plain(row, "precision")
    name = _PRECISION_WORDS.get(text, text)
    if name not in PRECISIONS:
        _refuse("precision", text, PRECISIONS)
    return name


def attention_word(row: Mapping[str, str]) -> str:
    """eager, sdpa or flash; empty where the row does not know."""
    text = _plain(row, "attention")
    if text in ("", "unknown", "eager", "sdpa"):
        return "" if text == "unknown" else text
    if text.startswith(_FUSED_ATTENTION):
        return "flash"
    return _refuse("attention", text, ("eager", "sdpa", "flash", "unknown"))


def quantization_of(row: Mapping[str, str]) -> str:
    """How frozen weights are held: none, nf4, nf4-dq or int8."""
    text = word(row, "quant")
    bits = _QUANTIZED.get(text.removeprefix("bnb.").replace("_", "-"))
    if bits is None:
        _refuse("quant", text, dict.fromkeys(_QUANTIZED.values()))
    return bits


def checkpointing_of(row: Mapping[str, str]) -> str:
    """none where the row says nothing."""
    text = word(row, "activation_checkpointing") or "none"
    if text not in CHECKPOINTING:
        _refuse("activation_checkpointing", text, CHECKPOINTING)
    return text


def memory_kind_of(row: Mapping[str, str]) -> str:
    """What the measurement counted; empty = device bytes."""
    text = word(row, "memory_kind")
    if text and text.removesuffix("_last_rank") not in MEMORY_KINDS:
        _refuse("memory_kind", text, (*MEMORY_KINDS, "each also with _last_rank"))
    return text

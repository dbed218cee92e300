"""LLaMA-Factory's YAML."""

from __future__ import annotations

from outlay.planner.read.document import Document, KeyPath
from outlay.planner.read.known import names
from outlay.planner.read.meaning import MAIN, Meaning, Said
from outlay.planner.read.trainer import (
    ATTENTION,
    Arguments,
    attach_deepspeed,
    common_arguments,
    lora_of,
    with_section,
)

_DEFAULT = "LLaMA-Factory's default"


def factory_arguments(a: Arguments) -> None:
    """What LLaMA-Factory adds to the Trainer's arguments, and where its defaults differ."""
    common_arguments(a)
    a.take("model", ("model_name_or_path",), None)
    a.take_whole("seq_len", ("cutoff_len",), 2048, _DEFAULT)
    a.take_word("attention", "flash_attn", ATTENTION, "sdpa")
    off = a.get("disable_gradient_checkpointing") is True
    a.found["checkpointing"] = Said(
        value="none" if off else "full",
        where=a.text.where((*a.prefix, "disable_gradient_checkpointing")) if off else "",
        default="" if off else f"{_DEFAULT}: recomputation is on",
        place=(MAIN, (*a.prefix, "disable_gradient_checkpointing")),
    )
    packed = a.get("packing") is True or a.get("neat_packing") is True or a.get("stage") == "pt"
    a.found["packing"] = Said(value=packed, default="" if packed else _DEFAULT)
    if a.get("pure_bf16") is True:
        a.say("precision", "bf16", "pure_bf16")
    if str(a.get("finetuning_type", "lora")) == "lora":
        lora_of(a, method_key="finetuning_type", rank_key="lora_rank", rank_default=8)


def read_llamafactory(text: Document, prefix: KeyPath = ()) -> Meaning:
    """A configuration for `llamafactory-cli train`."""
    a = Arguments(text, text.value, prefix)
    factory_arguments(a)
    documents = {MAIN: text}
    section, missing = attach_deepspeed(a.get("deepspeed"), text, ("deepspeed",), documents)
    return Meaning(
        framework="llamafactory", documents=documents, section=section, trainer=True,
        missing_file=missing, values=with_section(a.found, section, documents),
        flags={"arguments": dict(text.value), "megatron": bool(names("llamafactory", "megatron") & text.value.keys())},
    )  # fmt: skip

"""axolotl's YAML."""

from __future__ import annotations

from typing import Any

from outlay.planner.read.deepspeed import whole
from outlay.planner.read.document import Document
from outlay.planner.read.meaning import MAIN, Meaning, Said
from outlay.planner.read.trainer import ATTENTION, OPTIM, Arguments, attach_deepspeed, with_section

_DEFAULT = "axolotl's default"


def _precision(a: Arguments) -> None:
    bf16, fp16 = a.get("bf16"), a.get("fp16")
    if a.values.get("bfloat16") is True:
        a.say("precision", "bf16", "bfloat16")
    elif bf16 is True or str(bf16).lower() in ("auto", "full"):
        a.say("precision", "bf16", "bf16")
    elif fp16 is True:
        a.say("precision", "fp16", "fp16")
    elif bf16 is None and "bf16" not in a.values:
        a.found["precision"] = Said(value="bf16", default="axolotl's default: auto")
    else:
        a.found["precision"] = Said(value="fp32", default="neither bf16 nor fp16 is set")


def _adapter(a: Arguments) -> None:
    adapter = a.get("adapter")
    if adapter not in ("lora", "qlora"):
        return
    quant = (
        "nf4-dq"
        if a.get("load_in_4bit") is True
        else "int8"
        if a.get("load_in_8bit") is True
        else "none"
    )
    rank: Any = whole(a.get("lora_r"))
    a.say("finetune", {"method": "lora", "rank": rank or 8, "quant": quant}, "adapter")


def _attention(a: Arguments) -> None:
    if a.get("attn_implementation") is not None:
        a.take_word("attention", "attn_implementation", ATTENTION, "sdpa")
    elif a.get("flash_attention") is True:
        a.say("attention", "flash", "flash_attention")
    elif a.get("eager_attention") is True:
        a.say("attention", "eager", "eager_attention")
    else:
        a.found["attention"] = Said(value="sdpa", default=_DEFAULT)


def read_axolotl(text: Document) -> Meaning:
    """model, batch, context, adapter and sharding of an axolotl run."""
    a = Arguments(text, text.value)
    a.take("model", ("base_model",), None)
    a.take_whole("seq_len", ("sequence_len",), 512, _DEFAULT)
    a.take_whole("micro_batch", ("micro_batch_size",), 1, _DEFAULT)
    accum = whole(a.get("gradient_accumulation_steps"))
    batch, micro = whole(a.get("batch_size")), a.found.get("micro_batch")
    if accum is None and batch is not None and micro is not None and batch % micro.value == 0:
        a.say("grad_accum", batch // micro.value, "batch_size")
    else:
        a.take_whole("grad_accum", ("gradient_accumulation_steps",), 1, _DEFAULT)
    a.take("clipping", ("max_grad_norm",), 1.0)
    a.take_word("optimizer", "optimizer", OPTIM, "adamw")
    if whole(a.get("max_steps")) is not None:
        a.say("steps", a.get("max_steps"), "max_steps")
    elif isinstance(a.get("num_epochs"), int | float):
        a.say("epochs", a.get("num_epochs"), "num_epochs")
    a.say("packing", a.get("sample_packing") is True, "sample_packing")
    # chunked_cross_entropy is none of these: it takes the loss of whole logits in pieces.
    for key in ("liger_fused_linear_cross_entropy", "cut_cross_entropy"):
        if a.get(key) is True:
            a.say("loss", "fused", key)
    checkpointing = a.get("gradient_checkpointing")
    place = (MAIN, ("gradient_checkpointing",))
    a.found["checkpointing"] = Said(
        value="none" if checkpointing in (None, False) else "full", place=place,
        where="" if checkpointing is None else text.where(place[1]),
        default=_DEFAULT if checkpointing is None else "",
    )  # fmt: skip
    for name, key in (
        ("sp", "context_parallel_size"),
        ("sp", "sequence_parallel_degree"),
        ("tp", "tensor_parallel_size"),
    ):
        if (size := whole(a.get(key))) is not None and size > 1:
            a.say(name, size, key)
    _precision(a)
    _adapter(a)
    _attention(a)
    documents = {MAIN: text}
    section, missing = attach_deepspeed(a.get("deepspeed"), text, ("deepspeed",), documents)
    return Meaning(
        framework="axolotl", documents=documents, section=section, trainer=True, missing_file=missing,
        values=with_section(a.found, section, documents), flags={"arguments": dict(text.value)},
    )  # fmt: skip

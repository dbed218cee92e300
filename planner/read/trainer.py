"""transformers' training arguments: a file of them, or those behind a script on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from outlay.planner.read.companion import companion
from outlay.planner.read.deepspeed import section_of, values_of, whole
from outlay.planner.read.document import Document, KeyPath
from outlay.planner.read.meaning import DEEPSPEED, MAIN, Meaning, Said, Section, merged
from outlay.planner.read.program import model_said

OPTIM = {
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision", "adamw"),
        "adamw",
    ),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "ademamix_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_8bit",), "paged_adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"),
    **dict.fromkeys(("lion_32bit", "lion"), "lion"),
    "sgd": "sgd", "adafactor": "adafactor", "rmsprop": "rmsprop", "muon": "muon",
}  # fmt: skip
"""transformers' `optim` → ours."""
ATTENTION = {
    "flash_attention_2": "flash", "flash_attention_3": "flash", "fa2": "flash", "flash": "flash", "sdpa": "sdpa",
    "auto": "sdpa", "eager": "eager", "disabled": "eager",
}  # fmt: skip
_DEFAULT = "transformers' default"


class Arguments:
    """Says of training arguments, with their places."""

    def __init__(self, text: Document, values: Mapping[str, Any], prefix: KeyPath = ()) -> None:
        self.text, self.values, self.prefix = text, values, prefix
        self.found: dict[str, Said] = {}

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def say(self, name: str, value: Any, key: str) -> None:
        path = (*self.prefix, key)
        self.found[name] = Said(value=value, where=self.text.where(path), place=(MAIN, path))

    def take(self, name: str, keys: tuple[str, ...], default: Any, why: str = _DEFAULT) -> None:
        """The first of the keys that is given, or the default; its place is where an edit would write."""
        for key in keys:
            if self.get(key) is not None:
                self.say(name, self.get(key), key)
                return
        if default is not None:
            place = (MAIN, (*self.prefix, keys[0]))
            self.found[name] = Said(value=default, default=why, place=place)

    def take_whole(
        self, name: str, keys: tuple[str, ...], default: int | None, why: str = _DEFAULT
    ) -> None:
        """A whole number; what is none is left to the rules to name."""
        self.take(name, keys, default, why)
        said = self.found.get(name)
        if said is None:
            return
        quoted = isinstance(said.value, str) and said.value.isdigit()
        value = whole(int(said.value) if quoted else said.value)
        if value is None:
            del self.found[name]
        else:
            self.found[name] = replace(said, value=value)

    def take_word(self, name: str, key: str, words: Mapping[str, str], default: str) -> None:
        """A word of ours; one that is not known is named as it stands and not guessed."""
        given = self.get(key)
        if given is None:
            self.found[name] = Said(value=default, default=_DEFAULT)
        else:
            self.say(name, words.get(str(given).lower(), str(given)), key)


def common_arguments(a: Arguments) -> None:
    """What all users of the Trainer share."""
    a.take_whole("micro_batch", ("per_device_train_batch_size", "per_gpu_train_batch_size"), 8)
    a.take_whole("grad_accum", ("gradient_accumulation_steps",), 1)
    a.take("clipping", ("max_grad_norm",), 1.0)
    a.take_word("optimizer", "optim", OPTIM, "adamw")
    steps = a.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        a.say("steps", steps, "max_steps")
    elif isinstance(epochs := a.get("num_train_epochs"), int | float):
        a.say("epochs", epochs, "num_train_epochs")
    for precision in ("bf16", "fp16"):
        if a.get(precision) is True:
            a.say("precision", precision, precision)
            break
    else:
        a.found["precision"] = Said(value="fp32", default="neither bf16 nor fp16 is set")
        if a.get("tf32") is True:
            a.say("precision", "tf32", "tf32")
    if a.get("use_liger_kernel") is True or a.get("enable_liger_kernel") is True:
        key = "use_liger_kernel" if a.get("use_liger_kernel") else "enable_liger_kernel"
        a.say("loss", "fused", key)
    checkpointing = a.get("gradient_checkpointing")
    place = (MAIN, (*a.prefix, "gradient_checkpointing"))
    a.found["checkpointing"] = Said(
        value="full" if checkpointing not in (None, False) else "none", place=place,
        where="" if checkpointing is None else a.text.where(place[1]),
        default=_DEFAULT if checkpointing is None else "",
    )  # fmt: skip


def lora_of(a: Arguments, *, method_key: str | None, rank_key: str, rank_default: int) -> None:
    """LoRA over 16-, 8- or 4-bit weights, from the words that scripts share."""
    bits = 4 if a.get("load_in_4bit") is True else 8 if a.get("load_in_8bit") is True else None
    given = a.get("quantization_bit")
    bits = given if given in (4, 8) else bits
    rank = whole(a.get(rank_key)) or rank_default
    quant = {4: "nf4-dq", 8: "int8"}.get(bits, "none") if bits else "none"
    if bits == 4 and a.get("double_quantization") is False:
        quant = "nf4"
    key = method_key or ("use_peft" if a.get("use_peft") is not None else rank_key)
    a.say("finetune", {"method": "lora", "rank": rank, "quant": quant}, key)


def attach_deepspeed(
    reference: Any, text: Document, path: KeyPath, documents: dict[str, Document]
) -> tuple[Section | None, str | None]:
    """(the DeepSpeed section that an argument names or holds, the file that is missing)."""
    if isinstance(reference, dict):
        return Section(config=reference, document=MAIN, prefix=path), None
    if not isinstance(reference, str) or not reference or reference.lower() in ("none", "false"):
        return None, None
    found = companion(reference, text)
    if found is None:
        return None, reference
    documents[DEEPSPEED] = found
    return section_of(found), None


def with_section(
    values: dict[str, Said], section: Section | None, documents: dict[str, Document]
) -> dict[str, Said]:
    """Arguments win; what only the DeepSpeed section says (optimizer, parallel sizes) is added."""
    if section is None or section.document is None:
        return values
    inner = values_of(section.config, section.document, section.prefix, documents[section.document])
    added = {k: v for k, v in inner.items() if k in ("tp", "sp", "ep", "optimizer")}
    if "precision" in inner and not inner["precision"].default:
        added["precision"] = inner["precision"]
    elif values.get("precision") is None or values["precision"].default:
        added |= {k: v for k, v in inner.items() if k == "precision" and not v.default}
    return values | added


def read_trainer(text: Document) -> Meaning:
    """A file of training arguments, as HfArgumentParser reads it."""
    a = Arguments(text, text.value)
    common_arguments(a)
    a.take("model", ("model_name_or_path", "model"), None)
    a.take_whole(
        "seq_len",
        ("max_seq_length", "max_length", "model_max_length", "block_size", "max_seq_len"),
        None,
    )
    a.take_word("attention", "attn_implementation", ATTENTION, "sdpa")
    if a.get("packing") is not None:
        a.say("packing", bool(a.get("packing")), "packing")
    if a.get("use_peft") is True or a.get("lora_r") is not None or a.get("lora_rank") is not None:
        lora_of(
            a,
            method_key=None,
            rank_key="lora_r" if a.get("lora_r") else "lora_rank",
            rank_default=16,
        )
    documents = {MAIN: text}
    section, missing = attach_deepspeed(a.get("deepspeed"), text, ("deepspeed",), documents)
    return Meaning(
        framework="trainer", documents=documents, section=section, trainer=True, missing_file=missing,
        values=merged(model_said(text, documents), with_section(a.found, section, documents)),
        flags={"arguments": dict(text.value)},
    )  # fmt: skip

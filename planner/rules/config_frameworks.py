"""Rules of axolotl, LLaMA-Factory and the Trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from outlay.planner.read.deepspeed import whole
from outlay.planner.read.edits import remove, rename, set_to
from outlay.planner.read.known import known, names, trainer_names
from outlay.planner.read.meaning import MAIN
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_keys import near
from outlay.planner.rules.places import arguments, at, here, is_of, main_edits
from outlay.planner.rules.setup import Setup


@config_rule(
    "deepspeed_file_missing", "illegal", "the framework opens it at the start", deepspeed=False
)
def deepspeed_file_missing(s: Setup) -> Iterable[Found]:
    """A DeepSpeed file that is named and is not there."""
    missing = s.meaning.missing_file
    if missing is None:
        return
    main = s.meaning.documents[MAIN]
    written = main.syntax == "command" and "<<" in main.text
    if "$" in missing or "`" in missing or written:
        whose = "the script may write it itself" if written else "the shell names it"
        yield Found(
            what=f"{missing}: {whose}, so nothing is known here of sharding and offload",
            where=here(s), do="check that file", level="advice",
        )  # fmt: skip
        return
    yield Found(
        what=f"the file {missing} is not there, so nothing is known of sharding and offload",
        where=here(s), do="run the check beside it, or correct the path",
    )  # fmt: skip


@config_rule(
    "axolotl_unknown_key",
    "ignored",
    "axolotl at 067b021, utils/schemas/config.py: pydantic drops what it does not know",
    deepspeed=False,
)
def axolotl_unknown_key(s: Setup) -> Iterable[Found]:
    """A key that axolotl drops without a word."""
    if not is_of(s, "axolotl"):
        return
    listed = names("axolotl", "keys")
    for key, value in arguments(s).items():
        if key in listed or value is None:
            continue  # a key with nothing behind it says nothing
        meant = known("axolotl")["renamed"].get(key) or near(key, listed)
        free = meant is not None and meant not in arguments(s)
        yield Found(
            what=f"{key} is no key of axolotl's: it is dropped" + (f", and there is no {meant}" if free else ""),
            where=here(s, key), do=f"write {meant}" if free else "remove it",
            edits=main_edits(rename(key, key=str(meant)) if free else remove(key)),
        )  # fmt: skip


@config_rule(
    "axolotl_refuses",
    "illegal",
    "axolotl at 067b021, utils/schemas/validation.py and peft.py: ValueError",
    deepspeed=False,
)
def axolotl_refuses(s: Setup) -> Iterable[Found]:
    """What axolotl's own validation refuses of batch, adapter, precision and sharding."""
    if not is_of(s, "axolotl"):
        return
    a = arguments(s)
    batch = [
        k for k in ("micro_batch_size", "gradient_accumulation_steps", "batch_size") if a.get(k)
    ]
    if len(batch) < 2:
        missing = (
            "gradient_accumulation_steps" if "micro_batch_size" in batch else "micro_batch_size"
        )
        yield Found(
            what="at least two of micro_batch_size, gradient_accumulation_steps and batch_size must be set",
            where=here(s, *batch[:1]), do=f"write {missing}: 1", edits=main_edits(set_to(missing, value=1)),
        )  # fmt: skip
    for one, other in (
        ("gradient_accumulation_steps", "batch_size"), ("warmup_steps", "warmup_ratio"),
        ("save_steps", "saves_per_epoch"), ("eval_steps", "evals_per_epoch"),
    ):  # fmt: skip
        if a.get(one) and a.get(other):
            yield Found(
                what=f"{one} and {other} exclude each other", where=here(s, other), do=f"remove {other}",
                edits=main_edits(remove(other)),
            )  # fmt: skip
    if a.get("adapter") == "qlora" and a.get("load_in_4bit") is not True:
        edits = [set_to("load_in_4bit", value=True)]
        edits += [set_to("load_in_8bit", value=False)] if a.get("load_in_8bit") else []
        yield Found(
            what="adapter qlora needs load_in_4bit", where=here(s, "adapter"), do="write load_in_4bit: true",
            edits=main_edits(*edits),
        )  # fmt: skip
    if a.get("deepspeed") and a.get("fsdp"):
        edits = [remove("fsdp")] + ([remove("fsdp_config")] if "fsdp_config" in a else [])
        yield Found(
            what="deepspeed and fsdp cannot be used together", where=here(s, "fsdp"), do="remove fsdp",
            edits=main_edits(*edits),
        )  # fmt: skip
    optimizer = str(a.get("optimizer", ""))
    if a.get("deepspeed") and (
        optimizer in ("muon", "q_galore_adamw8bit") or optimizer.startswith("flash_")
    ):
        yield Found(
            what=f"optimizer {optimizer} cannot be used with DeepSpeed", where=here(s, "optimizer"),
            do="write adamw_torch_fused", edits=main_edits(set_to("optimizer", value="adamw_torch_fused")),
        )  # fmt: skip


@config_rule(
    "two_precisions_asked",
    "illegal",
    "transformers 5.23, training_args.py: at most one of fp16 and bf16 can be True",
    deepspeed=False,
)
def two_precisions_asked(s: Setup) -> Iterable[Found]:
    """fp16 and bf16 both true among the arguments."""
    a = arguments(s)
    if a.get("fp16") is True and a.get("bf16") is True:
        axolotl = is_of(s, "axolotl")  # core/builders/base.py:271: fp16 where bf16 is not
        yield Found(
            what="fp16 has no effect: bf16 is true, too" if axolotl else "fp16 and bf16 are both true",
            level="ignored" if axolotl else "", where=here(s, *at(s, "fp16")), do="keep bf16 where the hardware has it",
            edits=main_edits(set_to(*at(s, "fp16"), value=False)),
        )  # fmt: skip


@config_rule(
    "argument_unknown",
    "illegal",
    "transformers 5.23, hf_argparser.py: ValueError; hiyouga/LlamaFactory#7412, #7927",
    deepspeed=False,
)
def argument_unknown(s: Setup) -> Iterable[Found]:
    """A training argument that nobody knows, or under a name that was given up."""
    if not is_of(s, "llamafactory", "trainer") or s.meaning.flags.get("megatron"):
        return
    listed = trainer_names() | (
        names("llamafactory", "keys") if is_of(s, "llamafactory") else frozenset()
    )
    renamed: dict[str, str] = known("trainer")["renamed"]
    whose = "LLaMA-Factory" if is_of(s, "llamafactory") else "the Trainer"
    for key in arguments(s):
        if key in renamed:
            yield Found(
                what=f"{key} is called {renamed[key]} since transformers 4.46, which refuses the old name",
                where=here(s, key), do=f"write {renamed[key]}", edits=main_edits(rename(key, key=renamed[key])),
            )  # fmt: skip
            continue
        meant = None if key in listed else near(key, listed)
        free = meant is not None and meant not in arguments(s)
        if key in listed or (is_of(s, "trainer") and not free):
            continue  # a script's own arguments stand in the same file
        yield Found(
            what=f"{key} is no argument of {whose}: it is refused",
            where=here(s, key), do=f"write {meant}" if free else "remove it",
            edits=main_edits(rename(key, key=str(meant)) if free else remove(key)),
        )  # fmt: skip


@config_rule(
    "llamafactory_refuses",
    "illegal",
    "LLaMA-Factory at ff6d4d1, hparams/parser.py: ValueError",
    deepspeed=False,
)
def llamafactory_refuses(s: Setup) -> Iterable[Found]:
    """What LLaMA-Factory's own checks refuse of quantization, precision, prediction and data."""
    if not is_of(s, "llamafactory"):
        return
    a = arguments(s)
    kind = a.get("finetuning_type", "lora")
    if a.get("quantization_bit") is not None and kind not in ("lora", "oft"):
        yield Found(
            what=f"quantization_bit {a['quantization_bit']} with finetuning_type {kind}: only adapters train over "
            "quantized weights", where=here(s, "quantization_bit"), do="write finetuning_type: lora",
            edits=main_edits(set_to("finetuning_type", value="lora")),
        )  # fmt: skip
    for key, what in (
        ("pure_bf16", "pure_bf16"),
        ("predict_with_generate", "predict_with_generate"),
        ("pissa_init", "pissa_init"),
    ):
        if a.get(key) is True and s.stage == 3:
            edits = [remove(key)]
            if key == "pure_bf16" and a.get("bf16") is not True:
                edits.append(set_to("bf16", value=True))
            yield Found(
                what=f"{what} does not go with ZeRO-3", where=here(s, key), do=f"remove {key}"
                + (", write bf16: true" if key == "pure_bf16" else ""), edits=main_edits(*edits),
            )  # fmt: skip
    if a.get("streaming") is True and whole(a.get("max_steps")) is None:
        yield Found(
            what="streaming needs max_steps: the length of the data is not known", where=here(s, "streaming"),
            do="write max_steps (the mend writes 1000)", edits=main_edits(set_to("max_steps", value=1000)),
        )  # fmt: skip
    if a.get("deepspeed") and (a.get("use_galore") is True or a.get("use_apollo") is True):
        key = "use_galore" if a.get("use_galore") else "use_apollo"
        yield Found(
            what=f"{key} does not go with DeepSpeed", where=here(s, key), do=f"remove {key}",
            edits=main_edits(remove(key)),
        )  # fmt: skip


@config_rule(
    "number_read_as_text",
    "illegal",
    "transformers 5.23, hf_argparser.py:426: PyYAML reads 1e-5 as a text (YAML 1.1 wants 1.0e-5); huggingface/trl#1450",
    deepspeed=False,
)
def number_read_as_text(s: Setup) -> Iterable[Found]:
    """A learning rate that YAML takes for a text."""
    if not is_of(s, "trainer") or s.meaning.documents[MAIN].syntax != "yaml":
        return
    for key, value in arguments(s).items():
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
            number = float(value)
            better = f"{number:.1e}" if number else "0.0"
            yield Found(
                what=f"{key} is {value}, which YAML reads as a text, not as a number", where=here(s, key),
                do=f"write {better}", edits=main_edits(set_to(key, value=number)),
            )  # fmt: skip


@config_rule(
    "quantized_weights_at_stage_3",
    "changed",
    "transformers 5.23, modeling_utils.py; bitsandbytes-foundation/bitsandbytes#1249, huggingface/transformers#24395",
)
def quantized_weights_at_stage_3(s: Setup) -> Iterable[Found]:
    """4- or 8-bit weights with ZeRO-3: every rank loads the whole model before it is divided."""
    finetune = s.meaning.said("finetune")
    if s.stage != 3 or not isinstance(finetune, dict) or finetune.get("quant") in (None, "none"):
        return
    bits = "8" if finetune["quant"] == "int8" else "4"
    edits = s.meaning.set_deepspeed(("zero_optimization", "stage"), 2)
    if s.offload("param") != "none":
        edits += s.meaning.remove_deepspeed(("zero_optimization", "offload_param"))
    yield Found(
        what=f"{bits}-bit weights with ZeRO-3: zero.Init does not take quantized weights, so every rank loads the "
        "whole model first" + ("; 8-bit weights are refused after that" if bits == "8" else ""),
        where=s.where("zero_optimization", "stage"), do="write stage 2: adapters have little to divide",
        edits=tuple(edits), level="illegal" if bits == "8" else "changed",
    )  # fmt: skip


@config_rule(
    "device_map_at_stage_3",
    "illegal",
    "transformers 5.23, modeling_utils.py: ZeRO-3 is not compatible with a device_map; huggingface/peft#306",
)
def device_map_at_stage_3(s: Setup) -> Iterable[Found]:
    """device_map or low_cpu_mem_usage with ZeRO-3."""
    if s.stage != 3:
        return
    for key in ("device_map", "low_cpu_mem_usage"):
        if arguments(s).get(key) not in (None, False):
            yield Found(
                what=f"{key} does not go with ZeRO-3: transformers refuses it", where=here(s, *at(s, key)),
                do=f"remove {key}", edits=main_edits(remove(*at(s, key))),
            )  # fmt: skip

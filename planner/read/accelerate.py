"""Accelerate's configuration file: its own DeepSpeed keys, or the file that it names."""

from __future__ import annotations

from typing import Any

from outlay.planner.read.companion import companion
from outlay.planner.read.deepspeed import section_of, values_of, whole
from outlay.planner.read.document import Document, KeyPath
from outlay.planner.read.meaning import DEEPSPEED, MAIN, Meaning, Said, Section, merged
from outlay.planner.read.program import loop_said

PLUGIN: dict[str, KeyPath] = {
    "zero_stage": ("zero_optimization", "stage"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("gradient_clipping",),
    "offload_optimizer_device": ("zero_optimization", "offload_optimizer", "device"),
    "offload_param_device": ("zero_optimization", "offload_param", "device"),
    "offload_optimizer_nvme_path": ("zero_optimization", "offload_optimizer", "nvme_path"),
    "offload_param_nvme_path": ("zero_optimization", "offload_param", "nvme_path"),
    "zero3_save_16bit_model": ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"),
}
"""accelerate 1.15, utils/dataclasses.py, DeepSpeedPlugin.__post_init__."""


def plugin_config(keys: dict[str, Any], mixed_precision: str | None) -> dict[str, Any]:
    """The DeepSpeed configuration that Accelerate makes of its own keys."""
    config: dict[str, Any] = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": keys.get("gradient_accumulation_steps", "auto"),
        "zero_optimization": {"stage": keys.get("zero_stage", 2)},
    }  # fmt: skip
    if (clipping := keys.get("gradient_clipping", "auto")) not in (None, 0):
        config["gradient_clipping"] = clipping
    for part in ("optimizer", "param"):
        device = str(keys.get(f"offload_{part}_device") or "none")
        if device != "none":
            offload: dict[str, Any] = {"device": device}
            if device == "nvme":
                offload["nvme_path"] = keys.get(f"offload_{part}_nvme_path")
            config["zero_optimization"][f"offload_{part}"] = offload
    if "zero3_save_16bit_model" in keys:
        save = keys["zero3_save_16bit_model"]
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = save
    if mixed_precision in ("bf16", "fp16"):
        config[mixed_precision] = {"enabled": True}
    return config


def read_accelerate(text: Document) -> Meaning:
    """An accelerate config; whether the script is a Trainer or a loop of one's own it does not say."""
    keys = text.get("deepspeed_config", default={})
    keys = keys if isinstance(keys, dict) else {}
    uses = str(text.get("distributed_type", default="")).upper() == "DEEPSPEED"
    documents = {MAIN: text}
    values: dict[str, Said] = {}

    def say(name: str, value: Any, *path: str) -> None:
        values[name] = Said(value=value, where=text.where(path), place=(MAIN, path))

    for name, key in (("world", "num_processes"), ("nodes", "num_machines")):
        if (count := whole(text.get(key))) is not None:
            say(name, count, key)
    mixed = text.get("mixed_precision")
    mixed = {"no": "fp32"}.get(str(mixed), str(mixed)) if mixed is not None else None
    if mixed in ("bf16", "fp16", "fp32"):
        say("precision", mixed, "mixed_precision")
    else:
        values["precision"] = Said(value="fp32", default="mixed_precision is not set")
    section, missing = None, None
    reference = keys.get("deepspeed_config_file")
    if uses and isinstance(reference, str):
        found = companion(reference, text)
        missing = reference if found is None else None
        if found is not None:
            documents[DEEPSPEED] = found
            section = section_of(found)
            inner = values_of(found.value, DEEPSPEED, (), found)
            values |= {k: v for k, v in inner.items() if k not in ("precision",) or not v.default}
    elif uses:
        translated: dict[KeyPath, KeyPath] = {
            ds: ("deepspeed_config", key) for key, ds in PLUGIN.items()
        }
        translated |= {(p, "enabled"): ("mixed_precision",) for p in ("bf16", "fp16")}
        config = plugin_config(keys, mixed)
        section = Section(config=config, document=None, translated=translated)
        if (accum := whole(keys.get("gradient_accumulation_steps"))) is not None:
            say("grad_accum", accum, "deepspeed_config", "gradient_accumulation_steps")
    values = merged(loop_said(text, documents), values)
    return Meaning(
        framework="accelerate", documents=documents, section=section, values=values, trainer=True,
        missing_file=missing, flags={"deepspeed_keys": keys, "uses_deepspeed": uses},
    )  # fmt: skip

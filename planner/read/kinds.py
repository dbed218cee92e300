"""Whose configuration a file is, by the keys that it has."""

from __future__ import annotations

from outlay.planner.read.document import Document
from outlay.planner.read.known import names, trainer_names
from outlay.profiles.errors import FileError

KINDS = ("deepspeed", "accelerate", "axolotl", "llamafactory", "trainer", "launch")
_MARKS = {
    "accelerate": ("distributed_type", "compute_environment", "deepspeed_config", "num_processes"),
    "axolotl": ("base_model", "micro_batch_size", "sequence_len"),
    "llamafactory": ("finetuning_type", "cutoff_len", "stage", "template", "lora_target"),
    "trainer": ("per_device_train_batch_size", "output_dir", "num_train_epochs"),
    "deepspeed": (
        "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "fp16", "bf16",
    ),
}  # fmt: skip
"""Keys that only this format has, or hardly any other; each counts three times."""
_FACTORY_V1 = {"dist_config", "kernel_config", "init_config"}


def kind_of(document: Document) -> str:
    """One of KINDS. Raises FileError where no format's keys are found."""
    if document.syntax == "command":
        return "launch"
    keys = set(document.value)
    schema = str(document.value.get("schema", ""))
    if schema.startswith("outlay/"):
        raise FileError(
            f"this is a file of outlay's own ({schema})", where=document.name,
            do={"outlay/plan@1": "outlay emit takes it", "outlay/job@1": "outlay plan takes it"}.get(schema, ""),
        )  # fmt: skip
    if "model" in keys and keys & _FACTORY_V1:
        raise FileError(
            "this is a configuration for LLaMA-Factory's v1 trainer, which is not read", where=document.where(()),
            do="check the DeepSpeed file that its dist_config names",
        )  # fmt: skip
    lists = {
        "deepspeed": names("deepspeed", "top_level"),
        "accelerate": names("accelerate", "keys"),
        "axolotl": names("axolotl", "keys"),
        "llamafactory": names("llamafactory", "keys") | trainer_names(),
        "trainer": trainer_names(),
    }
    score = {
        kind: len(keys & lists[kind]) + 3 * len(keys & set(_MARKS[kind])) for kind in _MARKS
    }  # fmt: skip
    if isinstance(document.value.get("bf16"), bool) or isinstance(document.value.get("fp16"), bool):
        score["deepspeed"] -= 8  # there they are blocks
    if not keys & set(_MARKS["llamafactory"]):
        score["llamafactory"] = 0
    if not keys & {"base_model", "base_model_config"}:
        score["axolotl"] = 0
    best = max(score, key=lambda kind: score[kind])
    if score[best] < 3:
        some = ", ".join(sorted(keys)[:8]) or "none"
        raise FileError(
            "no format that `outlay check` reads has keys like these", where=document.where(()),
            why=f"its top-level keys: {some}",
            do="pass a DeepSpeed JSON, an Accelerate, axolotl or LLaMA-Factory YAML, Trainer arguments or a "
            "launch script; --as says which of them it is",
        )  # fmt: skip
    return best

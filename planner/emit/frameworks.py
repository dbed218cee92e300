"""Plan → the configuration of a framework on transformers' Trainer: axolotl and LLaMA-Factory.

Below both is the Trainer, which compares the JSON with its arguments: so the JSON is the Trainer's, and
each framework's file says what the Trainer's arguments say, in its own words.
"""

from __future__ import annotations

from typing import Any

import yaml

from outlay.planner.emit.order import (
    Emitted,
    Order,
    require_gpu,
    require_plain,
    required_base_model,
    required_text,
)
from outlay.planner.emit.trainer import schedule_arguments, shared_arguments, trainer_deepspeed
from outlay.planner.spec.files import to_json
from outlay.planner.spec.job import Finetune
from outlay.profiles.errors import UsageError

AXOLOTL = "axolotl 0.19.0, utils/schemas"
LLAMAFACTORY = "LLaMA-Factory 0.9.5, hparams"
_AXOLOTL_ATTENTION = {"flash": "flash_attention_2"}
_FACTORY_ATTENTION = {"flash": "fa2", "eager": "disabled"}


def _common(order: Order) -> dict[str, Any]:
    """What both call as the Trainer does."""
    return shared_arguments(order.plan) | {"tf32": order.plan.job.precision == "tf32"}


def _lora_targets(order: Order) -> list[str]:
    """q and v, which the plan counts; both frameworks name matrices as the model's code does."""
    odd = [g for g in order.spec.blocks if g.attention.fused_qkv or g.attention.kv_rank]
    if odd:
        raise UsageError(
            f"the plan's LoRA is on q and v, and {order.plan.model.name} has no such matrices",
            where=order.where,
            why="q, k and v are one matrix, or go through a latent",
            do="plan with --finetune full",
        )
    return ["q_proj", "v_proj"]


def _whole_alpha(order: Order, tune: Finetune) -> int:
    """Both take whole numbers only."""
    if not tune.scale_alpha.is_integer():
        raise UsageError(
            f"lora_alpha is {tune.scale_alpha}, and both frameworks take whole numbers",
            where=order.where,
        )
    return int(tune.scale_alpha)


def _launch(order: Order, words: str, nodes: str) -> str:
    """launch.sh; with several nodes it runs on each."""
    lines = ["#!/bin/sh", f"# {order.head}. sh launch.sh: from within this folder", "set -e"]
    if order.plan.cluster.nodes > 1:
        lines += [": ${NODE_RANK:?0 on the first node} ${MASTER_ADDR:?host name of the first node}"]
        words = words.replace("NODES ", f"{nodes} ")
    return "\n".join([*lines, words.replace("NODES ", ""), ""])


def axolotl_config(order: Order) -> dict[str, Any]:
    """The keys of axolotl's AxolotlInputConfig."""
    job, strategy = order.plan.job, order.plan.strategy
    path, kind = required_text(order, "axolotl")
    schedule = schedule_arguments(job)
    config: dict[str, Any] = {
        "base_model": required_base_model(order, "axolotl"),
        "datasets": [{"path": path, "ds_type": kind, "type": "completion", "field": "text"}],
        "dataset_prepared_path": "prepared",
        "val_set_size": 0,
        "sequence_len": job.seq_len,
        "sample_packing": job.packing,
        "pad_to_sequence_len": True,
        "micro_batch_size": strategy.micro_batch,
        **_common(order),
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": schedule["lr_scheduler_type"],
        "warmup_steps": schedule["warmup_steps"],
        "gradient_checkpointing": strategy.activation_checkpointing == "full",
        "attn_implementation": _AXOLOTL_ATTENTION.get(job.attention, job.attention),
    }
    if "lr_scheduler_kwargs" in schedule:
        config["lr_scheduler_kwargs"] = schedule["lr_scheduler_kwargs"]
    if config["gradient_checkpointing"]:
        config["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return config | _axolotl_adapter(order)


def _axolotl_adapter(order: Order) -> dict[str, Any]:
    tune = order.plan.job.finetune
    if tune is None:
        return {}
    keys: dict[str, Any] = {
        "adapter": "qlora" if tune.quant.startswith("nf4") else "lora",
        "lora_r": tune.rank,
        "lora_alpha": _whole_alpha(order, tune),
        "lora_dropout": tune.dropout,
        "lora_target_modules": _lora_targets(order),
    }
    if tune.quant.startswith("nf4"):
        keys["load_in_4bit"] = True
        if tune.quant == "nf4":
            keys["bnb_config_kwargs"] = {"bnb_4bit_use_double_quant": False}
    elif tune.quant == "int8":
        keys["load_in_8bit"] = True
    return keys


def emit_axolotl(order: Order) -> Emitted:
    """axolotl.yaml and the JSON that it names."""
    require_plain(order, "axolotl", adapters=True)
    require_gpu(order, "axolotl")
    text = yaml.safe_dump(axolotl_config(order), sort_keys=False)
    cluster = order.plan.cluster
    words = f"exec axolotl train axolotl.yaml --launcher torchrun -- NODES --nproc_per_node={cluster.ranks_per_node}"
    nodes = (
        f'--nnodes={cluster.nodes} --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" '
        '--master_port="${MASTER_PORT:-29500}"'
    )
    files = {
        "axolotl.yaml": f"# {order.head}; keys of {AXOLOTL}\n{text}",
        "ds_config.json": to_json(trainer_deepspeed(order.deepspeed)),
        "launch.sh": _launch(order, words, nodes),
    }
    return Emitted(files=files, command="sh launch.sh", notes=_notes(order))


def llamafactory_config(order: Order) -> dict[str, Any]:
    """The keys of LLaMA-Factory's arguments."""
    job, strategy = order.plan.job, order.plan.strategy
    schedule = schedule_arguments(job)
    config: dict[str, Any] = {
        "model_name_or_path": required_base_model(order, "llamafactory"),
        "stage": "pt",
        "do_train": True,
        "dataset": "text",
        "dataset_dir": ".",
        "cutoff_len": job.seq_len,
        "packing": job.packing,
        "per_device_train_batch_size": strategy.micro_batch,
        **_common(order),
        "optim": "adamw_torch",
        **schedule,
        "disable_gradient_checkpointing": strategy.activation_checkpointing != "full",
        "use_reentrant_gc": False,
        "flash_attn": _FACTORY_ATTENTION.get(job.attention, job.attention),
        "report_to": "none",
    }
    if order.plan.cluster.kind == "cpu":
        config["use_cpu"] = True
    return config | _factory_adapter(order)


def _factory_adapter(order: Order) -> dict[str, Any]:
    tune = order.plan.job.finetune
    if tune is None:
        return {"finetuning_type": "full"}
    keys: dict[str, Any] = {
        "finetuning_type": "lora",
        "lora_rank": tune.rank,
        "lora_alpha": _whole_alpha(order, tune),
        "lora_dropout": tune.dropout,
        "lora_target": ",".join(_lora_targets(order)),
    }
    if tune.quant != "none":
        keys |= {"quantization_method": "bnb", "quantization_bit": 8 if tune.quant == "int8" else 4}
    if tune.quant.startswith("nf4"):
        keys |= {"quantization_type": "nf4", "double_quantization": tune.quant == "nf4-dq"}
    return keys


def emit_llamafactory(order: Order) -> Emitted:
    """llamafactory.yaml, the JSON that it names and the entry of its data."""
    require_plain(order, "llamafactory", adapters=True)
    path, _ = required_text(order, "llamafactory")
    text = yaml.safe_dump(llamafactory_config(order), sort_keys=False)
    cluster = order.plan.cluster
    # the port that it takes by itself is free on one node, and unknown to the others
    nodes = f'NNODES={cluster.nodes} MASTER_PORT="${{MASTER_PORT:-29500}}"'
    words = (
        f"{'DS_ACCELERATOR=cpu ' if cluster.kind == 'cpu' else ''}NODES FORCE_TORCHRUN=1 "
        f"NPROC_PER_NODE={cluster.ranks_per_node} llamafactory-cli train llamafactory.yaml"
    )
    files = {
        "llamafactory.yaml": f"# {order.head}; keys of {LLAMAFACTORY}\n{text}",
        "ds_config.json": to_json(trainer_deepspeed(order.deepspeed)),
        "dataset_info.json": to_json({"text": {"file_name": path, "columns": {"prompt": "text"}}}),
        "launch.sh": _launch(order, words, nodes),
    }
    return Emitted(files=files, command="sh launch.sh", notes=_notes(order))


def _notes(order: Order) -> tuple[str, ...]:
    if order.base_model:
        return ("the plan's memory holds where --base-model has the plan's sizes",)
    return ()

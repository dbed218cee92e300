"""Plan → a folder for Accelerate: its YAML, the DeepSpeed JSON that it names, a loop and a command.

The JSON is explicit throughout: with `deepspeed_config_file` Accelerate takes every value from it and
refuses the same value a second time in its YAML (accelerate, utils/dataclasses.py,
`_deepspeed_config_checks`). So the YAML has only what the JSON cannot say: how many processes, where.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import yaml

from outlay.planner.emit.order import Emitted, Order, require_plain
from outlay.planner.emit.trainer import model_file, schedule_arguments, script
from outlay.planner.spec.files import to_json

CHECKED_AGAINST = "accelerate 1.15.0, commands/config/config_args.py"


def accelerate_config(order: Order) -> dict[str, Any]:
    """The keys of accelerate's ClusterConfig."""
    cluster, strategy = order.plan.cluster, order.plan.strategy
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": "ds_config.json",
            "zero3_init_flag": strategy.zero == 3,
            "deepspeed_multinode_launcher": "standard",
        },
        "num_machines": cluster.nodes,
        "num_processes": cluster.ranks,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": cluster.kind == "cpu",
    }
    return config


def accelerate_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """The explicit JSON; under ZeRO-3 the weights are gathered for saving, or there would be none."""
    mine = deepcopy(config)
    if mine["zero_optimization"]["stage"] == 3:
        mine["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return mine


def _loop(order: Order) -> dict[str, Any]:
    """What neither file has words for, and the loop needs."""
    job = order.plan.job
    schedule = schedule_arguments(job)
    return {
        "max_steps": job.steps,
        "schedule": {
            "name": schedule["lr_scheduler_type"],
            "num_warmup_steps": schedule["warmup_steps"],
            "num_training_steps": job.steps,
            "scheduler_specific_kwargs": schedule.get("lr_scheduler_kwargs", {}),
        },
        "gradient_checkpointing": order.plan.strategy.activation_checkpointing == "full",
        "tf32": job.precision == "tf32",
        "save_steps": job.save_every,
        "seed": job.seed,
    }


def _launch(order: Order) -> str:
    lines = ["#!/bin/sh", f"# {order.head}. sh launch.sh TEXT_FILE...: from within this folder"]
    lines += ["set -e"]
    if order.plan.cluster.kind == "cpu":
        lines += ["export DS_ACCELERATOR=cpu"]
    words = "accelerate launch --config_file accelerate.yaml"
    if order.plan.cluster.nodes > 1:
        lines += [": ${NODE_RANK:?0 on the first node} ${MASTER_ADDR:?host name of the first node}"]
        words += ' --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR"'
        words += ' --main_process_port "${MASTER_PORT:-29500}"'
    return "\n".join([*lines, f'exec {words} train.py "$@"', ""])


def emit_accelerate(order: Order) -> Emitted:
    """accelerate.yaml, ds_config.json, and a loop that trains with them."""
    require_plain(order, "accelerate")
    text = yaml.safe_dump(accelerate_config(order), sort_keys=False)
    files = {
        "accelerate.yaml": f"# {order.head}; keys of {CHECKED_AGAINST}\n{text}",
        "ds_config.json": to_json(accelerate_deepspeed(order.deepspeed)),
        "loop.json": to_json(_loop(order)),
        "model.json": model_file(order),
        "pieces.py": script("pieces_script.txt"),
        "train.py": script("accelerate_script.txt"),
        "launch.sh": _launch(order),
    }
    return Emitted(files=files, command="sh launch.sh TEXT_FILE...")

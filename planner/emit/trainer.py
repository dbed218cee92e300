"""Plan → a folder that Hugging Face's Trainer runs: arguments, a JSON that agrees, a script, a command.

The Trainer compares the JSON with its arguments and refuses a difference (transformers,
integrations/deepspeed.py, `trainer_config_process`). So each value that it compares is `auto` in the
JSON and explicit in the arguments, and what it does not own (buckets, offload) stays explicit.
"""

from __future__ import annotations

import shlex
from copy import deepcopy
from importlib import resources
from typing import Any

from outlay.planner.emit.order import Emitted, Order, require_plain
from outlay.planner.spec.files import to_json
from outlay.planner.spec.job import Job
from outlay.planner.spec.plan import Plan

CHECKED_AGAINST = "transformers 5.23.0, training_args.py"

_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
_OWNED_OF_OPTIMIZER = ("lr", "betas", "eps", "weight_decay")


def schedule_arguments(job: Job) -> dict[str, Any]:
    """The Trainer's scheduler that ends where the job's does."""
    schedule = job.schedule
    arguments: dict[str, Any] = {"warmup_steps": schedule.warmup_steps}
    if schedule.name == "constant" or schedule.final_fraction == 1:
        return arguments | {"lr_scheduler_type": "constant_with_warmup"}
    if schedule.name == "cosine":
        kwargs = {"min_lr_rate": schedule.final_fraction}
        return arguments | {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": kwargs,
        }
    if schedule.name == "wsd":
        decay = {
            "num_decay_steps": round(
                schedule.decay_fraction * max(1, job.steps - schedule.warmup_steps)
            ),
            "decay_type": "linear",
            "min_lr_ratio": schedule.final_fraction,
        }
        return arguments | {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": decay,
        }
    end = {"lr_end": schedule.final_fraction * job.optimizer.lr, "power": 1.0}
    return arguments | {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": end}


def shared_arguments(plan: Plan) -> dict[str, Any]:
    """What every program that is built on the Trainer calls as the Trainer does."""
    job, optimizer = plan.job, plan.job.optimizer
    shared: dict[str, Any] = {
        "output_dir": "out",
        "deepspeed": "ds_config.json",
        "max_steps": job.steps,
        "gradient_accumulation_steps": plan.strategy.grad_accum,
        "learning_rate": optimizer.lr,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": job.gradient_clipping,
        "bf16": job.precision == "bf16",
        "fp16": job.precision == "fp16",
        "seed": job.seed,
        "logging_steps": 1,
        "save_strategy": "no" if job.save_every is None else "steps",
    }
    if job.save_every is not None:
        shared["save_steps"] = job.save_every
    return shared


def training_arguments(plan: Plan) -> dict[str, Any]:
    """The keywords of transformers.TrainingArguments (5.x)."""
    job, strategy = plan.job, plan.strategy
    arguments = shared_arguments(plan) | {
        "per_device_train_batch_size": strategy.micro_batch,
        **schedule_arguments(job),
        "gradient_checkpointing": strategy.activation_checkpointing == "full",
        "report_to": "none",
    }
    if arguments["gradient_checkpointing"]:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if job.precision == "tf32":
        arguments["tf32"] = True
    if plan.cluster.kind == "cpu":
        arguments["use_cpu"] = True
    return arguments


def trainer_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """The JSON with `auto` exactly where the Trainer compares it with an argument.

    Under ZeRO-3 the weights are gathered for saving: without that, `save_model` leaves none.
    """
    mine = deepcopy(config)
    for key in _OWNED:
        mine[key] = "auto"
    for key in _OWNED_OF_OPTIMIZER:
        mine["optimizer"]["params"][key] = "auto"
    for key in ("bf16", "fp16"):
        if key in mine:
            mine[key]["enabled"] = "auto"
    if mine["zero_optimization"]["stage"] == 3:
        mine["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return mine


def launch_command(plan: Plan) -> str:
    """A shell script that starts train.py on every rank of one node."""
    nodes, ranks = plan.cluster.nodes, plan.cluster.ranks_per_node
    words = ["torchrun", f"--nproc_per_node={ranks}"]
    if nodes == 1:
        words += ["--standalone"]
    else:
        words += [f"--nnodes={nodes}"]
    lines = [
        "#!/bin/sh",
        f"# sh launch.sh TEXT_FILE...: from within this folder. Arguments of {CHECKED_AGAINST}",
        "set -e",
    ]
    if plan.cluster.kind == "cpu":
        lines += ["export DS_ACCELERATOR=cpu"]
    command = shlex.join(words)
    if nodes > 1:
        lines += [": ${NODE_RANK:?0 on the first node} ${MASTER_ADDR:?host name of the first node}"]
        command += ' --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR"'
    return "\n".join([*lines, f'exec {command} train.py "$@"', ""])


def script(name: str) -> str:
    """One of the program texts beside this module."""
    return (resources.files("outlay.planner.emit") / name).read_text(encoding="utf-8")


def model_file(order: Order) -> str:
    """model.json: the configuration, the weights and how they are used."""
    job = order.plan.job
    return to_json(
        {
            "config": order.plan.model.config,
            "weights": order.weights,
            "seq_len": job.seq_len,
            "attention": job.attention,
        }
    )


def trainer_files(order: Order, target: str) -> dict[str, str]:
    """File name → text of what every rank needs to run train.py, for `target`'s launcher."""
    require_plain(order, target)
    return {
        "ds_config.json": to_json(trainer_deepspeed(order.deepspeed)),
        "training_args.json": to_json(training_arguments(order.plan)),
        "model.json": model_file(order),
        "pieces.py": script("pieces_script.txt"),
        "train.py": script("trainer_script.txt"),
    }


def emit_trainer(order: Order) -> Emitted:
    """Arguments, JSON, script and command. Raises UsageError where a plain Trainer could not do it."""
    files = trainer_files(order, "trainer") | {"launch.sh": launch_command(order.plan)}
    return Emitted(files=files, command="sh launch.sh TEXT_FILE...")

"""Job + Strategy → the DeepSpeed JSON, every size explicit.

DeepSpeed's defaults (5e8-element buckets, 1e9 live parameters) are written for large GPUs and
take gigabytes; `auto` belongs to transformers' Trainer. So the planner sizes the buckets and
both the estimate and the configuration read them from `bucket_sizes`.
"""

from __future__ import annotations

from typing import Any

from outlay.planner.estimate.buckets import bucket_sizes, max_live_parameters, sub_group_size
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError

_OPTIMIZER_TYPE = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}


def _zero_section(strategy: Strategy, spec: ModelSpec, nvme_path: str | None) -> dict[str, Any]:
    default_reduce, default_gather = bucket_sizes(spec, strategy.tp, strategy.pp)
    reduce_bucket = strategy.reduce_bucket_size or default_reduce
    gather_bucket = strategy.allgather_bucket_size or default_gather
    section: dict[str, Any] = {"stage": strategy.zero}
    if strategy.zero == 0:
        return section
    section |= {
        "contiguous_gradients": True,
        "overlap_comm": strategy.overlap_comm,
        "reduce_bucket_size": reduce_bucket,
    }
    if strategy.zero in (1, 2):
        section |= {"reduce_scatter": True, "allgather_bucket_size": gather_bucket}
    if strategy.zero == 3:
        section |= {
            "stage3_prefetch_bucket_size": gather_bucket,
            "stage3_param_persistence_threshold": min(100_000, 10 * spec.hidden),
            "stage3_max_live_parameters": int(max_live_parameters(gather_bucket)),
            "stage3_max_reuse_distance": int(max_live_parameters(gather_bucket)),
            "sub_group_size": int(sub_group_size(gather_bucket)),
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    for key in ("offload_optimizer", "offload_param"):
        device = getattr(strategy, key)
        if device != "none":
            section[key] = {"device": device, "pin_memory": True}
            if device == "nvme" and nvme_path is not None:
                section[key]["nvme_path"] = nvme_path
    return section


def deepspeed_config(
    job: Job,
    strategy: Strategy,
    spec: ModelSpec,
    cluster: Cluster,
    *,
    nvme_path: str | None = None,
) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` takes, for 0.19.8.

    The learning-rate schedule is the runner's (it must anneal within the budget), so there is no
    `scheduler` section. On CPU the optimizer is torch's: DeepSpeed's fused one would be compiled.
    `nvme_path`: the folder that offload to NVMe writes in; null leaves it to the caller.
    """
    optimizer = job.optimizer
    if optimizer.name not in _OPTIMIZER_TYPE:
        raise UsageError(
            f"optimizer {optimizer.name} can be estimated, but not written for DeepSpeed yet",
            do=f"one of {', '.join(_OPTIMIZER_TYPE)}",
        )
    params: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "sgd":
        params["momentum"] = optimizer.momentum
    else:
        params |= {"betas": list(optimizer.betas), "eps": optimizer.eps}
        if cluster.kind == "cpu" and strategy.offload_optimizer == "none":
            params["torch_adam"] = True
        if optimizer.name == "adam":
            params["adam_w_mode"] = False
    config: dict[str, Any] = {
        "train_batch_size": strategy.global_batch,
        "train_micro_batch_size_per_gpu": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.grad_accum,
        "gradient_clipping": job.gradient_clipping,
        "optimizer": {"type": _OPTIMIZER_TYPE[optimizer.name], "params": params},
        "zero_optimization": _zero_section(strategy, spec, nvme_path),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if job.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif job.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16}
    if strategy.pp > 1:
        config["pipeline"] = {
            "activation_checkpoint_interval": int(strategy.activation_checkpointing == "full")
        }
    if strategy.tp > 1:
        config["tensor_parallel"] = {"autotp_size": strategy.tp}
    if strategy.sp > 1:
        config["sequence_parallel_size"] = strategy.sp
    return config

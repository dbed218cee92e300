"""Job + Strategy → the DeepSpeed JSON, every size explicit.

DeepSpeed's defaults (5e8-element buckets, 1e9 live parameters) are written for large GPUs and
take gigabytes; `auto` belongs to transformers' Trainer. So the planner sizes the buckets and
both the estimate and the configuration read them from `bucket_sizes`.
"""

from __future__ import annotations

from typing import Any

from outlay.planner.emit.optimizer import optimizer_section
from outlay.planner.estimate.buckets import (
    bucket_sizes,
    max_live_parameters,
    parameter_buffer_size,
    sub_group_size,
)
from outlay.planner.estimate.parameters import largest_matrix
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy


def _zero_section(strategy: Strategy, spec: ModelSpec, nvme_path: str | None) -> dict[str, Any]:
    swapped = strategy.offload_optimizer == "nvme"
    default_reduce, default_gather = bucket_sizes(
        spec, strategy.tp, strategy.pp, strategy.ep, swapped=swapped
    )
    shards = strategy.dp * strategy.cp * strategy.sp
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
            "stage3_max_live_parameters": int(max_live_parameters(gather_bucket, swapped)),
            "stage3_max_reuse_distance": int(max_live_parameters(gather_bucket, swapped)),
            "sub_group_size": int(sub_group_size(gather_bucket, shards, swapped)),
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    for key in ("offload_optimizer", "offload_param"):
        device = getattr(strategy, key)
        if device != "none":
            section[key] = {"device": device, "pin_memory": True}
            if device == "nvme" and nvme_path is not None:
                section[key]["nvme_path"] = nvme_path
    if strategy.offload_param == "nvme":
        # DeepSpeed's own: 2 GB of buffers in fp32, and the first 1e9 weights stay in memory.
        size = parameter_buffer_size(largest_matrix(spec) // strategy.tp, shards)
        section["offload_param"] |= {"buffer_size": int(size), "max_in_cpu": 0}
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
    `scheduler` section. `nvme_path`: the folder that offload to NVMe writes in; null leaves it to the caller.
    """
    optimizer = optimizer_section(job.optimizer, strategy, cluster)
    config: dict[str, Any] = {
        "train_batch_size": strategy.global_batch,
        "train_micro_batch_size_per_gpu": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.grad_accum,
        "gradient_clipping": job.gradient_clipping,
        **({} if optimizer is None else {"optimizer": optimizer}),
        "zero_optimization": _zero_section(strategy, spec, nvme_path),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if job.optimizer.name == "muon" and strategy.zero == 3:
        # refused otherwise (`runtime/zero/stage3.py`): whole gradients are made orthogonal
        config["zero_optimization"]["reduce_scatter"] = False
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

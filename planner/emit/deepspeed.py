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


def left_to_the_script(job: Job, strategy: Strategy) -> tuple[str, ...]:
    """What the plan counts on and the JSON has no words for: a trainer of one's own has to do it.

    tp: DeepSpeed 0.19.8, runtime/config.py:458-471 (without an mpu every rank is data parallel; tried on two
    ranks). sp: runtime/sequence_parallel/ulysses_sp.py. ep: runtime/engine.py:829-860.
    """
    tp, pp, sp, ep = strategy.tp, strategy.pp, strategy.sp, strategy.ep
    layers = (
        "all layers" if strategy.recompute_layers is None else f"{strategy.recompute_layers} layers"
    )
    recomputed = strategy.activation_checkpointing
    parts = (
        (tp > 1,
         f"tensor parallel {tp}: call deepspeed.utils.groups._init_tp_mesh_device(tensor_model_parallel_size={tp}) "
         "and pass deepspeed.initialize(…, mpu=deepspeed.utils.groups), or DeepSpeed takes every rank for data "
         f"parallel and refuses the batch; ranks of one rank // {tp} get the same batches"),
        (pp > 1, f"pipeline: the model has to be a deepspeed.pipe.PipelineModule with num_stages={pp}"),
        (sp > 1,
         f"sequence parallel {sp}: pass the mpu of deepspeed.runtime.sequence_parallel.ulysses_sp."
         f"UlyssesSPAttentionHF.register_with_transformers(…, sequence_parallel_size={sp})"),
        (ep > 1, f"expert parallel {ep}: the layers of your own code have to share out the experts"),
        (recomputed == "full" and pp == 1,
         f"recomputation of {layers}: the model's gradient_checkpointing_enable() is for all of them"
         if strategy.recompute_layers is not None else
         "recomputation: call the model's gradient_checkpointing_enable()"),
        (recomputed == "selective", "selective recomputation: of attention alone, in the model's own code"),
        (strategy.loss != "plain", f"a {strategy.loss} loss: the model's own must not hold whole logits"),
        (job.finetune is not None, "adapters: the model has to have them before deepspeed.initialize"),
        (job.compress is not None, "compression: `outlay run` does it; the JSON says nothing of it"),
        (job.precision == "tf32", "tf32: set torch.backends.cuda.matmul.allow_tf32 = True"),
    )  # fmt: skip
    return tuple(f"not in the JSON: {text}" for present, text in parts if present)

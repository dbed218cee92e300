"""Where DeepSpeed 0.19.8 does something else than it says: each repair names the place.

All act on one engine or put back what DeepSpeed changed for the whole process, but `muon_as_written`, which
unwraps three functions; none patches a class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from outlay.profiles.errors import CheckpointError

_LINEAR = functional.linear


def keep_grad_norm(engine: Any) -> None:
    """Keep the gradient norm of fp32 without ZeRO.

    `clip_fp32_gradients` (runtime/engine.py) throws away what `clip_grad_norm_` returns, so that
    `get_global_grad_norm` says nothing.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(),
            max_norm=engine.gradient_clipping(),
            mpu=engine.mpu,
        )

    engine.clip_fp32_gradients = clip


def count_all_stages(module: Any) -> None:
    """Make the gradient norm of an fp32 pipeline without ZeRO count every stage.

    `clip_grad_norm_` (runtime/utils.py) counts the weights of a later stage only where they are
    marked as model parallel, and so would clip by the first stage's norm.
    """
    for parameter in module.parameters():
        parameter.model_parallel = not parameter.ds_pipe_replicated


def forget_first_step(engine: Any) -> None:
    """Undo the optimizer step that bf16 and fp16 without ZeRO take before training.

    `initialize_optimizer_states` (runtime/fp16/*_optimizer.py) makes the moments with a real step
    on zero gradients: it decays the weights once, and Adam's bias correction then starts at its
    second step, which halves the first update.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    wrapper = engine.optimizer
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        groups = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        pairs = [pair for masters, used in groups for pair in zip(masters, used, strict=True)]
    elif isinstance(wrapper, FP16_Optimizer):
        pairs = list(zip(wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True))
    else:
        return
    for master, used in pairs:
        master.data.copy_(used.data)
    wrapper.optimizer.state.clear()
    for group in wrapper.optimizer.param_groups:
        group.pop("step", None)


def muon_as_written() -> None:
    """Let Muon's functions run uncompiled, on CPU.

    `original_muon.py` wraps them in `torch.compile`, which needs a C++ compiler there and takes about a
    minute for every shape of matrix.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for name in ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz", "muon_update"):
        for module in (original_muon, muon_optimizer):
            wrapped = getattr(module, name, None)
            if wrapped is not None:
                plain = getattr(wrapped, "_torchdynamo_orig_callable", wrapped)
                setattr(module, name, plain)


def release(engine: Any | None) -> None:
    """Free what an engine holds, so that another can be built in the same process.

    `destroy` leaves ZeRO-3's replacement of `torch.nn.functional.linear`, the process groups, the
    grid of the last pipeline, which the next engine would take for its own, and two module-level
    references to a ZeRO-3 model. `engine` null: one whose building failed half-way.
    """
    from deepspeed.runtime.pipe import p2p
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d

    if engine is not None:
        engine.destroy()
        _drop_graphs(engine)
    functional.linear = _LINEAR
    parameter_offload.FWD_MODULE_STACK.clear()
    # A cached method, so the cache holds the coordinator and its model.
    cached = vars(PartitionedParameterCoordinator)[
        "_PartitionedParameterCoordinator__params_to_release"
    ]
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    world = distributed_c10d._get_default_group()
    for group in list(distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)
    groups._release_process_group_references(None)
    p2p._grid = None


def _drop_graphs(engine: Any) -> None:
    """A pipeline keeps its last loss: its graph holds hooks that hold the engine, out of gc's sight."""
    for name in ("loss", "total_loss", "outputs", "fwd_outputs", "pipe_buffers", "grad_layer"):
        if name in vars(engine):
            setattr(engine, name, None)


def load_weights_only(engine: Any) -> None:
    """Make this engine read its shards without running code from them.

    `TorchCheckpointEngine.load` unpickles with `weights_only=False`. The shards hold three classes
    of DeepSpeed's, none of which does more than carry numbers.
    """
    from pickle import UnpicklingError

    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def read(path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except UnpicklingError as error:
            why = str(error).strip().splitlines()[-1]
            raise CheckpointError("a shard holds more than numbers", where=path, why=why) from error

    engine.checkpoint_engine.load = read

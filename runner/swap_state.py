"""Optimizer states that live on NVMe, in a checkpoint and back.

DeepSpeed 0.19.8 copies its swap folder and then reads the fp32 weights alone from it: a resumed engine
has lost Adam's moments and its count of steps, and whatever was too small to be swapped
(`runtime/engine.py`, `load_checkpoint`: the states are not loaded where they are on NVMe). So here each
rank writes its sub-groups one by one, and reads them back the same way; DeepSpeed writes only the
module's own state.

    FOLDER/swapped/rank-00000/group-00000.pt    fp32 weights, moments and step of one sub-group
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SWAPPED = "swapped"


def on_nvme(engine: Any) -> bool:
    """Whether the states of this engine's optimizer live on NVMe."""
    return bool(engine.zero_nvme_offload_optimizer())


@contextlib.contextmanager
def without_deepspeeds_own(engine: Any) -> Iterator[None]:
    """While DeepSpeed saves or loads the module: it neither copies its swap folder nor reads states."""
    instance = vars(engine)
    saved = engine.save_zero_checkpoint
    engine.zero_nvme_offload_optimizer = lambda: False
    engine._load_zero_checkpoint = lambda *args, **kwargs: True
    engine.save_zero_checkpoint = False
    try:
        yield
    finally:
        engine.save_zero_checkpoint = saved
        del instance["zero_nvme_offload_optimizer"], instance["_load_zero_checkpoint"]


def save(engine: Any, folder: Path) -> None:
    """Write this rank's sub-groups."""
    zero = engine.optimizer
    rank = _rank_folder(folder)
    rank.mkdir(parents=True, exist_ok=True)
    for index, weights in enumerate(zero.fp32_partitioned_groups_flat):
        with _in_memory(zero, index, changed=False):
            state = zero.optimizer.state.get(weights, {})
            kept = {"weights": weights.data.clone(), "state": _copied(state)}
            torch.save(kept, _file(rank, index))


def load(engine: Any, folder: Path) -> None:
    """Read this rank's sub-groups back, and give the module the weights of that moment."""
    zero = engine.optimizer
    rank = _rank_folder(folder)
    # What is gathered for good (norms) is split before and gathered anew after.
    zero.checkpoint_event_prologue()
    for index, weights in enumerate(zero.fp32_partitioned_groups_flat):
        kept = torch.load(_file(rank, index), map_location="cpu", weights_only=True)
        with _in_memory(zero, index, changed=True):
            weights.data.copy_(kept["weights"])
            if kept["state"]:
                zero.optimizer.state[weights] = kept["state"]
            zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()


@contextlib.contextmanager
def _in_memory(zero: Any, index: int, *, changed: bool) -> Iterator[None]:
    """One sub-group read from NVMe for a while; written back only where it was changed."""
    swappable = zero._swappable_optimizer_subgroup(index)
    if swappable:
        zero._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if swappable and changed:
            zero._optimizer_states_and_gradient_swap_out(index)
        elif swappable:
            zero._release_swap_buffers(index)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _rank_folder(folder: Path) -> Path:
    return folder / SWAPPED / f"rank-{torch.distributed.get_rank():05d}"


def _file(folder: Path, index: int) -> Path:
    return folder / f"group-{index:05d}.pt"

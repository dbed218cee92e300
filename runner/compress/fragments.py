"""Where the fp32 master of a weight lies, in every ZeRO stage: views that are masked in place.

    stage 0, fp32        the weight itself
    stage 0, bf16, fp16  DeepSpeed's flat copy of all weights (or one copy a weight)
    stages 1 and 2       this rank's partition of the flat copy, linked by `_hp_mapping`
    stage 3              this rank's partition of each weight, one after the other in a sub-group

With offload the same tensors are in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from outlay.runner.compress.parts import Live


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A run of one weight, flattened, that this rank holds the master of."""

    name: str
    start: int
    """Its first element in the weight (or in this rank's slice of it, tensor parallel)."""
    length: int
    holder: torch.Tensor
    """What the optimizer steps on."""
    offset: int
    """Where in the holder it begins."""

    def view(self, of: torch.Tensor | None = None) -> torch.Tensor:
        """The masters, or the same place in an optimizer state of the holder's size."""
        tensor = self.holder if of is None else of
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def fragments_of(engine: Any, weights: dict[str, Live]) -> list[Fragment]:
    """Of a DeepSpeed engine; a rank may hold no part of a weight."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        find = _partitioned
    elif hasattr(wrapper, "fp32_groups_flat"):
        find = _flat
    elif hasattr(wrapper, "fp32_groups"):
        find = _one_each
    elif wrapper is inner_optimizer(engine):
        find = _itself
    else:
        find = _linked
    return [
        found
        for name, held in weights.items()
        for found in find(wrapper, name, held.weight)
        if found.length > 0
    ]


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The one that does the arithmetic, under DeepSpeed's."""
    wrapper = engine.optimizer
    found: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
    return found


def _itself(wrapper: Any, name: str, weight: Any) -> Iterator[Fragment]:
    del wrapper
    yield Fragment(name=name, start=0, length=weight.numel(), holder=weight, offset=0)


def _flat(wrapper: Any, name: str, weight: Any) -> Iterator[Fragment]:
    """FP16_Optimizer (also bf16): the weights of a group one after the other."""
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
        offset = 0
        for held in group:
            if held is weight:
                yield Fragment(
                    name=name, start=0, length=weight.numel(), holder=flat, offset=offset
                )
            offset += held.numel()


def _one_each(wrapper: Any, name: str, weight: Any) -> Iterator[Fragment]:
    """FP16_UnfusedOptimizer: one master for each weight."""
    for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for held, master in zip(group, masters, strict=True):
            if held is weight:
                yield Fragment(name=name, start=0, length=weight.numel(), holder=master, offset=0)


def _linked(wrapper: Any, name: str, weight: Any) -> Iterator[Fragment]:
    """Stages 1 and 2, BF16_Optimizer: the mapping that DeepSpeed keeps for its own checkpoints."""
    mapping = weight._hp_mapping
    if mapping is None:
        return
    there, here = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    (holder,) = wrapper.optimizer.param_groups[mapping.param_group_index]["params"]
    yield Fragment(
        name=name, start=there.start, length=there.numel, holder=holder, offset=here.start
    )


def _partitioned(wrapper: Any, name: str, weight: Any) -> Iterator[Fragment]:
    """Stage 3: equal parts of each weight; the last is filled up beyond the weight's end."""
    group, offset, length = wrapper.grad_position[wrapper.get_param_id(weight)]
    start = torch.distributed.get_rank(weight.ds_process_group) * weight.ds_tensor.ds_numel
    yield Fragment(
        name=name,
        start=start,
        length=min(length, max(0, weight.ds_numel - start)),
        holder=wrapper.fp32_partitioned_groups_flat[group],
        offset=offset,
    )

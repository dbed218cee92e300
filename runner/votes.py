"""What all ranks must agree on before a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from outlay.runner.control import Stop

STOPS: tuple[Stop | None, ...] = (None, "walltime", "forecast", "budget")
"""As ranks tell it each other: a number; the largest counts."""


class Votes:
    """Small integers that all ranks must agree on, over gloo so that no device is waited for."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo") if world > 1 else None

    def largest(self, *values: int) -> list[int]:
        """Element by element the largest that any rank says."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return [int(v) for v in tensor]

    def gather(self, value: int) -> list[int]:
        """What each rank says, by rank."""
        if self._group is None:
            return [value]
        tensors = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world)]
        dist.all_gather(tensors, torch.tensor([value]), group=self._group)
        return [int(t) for t in tensors]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all ranks do before the next step."""

    signalled: bool
    stop: Stop | None
    total_steps: int
    """Where the schedule ends."""
    save: bool
    evaluate: bool
    rehearse: bool

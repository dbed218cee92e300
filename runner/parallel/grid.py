"""Pipeline and tensor parallel together: each stage of each data-parallel rank is `tp` processes.

DeepSpeed's PipelineModule takes a topology with a `model` axis (runtime/pipe/topology.py,
PipeModelDataParallelTopology) and leaves it to the layers what they do along it; here they are the
slices of tensor.py. Ranks of a group are neighbours: rank = (stage · dp + data) · tp + slice. Whole
hidden states travel between the stages, each slice to its like.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from outlay.planner.spec.plan import Plan
from outlay.runner.loading import quiet
from outlay.runner.parallel.tensor import Cutter, copy_whole, sliced_loss
from outlay.runner.pipeline import PipelineEngine, module_of, start
from outlay.runner.stage import Embedding, Stage


class CutStage(Stage):
    """A stage whose parts are cut as soon as they are filled."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._cutter = Cutter(self.model, plan, _neighbours(plan.strategy.tp))

    def take(self, name: str) -> nn.Module:
        """The part of that name, this rank's slice of it."""
        super().take(name)
        if self._cutter.tied and name == self._cutter.embedding:
            super().take(self._cutter.head)
        self._cutter.cut(name)
        return self.model.get_submodule(name)

    def product(self, embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
        """By the head that shares the embedding's slice: it adds up the gradients of `hidden`."""
        logits: torch.Tensor = self.sliced_head(hidden)
        return logits

    @property
    def sliced_head(self) -> Any:
        """The layer that makes this rank's slice of the logits, on the last stage."""
        return self.model.get_submodule(self._cutter.head)


def _neighbours(tp: int) -> Any:
    """The group of ranks that share this rank's matrices; all ranks make all groups."""
    rank, world, mine = torch.distributed.get_rank(), torch.distributed.get_world_size(), None
    for first in range(0, world, tp):
        group = torch.distributed.new_group(list(range(first, first + tp)))
        if first <= rank < first + tp:
            mine = group
    return mine


def _loss(stage: CutStage, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return sliced_loss(stage.sliced_head, logits, ids)


class TensorPipelineEngine(PipelineEngine):
    """Stages over the ranks, each cut into slices; ZeRO 0 or 1 over the data-parallel ones."""

    @staticmethod
    def _initialize(plan: Plan) -> Any:
        from deepspeed.module_inject import set_autotp_mode
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        strategy, config = plan.strategy, copy.deepcopy(plan.deepspeed)
        # AutoTP would make groups of its own, from all ranks.
        config.pop("tensor_parallel", None)
        # Pieces of hidden states would have to be put together again by each receiver.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        set_autotp_mode(training=True)
        with quiet():
            stage = CutStage(plan)
        topology = PipeModelDataParallelTopology(
            num_pp=strategy.pp, num_mp=strategy.tp, num_dp=strategy.dp
        )
        module = module_of(stage, plan, partial(_loss, stage), topology)
        _count_once(module, strategy.tp)
        return start(module, stage, plan, config)

    @staticmethod
    def _undo() -> None:
        from deepspeed.module_inject import set_autotp_mode

        set_autotp_mode(training=False)

    @property
    def _slice(self) -> int:
        return self.rank % self.plan.strategy.tp

    def _seed_of_rank(self) -> int:
        return self.rank // self.plan.strategy.tp

    def _copy(self, inner: nn.Module, values: dict[int, torch.Tensor]) -> None:
        """Put together from the slices of its group, on the first of it."""
        for layer in inner.modules():
            copy_whole(layer, values, keep=self._slice == 0)
        if self._slice == 0:
            super()._copy(inner, values)  # buffers


def _count_once(module: nn.Module, tp: int) -> None:
    """Which weights this rank adds to the gradient's norm: its slices; whole ones on the first slice
    alone; of a tie one copy (as `repairs.count_all_stages`, which knows no slices)."""
    first = torch.distributed.get_rank() % tp == 0
    for parameter in module.parameters():
        sliced = bool(getattr(parameter, "tensor_model_parallel", False))
        counted = (first or sliced) and not parameter.ds_pipe_replicated  # type: ignore[attr-defined]
        parameter.model_parallel = counted  # type: ignore[attr-defined]

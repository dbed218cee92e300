"""A transformers decoder as a DeepSpeed pipeline: embedding, blocks, norm with head become layers.

Each stage fills only its own parts of the model (`stage.py`). Tied embeddings stay one weight:
DeepSpeed adds up the gradients of its two copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner import repairs
from outlay.runner.engine import Engine, initialize, quiet
from outlay.runner.export import host_copies
from outlay.runner.loss import loss_of_stage
from outlay.runner.model import compile_blocks, recompute, skeleton
from outlay.runner.optimizers import own_optimizer
from outlay.runner.stage import DecoderBlock, Part, Stage, layers_of

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Module(PipelineModule):  # type: ignore[misc]
    """PipelineModule whose stage boundaries are given."""

    def __init__(self, layers: list[LayerSpec], bounds: Sequence[int], **kwargs: Any) -> None:
        # nn.Module refuses attributes before its own __init__, which the base class calls.
        self.__dict__["bounds"] = list(bounds)
        super().__init__(layers, **kwargs)

    def _partition_layers(self, method: str = "uniform") -> None:
        del method
        self.parts = self.__dict__["bounds"]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()


def module_of(stage: Stage, plan: Plan, loss: Loss, topology: Any = None) -> PipelineModule:
    """This rank's layers, filled. `topology`: which rank is where; null = stages and data alone."""
    layers, bounds = layers_of(stage, plan)
    with quiet():
        return _Module(
            layers,
            bounds,
            num_stages=plan.strategy.pp,
            topology=topology,
            loss_fn=loss,
            base_seed=plan.job.seed,
        )


def start(module: PipelineModule, stage: Stage, plan: Plan, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine for these layers."""
    # Recomputation is per block (below): DeepSpeed's would include the head.
    config.setdefault("pipeline", {})["activation_checkpoint_interval"] = 0
    local = [part.inner for part in module.modules() if isinstance(part, DecoderBlock)]
    if plan.strategy.activation_checkpointing == "full":
        recompute(local, _share(plan))
    if plan.job.compile:
        compile_blocks(local)
    return initialize(module, config, build=own_optimizer(plan, stage.model))


class PipelineEngine(Engine):
    """Stages over the ranks; each stage with its data-parallel group, ZeRO 0 or 1."""

    pipeline = True

    def __init__(self, plan: Plan, engine: Any) -> None:
        super().__init__(plan, engine)
        self.is_loss_rank = bool(engine.is_last_stage())

    @staticmethod
    def _initialize(plan: Plan) -> Any:
        stage = Stage(plan)
        module = module_of(stage, plan, loss_of_stage(stage, plan.strategy.loss))
        repairs.count_all_stages(module)
        return start(module, stage, plan, copy.deepcopy(plan.deepspeed))

    def _data_parallel(self) -> tuple[int, int]:
        return self.deepspeed.grid.data_parallel_id, self.deepspeed.grid.data_parallel_size

    def train_step(self, micro_batches: Sequence[torch.Tensor]) -> float:
        """One optimizer step; mean loss of the global batch, the same number on all ranks."""
        self._check_batches(micro_batches)
        return float(self.deepspeed.train_batch(_pairs(micro_batches)))

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        """Mean loss over the batches of all data-parallel ranks, no step."""
        given = list(batches)
        if not given:
            raise UsageError("there is not one batch to evaluate on")
        # The receive buffers are kept from step to step and have the shape of the first.
        self.deepspeed.reset_activation_shape()
        loss = self.deepspeed.eval_batch(_pairs(given), num_micro_batches=len(given))
        self.deepspeed.reset_activation_shape()
        self.deepspeed.module.train()
        return float(loss)

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """On rank 0 all weights by transformers' names, on the CPU, ties kept; null on the others."""
        module = self.deepspeed.module
        mine: dict[str, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        if self.dp_rank == 0:
            for part in (m for m in module.modules() if isinstance(m, Part)):
                self._copy(part.inner, values)
                for key, tensor in part.inner.state_dict(keep_vars=True).items():
                    if id(tensor) in values:
                        mine[f"{part.name}.{key}"] = values[id(tensor)]
        whole = self._to_rank_0(mine)
        if self.rank != 0:
            return None
        return _in_model_order(whole, self.plan)

    def _copy(self, inner: nn.Module, values: dict[int, torch.Tensor]) -> None:
        """Copies of all tensors of a part, where this rank is the one that has them."""
        host_copies(list(inner.state_dict(keep_vars=True).values()), values)

    def _to_rank_0(self, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collect the stages' weights, one tensor at a time; the first stage's copy of a tie wins."""
        whole = dict(mine)
        for sender in range(1, self.world):
            named = [(name, t.shape, t.dtype) for name, t in mine.items()]
            announced = [named if self.rank == sender else None]
            torch.distributed.broadcast_object_list(announced, src=sender)
            for name, shape, dtype in announced[0] or []:
                if self.rank == sender:
                    torch.distributed.send(mine[name].to(self.device), dst=0)
                elif self.rank == 0:
                    arrived = torch.empty(shape, dtype=dtype, device=self.device)
                    torch.distributed.recv(arrived, src=sender)
                    whole.setdefault(name, arrived.cpu())
        return whole


def _share(plan: Plan) -> int | None:
    """How many blocks each stage computes again: its part, rounded up, as the planner counts them."""
    count = plan.strategy.recompute_layers
    return None if count is None else -(-count // plan.strategy.pp)


def _pairs(batches: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs of the first stage, labels of the last): the loss shifts them itself."""
    return ((batch, batch) for batch in batches)


def _in_model_order(whole: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    model = skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
    names = model.state_dict(keep_vars=True)
    by_weight = {id(tensor): whole[name] for name, tensor in names.items() if name in whole}
    return {name: by_weight[id(tensor)] for name, tensor in names.items()}

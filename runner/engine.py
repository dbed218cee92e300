"""A DeepSpeed engine from a Plan, in the ranks of a process group that already lives.

    init_process_group(RankInfo.from_environment())
    engine = Engine.build(plan)                        # on every rank
    loss = engine.train_step(micro_batches)            # grad_accum tensors [micro_batch, seq_len]
    engine.close()                                     # another engine may follow in the same ranks

Every method is collective: all ranks call it, in the same order. In a pipeline all stages of one
data-parallel rank are given the same tensors.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError, UsageError
from outlay.runner import engine_state, repairs, swap
from outlay.runner.adapters import adapt
from outlay.runner.compress import training as compression
from outlay.runner.compress.distill import Distiller
from outlay.runner.host import tame_deepspeed
from outlay.runner.loading import fill_partitioned, gathered, quiet, refusals
from outlay.runner.loss import attach, model_loss
from outlay.runner.model import (
    Filler,
    blocks_of,
    compile_blocks,
    parts_of,
    recompute,
    skeleton,
)
from outlay.runner.optimizers import Build, own_optimizer, set_rates
from outlay.runner.parallel.expert_load import ExpertLoad, ExpertUse
from outlay.runner.quantized import fill
from outlay.runner.refuse import refuse


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Which rank this process is."""

    rank: int
    local_rank: int
    world: int

    @classmethod
    def from_environment(cls) -> RankInfo:
        """From RANK, LOCAL_RANK and WORLD_SIZE, as launchers set them."""
        missing = [k for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if k not in os.environ]
        if missing:
            raise UsageError(
                f"this is no rank process: {', '.join(missing)} is not set",
                do="start it with `outlay run`",
            )
        return cls(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            world=int(os.environ["WORLD_SIZE"]),
        )


def init_process_group(
    info: RankInfo,
    *,
    backend: str | None = None,
    init_method: str = "env://",
    timeout_s: float = 1800.0,
) -> None:
    """Join the ranks. `env://` reads MASTER_ADDR and MASTER_PORT; `file:///path` needs no port.

    `backend` null: gloo on CPU, nccl on CUDA. `timeout_s` bounds every collective (on gloo).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ.update(
        RANK=str(info.rank), LOCAL_RANK=str(info.local_rank), WORLD_SIZE=str(info.world)
    )
    tame_deepspeed()
    get_accelerator().set_device(info.local_rank)
    with quiet():
        deepspeed.init_distributed(
            dist_backend=backend or get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
            init_method=init_method,
            rank=info.rank,
            world_size=info.world,
        )


class Engine:
    """ZeRO 0–3 over all ranks. `PipelineEngine` (runner/pipeline.py) is the same with stages."""

    pipeline = False
    """Whether the model is cut into stages."""
    _swap: Path | None = None
    """A folder for NVMe that is this engine's alone."""

    def __init__(self, plan: Plan, engine: Any) -> None:
        self.plan = plan
        self.deepspeed = engine
        self.device: torch.device = torch.device(engine.device)
        self.rank = torch.distributed.get_rank()
        self.world = torch.distributed.get_world_size()
        self.dp_rank, self.dp_size = self._data_parallel()
        self.is_loss_rank = True
        """Whether the loss is computed here; `train_step` returns it everywhere all the same."""
        repairs.load_weights_only(engine)
        repairs.keep_grad_norm(engine)
        repairs.forget_first_step(engine)
        seed_everything(plan.job.seed, self._seed_of_rank())
        self.compressor = compression.Compressor.of(self)
        self.distiller = Distiller.of(self)
        self.expert_load = ExpertLoad.of(self)
        self.last_expert_use: ExpertUse | None = None
        """Of the last step, where the model has experts."""

    @classmethod
    def build(cls, plan: Plan) -> Engine:
        """Build the model and the engine that the plan asks for; refuses what cannot be run."""
        if not torch.distributed.is_initialized():
            raise OutlayError("the process group is missing", do="call init_process_group first")
        from deepspeed.accelerator import get_accelerator

        refuse(plan, torch.distributed.get_world_size(), get_accelerator().device_name())
        if plan.job.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        kind, folder = _kind_of(plan), None
        if not swap.named(plan):
            plan, folder = swap.in_temporary(plan)
        try:
            made = kind(plan, kind._initialize(plan))
        except BaseException:
            kind._undo()
            repairs.release(None)
            _remove(folder)
            raise
        made._swap = folder
        return made

    @staticmethod
    def _initialize(plan: Plan, groups_of: Callable[[Plan, nn.Module], Any] | None = None) -> Any:
        """`groups_of` makes DeepSpeed's mpu where ranks share a sequence."""
        config = copy.deepcopy(plan.deepspeed)
        model = skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
        compression.prepare(model, plan)
        filler = Filler(model, plan.model, seed=plan.job.seed, device=current_device())
        if plan.strategy.zero == 3:
            fill_partitioned(model, filler, config)
        else:
            fill(model, filler, plan.job)
        adapt(model, plan.job)
        attach(model, plan.strategy.loss)
        if plan.strategy.activation_checkpointing == "full":
            recompute(list(blocks_of(model)), plan.strategy.recompute_layers)
        if plan.job.compile:
            compile_blocks(list(blocks_of(model)))
        groups = None if groups_of is None else groups_of(plan, model)
        return initialize(model, config, groups, build=own_optimizer(plan, model))

    @staticmethod
    def _undo() -> None:
        """Put back what building replaced in other packages."""

    def _data_parallel(self) -> tuple[int, int]:
        return self.rank, self.world

    def _seed_of_rank(self) -> int:
        """Ranks with the same number draw the same dropout."""
        return self.rank

    @property
    def _loss_weight(self) -> float:
        """By what the loss is multiplied before its backward pass."""
        return 1.0

    @property
    def _losses(self) -> int:
        """How many means the ranks' losses sum up to."""
        return self.world

    def train_step(self, micro_batches: Sequence[torch.Tensor]) -> float:
        """One optimizer step; mean loss of the global batch, the same number on all ranks."""
        self._check_batches(micro_batches)
        self.deepspeed.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            ids = batch.to(self.device, non_blocking=True)
            loss = self._loss(ids) if self.distiller is None else self.distiller.loss(ids)
            self.deepspeed.backward(loss * self._loss_weight)
            self.deepspeed.step()
            total += loss.detach()
        if self.expert_load is not None:
            self.last_expert_use = self.expert_load.take()
        return self._mean_over_ranks(total, len(micro_batches))

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        """Mean loss over the batches of all data-parallel ranks, no step.

        Every rank passes the same number of batches, each of the same shape: ZeRO-3 gathers
        weights in every forward pass and waits for the others.
        """
        self.deepspeed.eval()
        total, count = torch.zeros((), device=self.device), 0
        with torch.no_grad():
            for batch in batches:
                ids = batch.to(self.device, non_blocking=True)
                total += self._loss(ids)
                count += 1
        self.deepspeed.train()
        if count == 0:
            raise UsageError("there is not one batch to evaluate on")
        return self._mean_over_ranks(total, count)

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of one micro-batch, through the engine."""
        return model_loss(self.deepspeed, ids, self.plan.strategy.loss)

    def _mean_over_ranks(self, total: torch.Tensor, count: int) -> float:
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return float(total) / (count * self._losses)

    def _check_batches(self, micro_batches: Sequence[torch.Tensor]) -> None:
        strategy, job = self.plan.strategy, self.plan.job
        shapes = {tuple(batch.shape) for batch in micro_batches}
        expected = (strategy.micro_batch, job.seq_len)
        if len(micro_batches) != strategy.grad_accum or shapes != {expected}:
            raise UsageError(
                f"a step takes {strategy.grad_accum} micro-batches of the shape {expected}, "
                f"given {len(micro_batches)} of {sorted(shapes)}"
            )

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        set_rates(self.deepspeed.optimizer.param_groups, self.plan.job.optimizer, lr)

    @property
    def last_grad_norm(self) -> float | None:
        """2-norm of the whole gradient before clipping, at the last step; null before the first."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None or self.deepspeed.global_steps == 0 else float(norm)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write all that `load` needs; `client_state` must be JSON (position in the data, ledger …)."""
        with quiet():
            engine_state.save(self.deepspeed, self.plan, folder, client_state)
        if self.compressor is not None:
            self.compressor.save(folder)

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue where `save` was called, bit for bit; returns its `client_state`.

        Into a freshly built engine of the same plan: ZeRO-3 cannot load over a used one. Check the
        hashes first (`runner/checkpoint.py` does).
        """
        with quiet():
            state = engine_state.load(self.deepspeed, self.plan, folder)
        if self.compressor is not None:
            self.compressor.load(folder)
        return state

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """On rank 0 all weights by transformers' names, on the CPU, ties kept; null on the others."""
        from outlay.runner.export import host_copies

        module: nn.Module = self.deepspeed.module
        values: dict[int, torch.Tensor] = {}
        # DeepSpeed has buffers for a few tensors on NVMe, not for a whole block.
        one_by_one = self.plan.strategy.offload_param == "nvme"
        with self._at_rest():
            for part in parts_of(module):
                weights = list(module.get_submodule(part).parameters())
                for tensors in [[weight] for weight in weights] if one_by_one else [weights]:
                    with gathered(tensors, self.plan.strategy.zero):
                        if self.rank == 0:
                            host_copies(tensors, values)
        if self.rank != 0:
            return None
        state = module.state_dict(keep_vars=True)
        host_copies([t for t in state.values() if id(t) not in values], values)
        return {name: values[id(tensor)] for name, tensor in state.items()}

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """ZeRO-3 with nothing under way: a forward pass may leave the next weights half gathered."""
        if self.plan.strategy.zero < 3:
            yield
            return
        self.deepspeed.optimizer.checkpoint_event_prologue()
        yield
        self.deepspeed.optimizer.checkpoint_event_epilogue()

    def close(self) -> None:
        """Free the model, the optimizer and the groups; the process group of the ranks stays."""
        if self.deepspeed is None:
            return
        if sys.exc_info()[0] is None:
            # A peer may still be reading from a group; but one that failed must not wait for it.
            torch.distributed.barrier()
        engine, self.deepspeed = self.deepspeed, None
        if self.compressor is not None:
            self.compressor.close()
        if self.distiller is not None:
            self.distiller.close()
        if self.expert_load is not None:
            self.expert_load.close()
        self._undo()
        repairs.release(engine)
        _remove(self._swap)
        del engine
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _kind_of(plan: Plan) -> type[Engine]:
    """Which engine runs this strategy."""
    if plan.strategy.pp > 1 and plan.strategy.tp > 1:
        from outlay.runner.parallel.grid import TensorPipelineEngine

        return TensorPipelineEngine
    if plan.strategy.pp > 1:
        from outlay.runner.pipeline import PipelineEngine

        return PipelineEngine
    if plan.strategy.tp > 1:
        from outlay.runner.parallel.tensor import TensorParallelEngine

        return TensorParallelEngine
    if plan.strategy.sp > 1:
        from outlay.runner.parallel.sequence import SequenceParallelEngine

        return SequenceParallelEngine
    if plan.strategy.ep > 1:
        from outlay.runner.parallel.expert import ExpertParallelEngine

        return ExpertParallelEngine
    return Engine


def current_device() -> torch.device:
    """Where this rank computes."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def initialize(
    model: nn.Module,
    config: dict[str, Any],
    mpu: Any = None,
    build: Build | None = None,
    weights: list[Any] | None = None,
) -> Any:
    """`deepspeed.initialize`, with its refusals as one clear error. `build`: our own optimizer;
    `weights`: the trained ones, or groups of them, where they are not simply all."""
    import deepspeed

    if weights is None:
        weights = [p for p in model.parameters() if p.requires_grad]
    given: dict[str, Any] = {"model_parameters": weights}
    if build is not None:
        config = {key: value for key, value in config.items() if key != "optimizer"}
        given["optimizer"] = build
    with quiet(), refusals():
        return deepspeed.initialize(model=model, config=config, mpu=mpu, **given)[0]


def seed_everything(seed: int, rank: int) -> None:
    """Random numbers of this rank (dropout, shuffles): other ranks get other ones."""
    import numpy as np

    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)

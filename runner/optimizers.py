"""Optimizers that DeepSpeed's JSON alone does not build as they should be, and the rates of all.

lion on CPU   DeepSpeed's is a CUDA kernel (`ops/lion/fused_lion.py`: "Currently GPU-only")
muon          DeepSpeed tells matrices from tables by a weight's name (`deepspeed/__init__.py`,
              `set_optimizer_flags`), and takes GPT-2's tables for matrices
adamw_8bit    DeepSpeed has none; this is bitsandbytes'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from outlay.planner.emit.optimizer import MUON_MOMENTUM
from outlay.planner.spec.job import Optimizer
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import MissingExtra
from outlay.runner import repairs

Build = Callable[[Any], torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum,
    weight decay decoupled, one moment."""

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is there for torch's interface and not used."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, group)

    def _step_one(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(weight)
        moment, (fast, slow) = state["exp_avg"], group["betas"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(torch.lerp(weight.grad, moment, fast).sign_(), alpha=-group["lr"])
        moment.lerp_(weight.grad, 1 - slow)


def own_optimizer(plan: Plan, model: nn.Module) -> Build | None:
    """What builds the plan's optimizer of the trained weights; null where DeepSpeed does by its JSON."""
    how = plan.job.optimizer
    numbers = {"lr": how.lr, "betas": how.betas, "weight_decay": how.weight_decay}
    if how.name == "lion" and plan.cluster.kind == "cpu":
        return lambda weights: Lion(weights, **numbers)
    if how.name == "muon":
        return lambda weights: _muon(list(weights), how, model, on_cpu=plan.cluster.kind == "cpu")
    if how.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise MissingExtra("bitsandbytes", "quantized") from None
        return lambda weights: AdamW8bit(weights, eps=how.eps, **numbers)
    return None


def _muon(
    weights: list[torch.Tensor], how: Optimizer, model: nn.Module, *, on_cpu: bool
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon over the matrices of the blocks, Adam over all else."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    inside = {id(p) for block in _blocks(model) for p in block.parameters()}
    for weight in weights:
        shape = getattr(weight, "ds_shape", weight.shape)
        weight.use_muon = id(weight) in inside and len(shape) >= 2  # type: ignore[attr-defined]
    matrices = [p for p in weights if p.use_muon]  # type: ignore[attr-defined]
    others = [p for p in weights if not p.use_muon]  # type: ignore[attr-defined]
    rate = how.lr if how.adam_lr is None else how.adam_lr
    groups: list[dict[str, Any]] = [
        {
            "params": matrices, "use_muon": True, "lr": how.lr, "weight_decay": how.weight_decay,
            "momentum": how.momentum or MUON_MOMENTUM,
        },
        {
            "params": others, "use_muon": False, "lr": rate, "weight_decay": how.weight_decay,
            "betas": how.betas, "eps": how.eps,
        },
    ]  # fmt: skip
    if on_cpu:
        repairs.muon_as_written()
        return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)  # type: ignore[no-any-return]
    from deepspeed.ops.adam import FusedAdam

    return MuonWithAuxAdam(groups, adam_optimizer=FusedAdam)  # type: ignore[no-any-return]


def _blocks(model: nn.Module) -> list[nn.Module]:
    from outlay.runner.model import blocks_of

    return list(blocks_of(model))


def set_rates(groups: list[dict[str, Any]], how: Optimizer, lr: float) -> None:
    """The rate of the next step for every group; Muon's Adam keeps its ratio to it."""
    ratio = 1.0 if how.adam_lr is None else how.adam_lr / how.lr
    for group in groups:
        group["lr"] = lr * (ratio if group.get("use_muon") is False else 1.0)

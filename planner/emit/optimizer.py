"""The job's optimizer as the `optimizer` section of DeepSpeed's JSON."""

from __future__ import annotations

from typing import Any

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Optimizer
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError

TYPES = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop", "lion": "Lion", "muon": "Muon",
    "adafactor": "Adafactor",
}  # fmt: skip
"""DeepSpeed's own names, or those of torch.optim (`runtime/engine.py`, `_configure_basic_optimizer`)."""
OWN = ("adamw_8bit",)
"""Those that DeepSpeed's JSON has no name for, which `outlay run` builds itself (runner/optimizers.py)."""
MUON_MOMENTUM = 0.95
"""Where the job says none: that of the method's author (kellerjordan.github.io/posts/muon, 2024)."""


def optimizer_section(
    optimizer: Optimizer, strategy: Strategy, cluster: Cluster
) -> dict[str, Any] | None:
    """Type and numbers; null for one of `OWN`. On CPU Adam is torch's: the fused one would be compiled."""
    if optimizer.name in OWN:
        return None
    if optimizer.name not in TYPES:
        raise UsageError(
            f"optimizer {optimizer.name} can be estimated, but not written for DeepSpeed yet",
            do=f"one of {', '.join((*TYPES, *OWN))}",
        )
    on_cpu = cluster.kind == "cpu" and strategy.offload_optimizer == "none"
    params: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.name in ("adamw", "adam", "lion", "muon"):
        params["betas"] = list(optimizer.betas)
    if optimizer.name in ("adamw", "adam", "rmsprop", "muon"):
        params["eps"] = optimizer.eps
    if optimizer.name in ("sgd", "rmsprop"):
        params["momentum"] = optimizer.momentum
    if optimizer.name == "muon":
        params["momentum"] = optimizer.momentum or MUON_MOMENTUM
        params["adam_lr"] = optimizer.lr if optimizer.adam_lr is None else optimizer.adam_lr
        params["muon_lr"] = optimizer.lr
    if optimizer.name in ("adamw", "adam", "muon") and on_cpu:
        params["torch_adam"] = True
    if optimizer.name == "adam":
        params["adam_w_mode"] = False
    return {"type": TYPES[optimizer.name], "params": params}

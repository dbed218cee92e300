"""How the experts of a model are used, counted in every step: tokens each is given, and the router's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from outlay.runner.engine import Engine


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """Of one step, over all ranks."""

    tokens: tuple[int, ...]
    """(token, choice) pairs that each expert was given, over all layers."""
    imbalance: float
    """Pairs of the busiest expert over the mean, in the worst layer; 1 = even."""
    idle: int
    """Experts of a layer that were given nothing, over all layers."""
    dropped: int
    """Pairs beyond `expert_capacity`, which passed their expert by; `tokens` has them too."""
    router_loss: float | None
    """The load-balance loss, as it is in the training loss; null where the config asks for none."""

    def figures(self) -> dict[str, float | None]:
        """What goes into events and scalars, by name."""
        return {
            "expert_imbalance": self.imbalance,
            "experts_idle": float(self.idle),
            "expert_tokens_most": float(max(self.tokens)),
            "expert_tokens_least": float(min(self.tokens)),
            "tokens_dropped": float(self.dropped),
            "router_loss": self.router_loss,
        }


def in_backward() -> bool:
    """Whether a forward pass that runs now is one of recomputed blocks."""
    return torch._C._current_graph_task_id() != -1


class ExpertLoad:
    """Hooks on every router of a model; `take` is collective and begins to count anew."""

    def __init__(self, model: nn.Module, routers: list[nn.Module], device: torch.device) -> None:
        experts = [_experts_of(router) for router in routers]
        self._counts = torch.zeros(len(routers), max(experts), dtype=torch.int64, device=device)
        self._loss = torch.zeros(2, device=device)
        self._slices: list[Any] = [m for m in model.modules() if hasattr(m, "dropped")]
        self._experts = max(experts)
        self._handles = [
            router.register_forward_hook(self._counter(layer))
            for layer, router in enumerate(routers)
        ]
        self._handles.append(model.register_forward_hook(self._add_loss))
        self._model = model

    @classmethod
    def of(cls, engine: Engine) -> ExpertLoad | None:
        """Null where there is no router, in stages of a pipeline, and in compiled blocks."""
        if engine.pipeline or engine.plan.job.compile:
            return None
        model: nn.Module = engine.deepspeed.module
        routers = [
            parent.gate
            for parent in model.modules()
            if isinstance(getattr(parent, "gate", None), nn.Module) and hasattr(parent, "experts")
        ]
        return cls(model, routers, engine.device) if routers else None

    def _counter(self, layer: int) -> Any:
        def count(router: nn.Module, _: Any, routed: Any) -> None:
            if router.training and not in_backward():
                chosen = routed[2].flatten()
                self._counts[layer] += torch.bincount(chosen, minlength=self._experts)

        return count

    def _add_loss(self, model: nn.Module, _: Any, outputs: Any) -> None:
        loss = getattr(outputs, "aux_loss", None)
        if model.training and loss is not None:
            self._loss += torch.stack([loss.detach().float(), torch.ones_like(self._loss[0])])

    def take(self) -> ExpertUse:
        """Of all ranks since the last time."""
        dropped = self._counts.new_tensor(sum(slice_.dropped for slice_ in self._slices))
        both = [self._counts, self._loss, dropped]
        if torch.distributed.get_world_size() > 1:
            for counted in both:
                torch.distributed.all_reduce(counted)
        total = self._counts.double()
        mean_per_layer = total.mean(1).clamp(min=1.0)
        loss, count = self._loss.tolist()
        coefficient = float(getattr(self._model.config, "router_aux_loss_coef", 0.0))  # type: ignore[arg-type]
        use = ExpertUse(
            tokens=tuple(int(n) for n in self._counts.sum(0).tolist()),
            imbalance=float((total.max(1).values / mean_per_layer).max()),
            idle=int((self._counts == 0).sum()),
            dropped=int(dropped),
            router_loss=coefficient * loss / count if count else None,
        )
        for counted in both:
            counted.zero_()
        for slice_ in self._slices:
            slice_.dropped = 0
        return use

    def close(self) -> None:
        """Leave nothing of this on the model."""
        for handle in self._handles:
            handle.remove()


def _experts_of(router: nn.Module) -> int:
    weight: Any = router.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])

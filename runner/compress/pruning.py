"""Pruning while it trains: which weights go when, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from outlay.planner.spec.compress import Pruning
from outlay.runner.compress.masks import Masks
from outlay.runner.compress.parts import targets_of
from outlay.runner.compress.schedule import pruned_of_group, sparsity_at
from outlay.runner.compress.select import Piece, smallest
from outlay.runner.model import skeleton

if TYPE_CHECKING:
    from outlay.runner.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """Of one matrix, or of all."""

    name: str
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


class Pruner:
    """The masks of one engine, chosen anew as the schedule says."""

    def __init__(self, engine: Engine, pruning: Pruning) -> None:
        plan = engine.plan
        model = skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
        self.engine, self.pruning = engine, pruning
        self.masks = Masks(engine, targets_of(model, pruning.parts))
        self.sparsity = 0.0
        """What the present masks were chosen for."""

    def before_step(self, step: int, total: int) -> float | None:
        """Choose masks where this step wants more zeros than there are; the step then makes them.

        Collective. The sparsity that was chosen, null where nothing changed.
        """
        wanted = sparsity_at(self.pruning, step, total)
        if wanted <= self.sparsity:
            return None
        with torch.no_grad():
            if self.pruning.pattern is not None:
                self._choose_groups(pruned_of_group(self.pruning, wanted))
            else:
                self._choose_smallest(wanted)
        self.sparsity = wanted
        return wanted

    def _choose_smallest(self, wanted: float) -> None:
        masks = self.masks
        masks.apply()  # the selection takes what is pruned to be zero
        pieces = [
            Piece(
                order=masks.order[key],
                counts=masks.speaks(key),
                values=fragment.view().float(),
                pruned=pruned,
            )
            for key, fragment, pruned in zip(masks.keys, masks.fragments, masks.pruned, strict=True)
        ]
        units, sizes = masks.weight_of, masks.sizes
        if self.pruning.scope == "global":
            units, sizes = [0] * len(units), [sum(sizes)]
        counts = [round(wanted * size) for size in sizes]
        masks.pruned = smallest(pieces, units, counts, self.engine.device)

    def _choose_groups(self, count: int) -> None:
        """The `count` smallest of each M neighbours along the input, one whole matrix at a time."""
        from outlay.runner.engine import gathered

        masks = self.masks
        group = self.pruning.kept_of()[1]
        for name, held in masks.live.items():
            with gathered([held.weight], self.engine.plan.strategy.zero):
                weight = held.weight.detach()
                pruned = smallest_of_groups(weight.t() if held.turned else weight, count, group)
                flat = (pruned.t() if held.turned else pruned).flatten()
            for i, fragment in enumerate(masks.fragments):
                if fragment.name == name:
                    mine = flat[fragment.start : fragment.start + fragment.length]
                    masks.pruned[i] = mine.to(fragment.holder.device)

    def save(self, folder: Path) -> None:
        """Into a checkpoint. Collective."""
        self.masks.save(folder, self.sparsity)

    def load(self, folder: Path) -> None:
        """From a checkpoint. Collective."""
        self.sparsity = self.masks.load(folder)

    def close(self) -> None:
        """Let go of the engine's tensors."""
        self.masks.close()

    def wanted_zeros(self) -> int:
        """How many weights the job asks to be zero at the end."""
        asked, sizes = self.pruning.final_sparsity, self.masks.sizes
        if self.pruning.scope == "global":
            return round(asked * sum(sizes))
        return sum(round(asked * size) for size in sizes)

    def zeros(self) -> list[Zeros]:
        """Counted, not assumed: the masters that are zero, by matrix. Collective."""
        masks = self.masks
        return [
            Zeros(name=target.name, weights=size, zeros=zeros)
            for target, size, zeros in zip(masks.targets, masks.sizes, masks.zeros(), strict=True)
        ]


def smallest_of_groups(weight: torch.Tensor, count: int, group: int) -> torch.Tensor:
    """[outputs, inputs] → true at the `count` smallest magnitudes of each `group` inputs."""
    magnitudes = weight.abs().reshape(weight.shape[0], -1, group)
    order = magnitudes.argsort(dim=-1, stable=True)
    chosen = torch.zeros_like(magnitudes, dtype=torch.bool)
    return chosen.scatter_(-1, order[..., :count], True).reshape(weight.shape)


def in_all(zeros: list[Zeros]) -> Zeros:
    """The matrices together."""
    return Zeros(
        name="all", weights=sum(z.weights for z in zeros), zeros=sum(z.zeros for z in zeros)
    )

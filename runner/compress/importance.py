"""How much each head, channel and block matters: by its weights, by what it says, or by the loss.

magnitude    the 2-norm of all weights of a head or channel
activation   the mean of what leaves it, times the 2-norm of the weights that read it; of a block, how
             far it turns its input: 1 − cos (Men et al. 2024, arXiv:2403.03853)
taylor       |Σ value · ∂loss/∂value| of what leaves it: the loss without it, to first order
             (Molchanov et al. 2019, arXiv:1906.10771); of a block, of what it adds to its input
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from outlay.planner.spec.compress import Importance
from outlay.runner.model import causal_lm_loss


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """The matrices of one block that make and read its heads and channels."""

    block: nn.Module
    query: Any = None
    """Null where a family's heads are not cut."""
    keys: tuple[Any, ...] = ()
    out: Any = None
    up: tuple[Any, ...]
    down: Any
    groups: int
    """Key and value heads."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Larger is more important."""

    groups: list[torch.Tensor]
    """Of each block, [groups]."""
    channels: list[torch.Tensor]
    """Of each block, [ffn]."""
    blocks: torch.Tensor
    """[blocks]"""


def rows(module: Any) -> torch.Tensor:
    """The weight as [outputs, inputs], however it is kept."""
    weight: torch.Tensor = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def scores(
    model: Any, parts: list[BlockParts], kind: Importance, batches: Iterable[torch.Tensor]
) -> Scores:
    """`batches`: token ids [b, s]; not looked at for magnitude."""
    if kind == "magnitude":
        return _by_magnitude(parts)
    seen = _Seen(parts, taylor=kind == "taylor")
    model.eval()
    try:
        for ids in batches:
            with torch.set_grad_enabled(kind == "taylor"):
                loss = causal_lm_loss(model(input_ids=ids).logits, ids)
            if kind == "taylor":
                loss.backward()
                model.zero_grad(set_to_none=True)
    finally:
        seen.close()
    return seen.scores()


def _by_magnitude(parts: list[BlockParts]) -> Scores:
    groups, channels, blocks = [], [], []
    for part in parts:
        channels.append(_norm([*(rows(m) for m in part.up), rows(part.down).t()], None))
        if part.query is not None:
            made = [rows(m) for m in (part.query, *part.keys)]
            groups.append(_norm([*made, rows(part.out).t()], part.groups))
        squares = [p.detach().float().square().sum() for p in part.block.parameters()]
        blocks.append(torch.stack(squares).sum().sqrt())
    return Scores(groups=groups, channels=channels, blocks=torch.stack(blocks))


def _norm(matrices: list[torch.Tensor], groups: int | None) -> torch.Tensor:
    """2-norm over all matrices of each row, or of each of `groups` equal runs of rows."""
    squares = []
    for matrix in matrices:
        each = matrix.float().square().sum(1)
        squares.append(each if groups is None else each.view(groups, -1).sum(1))
    return torch.stack(squares).sum(0).sqrt()


@dataclass
class _Seen:
    """Hooks that add up what leaves heads, channels and blocks."""

    parts: list[BlockParts]
    taylor: bool
    totals: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, part in enumerate(self.parts):
            self._watch_input(part.down, (index, "channels"), None)
            if part.query is not None:
                self._watch_input(part.out, (index, "groups"), part.groups)
            self.handles.append(part.block.register_forward_hook(self._block_hook(index)))

    def _add(self, key: tuple[int, str], value: torch.Tensor) -> None:
        self.totals[key] = self.totals[key] + value if key in self.totals else value

    def _watch_input(self, reader: nn.Module, key: tuple[int, str], groups: int | None) -> None:
        def together(values: torch.Tensor) -> torch.Tensor:
            total = values.float().flatten(0, -2).sum(0)
            return total if groups is None else total.view(groups, -1).sum(1)

        def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].detach()
            if self.taylor:
                inputs[0].register_hook(
                    lambda gradient: self._add(key, together(gradient * values).square())
                )
            else:
                self._add(key, together(values.abs() * rows(reader).norm(dim=0)))

        self.handles.append(reader.register_forward_pre_hook(look))

    def _block_hook(self, index: int) -> Any:
        def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before = inputs[0].detach()
            after = output[0] if isinstance(output, tuple) else output
            if not self.taylor:
                turned = 1 - nn.functional.cosine_similarity(
                    before.float(), after.detach().float(), dim=-1
                )
                self._add((index, "block"), turned.sum())
                return
            added = after.detach() - before
            after.register_hook(
                lambda g: self._add((index, "block"), (g * added).float().sum().square())
            )

        return look

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def scores(self) -> Scores:
        def of(what: str) -> list[torch.Tensor]:
            keys = [(index, what) for index in range(len(self.parts))]
            return [self.totals[key] for key in keys if key in self.totals]

        return Scores(groups=of("groups"), channels=of("channels"), blocks=torch.stack(of("block")))

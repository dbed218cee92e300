"""Mixed precision after training: which matrix may have fewer bits, measured on text, under a limit of bytes.

Each matrix alone is put to 8 and to 4 bits and the loss read on calibration windows (of the training part:
the held-out part stays unseen). Then steps are taken greedily, the least loss for a byte first, until the
model is small enough. Losses of single matrices are taken to add up; the mixture is measured whole at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import NotFeasible
from outlay.profiles.units import format_bytes
from outlay.runner.evaluate.score import token_losses
from outlay.runner.exported.matrices import Linear
from outlay.runner.exported.packed import dequantized

GROUP = 32
"""Weights that share a scale at 4 bits."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One matrix to fewer bits, from the step before it."""

    name: str
    packing: Packing
    saved_bytes: int
    """Less than the step before."""
    loss: float
    """Measured increase of the mean loss over the step before, nats; negative is kept as 0."""

    @property
    def price(self) -> float:
        """Loss for a byte."""
        return self.loss / self.saved_bytes


@dataclass(frozen=True, kw_only=True)
class Option:
    """One matrix in one packing: what it would take and cost, measured alone."""

    packing: Packing
    stored_bytes: int
    loss: float


def options_of(linear: Linear) -> tuple[Packing, ...]:
    """8 bits, and 4 where groups divide the inputs."""
    eight = Packing(bits=8)
    return (eight,) if linear.inputs % GROUP else (eight, Packing(bits=4, group=GROUP))


def sensitivities(
    model: Any, linears: Sequence[Linear], tokens: np.ndarray[Any, Any], *, width: int, batch: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[float, dict[str, list[Option]]]:  # fmt: skip
    """(loss as it is, options by matrix): every option measured with all other matrices untouched."""

    def loss() -> float:
        return float(token_losses(model, tokens, batch).mean())

    before = loss()
    found: dict[str, list[Option]] = {}
    for linear in linears:
        weight = model.get_submodule(linear.name).weight
        kept = weight.detach().clone()
        found[linear.name] = []
        for packing in options_of(linear):
            with torch.no_grad():
                weight.copy_(dequantized(kept, packing))
            stored = linear.bytes_as(packing, width, mixed=True)
            option = Option(packing=packing, stored_bytes=stored, loss=loss() - before)
            found[linear.name].append(option)
        with torch.no_grad():
            weight.copy_(kept)
        if progress is not None:
            progress(linear.name)
    return before, found


def steps_of(linear: Linear, options: Sequence[Option], width: int) -> list[Step]:
    """The options of one matrix as steps of falling worth: the lower convex hull of (bytes saved, loss).

    An option that saves little for its loss is passed over where the next one is better a byte.
    """
    dense = linear.bytes_as(None, width)
    points = [(dense - o.stored_bytes, max(0.0, o.loss), o.packing) for o in options]
    hull: list[tuple[int, float, Packing | None]] = [(0, 0.0, None)]
    for saved, loss, packing in sorted((p for p in points if p[0] > 0), key=lambda p: p[0]):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (saved, loss, None)):
            hull.pop()
        hull.append((saved, loss, packing))
    made = []
    for (saved, loss, _), (more, worse, packing) in pairwise(hull):
        assert packing is not None
        made.append(
            Step(
                name=linear.name, packing=packing, saved_bytes=more - saved,
                loss=max(0.0, worse - loss),
            )
        )  # fmt: skip
    return made


def _slope(a: tuple[int, float, Any], b: tuple[int, float, Any]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def choose(steps: Sequence[Step], size_bytes: int, limit_bytes: int) -> dict[str, Packing]:
    """Greedy: the cheapest step a byte first, a matrix's own in their order, until the limit holds.

    Raises NotFeasible where all steps together are not enough.
    """
    packings: dict[str, Packing] = {}
    for step in sorted(steps, key=lambda s: (s.price, -s.saved_bytes)):
        if size_bytes <= limit_bytes:
            break
        packings[step.name] = step.packing
        size_bytes -= step.saved_bytes
    if size_bytes > limit_bytes:
        raise NotFeasible(
            f"the smallest mixture takes {format_bytes(size_bytes)}, more than {format_bytes(limit_bytes)}",
            why=f"every matrix is at its fewest bits (4 in groups of {GROUP}, or 8); token table and norms stay dense",
            do="a larger --at-most, bf16 weights, or a smaller model: prune structures, or distil one",
        )  # fmt: skip
    return packings

"""Exactly the k smallest magnitudes of weights that lie in pieces on many ranks, without gathering them.

The bits of a non-negative float, read as an integer, are in the order of its magnitude. So the k-th
smallest is found digit by digit (radix selection): each rank counts its own digits, the counts are
added up, and a few kilobytes a weight matrix travel. Of equal magnitudes the first in the model go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, width) in bits, from the top; the sign is never set."""
_BITS = sum(width for _, width in _DIGITS)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Magnitudes that this rank holds: those of one fragment."""

    order: int
    """Its place among all pieces of the model, the same number on every rank that has it."""
    counts: bool
    """Whether this rank speaks for the piece; others hold a copy."""
    values: torch.Tensor
    """fp32 [n]; zero where pruned."""
    pruned: torch.Tensor
    """bool [n]: what is pruned already."""

    def bits(self) -> torch.Tensor:
        """int32 [n] in the order of the magnitudes. Made anew each time: kept for all pieces it would be
        as large as the masters."""
        return self.values.abs().view(torch.int32)


def smallest(
    pieces: Sequence[Piece], units: Sequence[int], wanted: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """For each piece, true where the weight is among the `wanted[unit]` smallest of its unit.

    What is pruned already is among them. `units`: what is ranked together (one matrix, or all), of every
    piece in order; those of a unit are neighbours. Collective; sums are made on `device`.
    """
    searches = [_Search(piece, units[piece.order]) for piece in pieces if piece.counts]

    def in_all(counted: list[tuple[int, torch.Tensor]], *shape: int) -> torch.Tensor:
        total = torch.zeros(shape, dtype=torch.int64)
        for index, count in counted:
            total[index] += count
        total = total.to(device)
        torch.distributed.all_reduce(total)
        return total.cpu()

    n = len(wanted)
    left = torch.tensor(wanted) - in_all([(s.unit, s.taken) for s in searches], n)
    threshold = torch.zeros_like(left)
    for shift, width in _DIGITS:
        counted = [(s.unit, s.digits(shift, width, int(threshold[s.unit]))) for s in searches]
        running = in_all(counted, n, 1 << width).cumsum(1)
        digit = (running < left[:, None]).sum(1).clamp(max=(1 << width) - 1)
        below = running.gather(1, (digit - 1).clamp(min=0)[:, None]).squeeze(1)
        left, threshold = left - below * (digit > 0), (threshold << width) | digit
        for search in searches:
            search.narrow(shift, width, int(digit[search.unit]))
    counted = [(s.piece.order, s.equal(int(threshold[s.unit]))) for s in searches]
    equal = in_all(counted, len(units))
    return [_chosen(p, units, threshold, left, equal) for p in pieces]


class _Search:
    """The magnitudes of a piece that may still be the k-th smallest: ever fewer."""

    def __init__(self, piece: Piece, unit: int) -> None:
        self.piece, self.unit = piece, unit
        self.taken = piece.pruned.sum().cpu()
        self.alike: torch.Tensor | None = None

    def digits(self, shift: int, width: int, prefix: int) -> torch.Tensor:
        """How often each digit stands at `shift`, of those not pruned whose higher digits are `prefix`."""
        bits = self.piece.bits() if self.alike is None else self.alike
        counts = torch.bincount(_digit(bits, shift, width), minlength=1 << width).cpu()
        if prefix == 0:  # what is pruned is zero
            counts[0] -= self.taken
        return counts

    def narrow(self, shift: int, width: int, digit: int) -> None:
        bits = self.piece.bits() if self.alike is None else self.alike
        self.alike = bits[_digit(bits, shift, width) == digit]

    def equal(self, threshold: int) -> torch.Tensor:
        """How many not pruned have exactly that magnitude."""
        assert self.alike is not None
        return torch.tensor(self.alike.numel()) - (self.taken if threshold == 0 else 0)


def _digit(bits: torch.Tensor, shift: int, width: int) -> torch.Tensor:
    top = bits >> shift
    return top if shift + width == _BITS else top & ((1 << width) - 1)


def _chosen(
    piece: Piece,
    units: Sequence[int],
    threshold: torch.Tensor,
    ties: torch.Tensor,
    equal: torch.Tensor,
) -> torch.Tensor:
    """What is pruned, all below the threshold, and of those that equal it as many as are still wanted."""
    unit = units[piece.order]
    if ties[unit] <= 0:
        return piece.pruned
    before = int(equal[units.index(unit) : piece.order].sum())
    more = min(max(int(ties[unit]) - before, 0), int(equal[piece.order]))
    bits, limit = piece.bits(), int(threshold[unit])
    if more == int(equal[piece.order]):
        return piece.pruned | (bits <= limit)
    chosen = piece.pruned | (bits < limit)
    same = ((bits == limit) & ~piece.pruned).nonzero().squeeze(1)
    chosen[same[:more]] = True
    return chosen

"""90 % intervals of what was measured, by resampling; numpy only.

The bootstrap (Efron 1979): draw as many units as there are, with replacement, many times; the 5th and
95th percentile of the figure over the draws are the interval. The unit of a loss is a document where
there are enough: tokens of one document are alike, so resampling tokens or windows of a few long
documents would promise more than was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 2000
LOWER, UPPER = 5.0, 95.0
_CELLS = 4_000_000
"""Draws × units held at once."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One figure with its 90 % interval."""

    value: float
    low: float
    high: float

    def map_exp(self) -> Measured:
        """exp of all three: a perplexity from a loss (exp keeps percentiles)."""
        return Measured(
            value=math.exp(self.value), low=math.exp(self.low), high=math.exp(self.high)
        )

    def times(self, factor: float) -> Measured:
        """All three times a positive factor."""
        return Measured(value=self.value * factor, low=self.low * factor, high=self.high * factor)


def _weights(units: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each unit is drawn, [some draws, units] at a time; the same for the same seed."""
    made = np.random.Generator(np.random.PCG64(seed))
    left, share = DRAWS, np.full(units, 1 / units)
    while left > 0:
        rows = min(left, max(1, _CELLS // units))
        yield made.multinomial(units, share, size=rows)
        left -= rows


def _drawn_means(sums: Floats, counts: Floats, seed: int) -> Floats:
    parts = [(w @ sums) / np.maximum(w @ counts, 1e-300) for w in _weights(len(sums), seed)]
    return np.concatenate(parts)


def _percentiles(value: float, draws: Floats) -> Measured:
    low, high = np.percentile(draws, [LOWER, UPPER])
    return Measured(value=value, low=min(float(low), value), high=max(float(high), value))


def mean_loss(sums: Floats, counts: Floats, *, seed: int = 0) -> Measured:
    """Σ sums / Σ counts over units (documents or windows), resampled by unit."""
    return _percentiles(float(sums.sum() / counts.sum()), _drawn_means(sums, counts, seed))


def loss_difference(before: Floats, after: Floats, counts: Floats, *, seed: int = 0) -> Measured:
    """Mean loss after less before, both on the same tokens: each draw takes the same units of both."""
    return mean_loss(after - before, counts, seed=seed)


def median_of(values: Floats, *, seed: int = 0) -> Measured:
    """The median of repeats, and the interval of that median."""
    made = np.random.Generator(np.random.PCG64(seed))
    draws = np.median(made.choice(values, size=(DRAWS, len(values))), axis=1)
    return _percentiles(float(np.median(values)), draws)


def ratio_of(before: Floats, after: Floats, *, seed: int = 0) -> Measured:
    """Median of after/before over repeats that were made in turn, so that both met the same machine."""
    return median_of(after / before, seed=seed)

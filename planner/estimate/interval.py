"""Low / expected / high: 90 % intervals, and the probability of running out of memory.

Errors of memory and time are multiplicative, so an interval of half width w is
[x/(1+w), x·(1+w)], and the error's logarithm is taken as normal with 1.645 σ = log(1+w).
"""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array

_Z90 = 1.6448536269514722
"""95th percentile of the standard normal: 5 % on either side."""
VERDICTS = ("ok", "tight", "no")
TIGHT_RISK = 0.05
NO_RISK = 0.5
"""More risk than NO_RISK is `no`; more than TIGHT_RISK of the usual footprint is `tight`."""


def interval(expected: Array, half_width: float) -> tuple[Array, Array]:
    """(low, high) of the 90 % interval."""
    return expected / (1.0 + half_width), expected * (1.0 + half_width)


def widened(half_width: float, distance: float, usual: float) -> float:
    """Half width for a question `distance` away from what was measured: as calibrated up to `usual`, the
    distance at which it was calibrated, and in proportion beyond."""
    return half_width * max(1.0, distance / usual)


def risk_above(expected: Array, limit: float, half_width: float) -> Array:
    """Probability that the true value exceeds `limit`, with log-normal error."""
    sigma = np.log1p(half_width) / _Z90
    z = (np.log(limit) - np.log(np.maximum(expected, 1e-300))) / sigma
    return _normal_tail(z)


def _normal_tail(z: Array) -> Array:
    """1 − Φ(z), by Abramowitz & Stegun 26.2.17 (absolute error below 7.5e-8); numpy has no erf."""
    x = np.abs(z)
    t = 1.0 / (1.0 + 0.2316419 * x)
    poly = t * (
        0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429)))
    )
    tail = np.exp(-x * x / 2.0) / np.sqrt(2.0 * np.pi) * poly
    upper: Array = np.where(z >= 0, tail, 1.0 - tail)
    return upper


def verdict_index(risk: Array, usual_risk: Array) -> Array:
    """Index into VERDICTS. `risk`: of the least footprint, at which a run fails; `usual_risk`: of the one
    it has where memory is plenty."""
    index: Array = np.where(risk > NO_RISK, 2, np.where(usual_risk > TIGHT_RISK, 1, 0))
    return index

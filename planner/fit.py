"""Robust least squares with priors: Gauss–Newton on Huber's loss, numpy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array

HUBER = 1.0
"""Residuals beyond this many noise widths count linearly."""
_ITERATIONS = 14
_STEP_LIMIT = 0.7
"""Largest change of one parameter in an iteration, in its own (log or logit) scale."""
_DONE = 1e-4

Model = Callable[[Array], tuple[Array, Array]]
"""Parameters → (predicted log seconds [rows], their derivatives [rows, parameters])."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Where the least squares ended."""

    theta: Array
    deviation: Array
    """Posterior standard deviation of each parameter, by the curvature at the minimum."""
    determined: Array
    """1 − (posterior/prior variance): 0 = the data said nothing, 1 = the data decided."""
    iterations: int
    objective: float


def _objective(residual: Array, weight: Array, theta: Array, prior: Array) -> float:
    size = np.abs(residual)
    loss = np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))
    return float(np.sum(weight * loss) + 0.5 * np.sum((theta / prior) ** 2))


def least_squares(
    model: Model, target: Array, weight: Array, noise: float, prior: Array, start: Array
) -> Fit:
    """Minimize Σ weight·huber((target − model)/noise) + ½ Σ (θ/prior)².

    Parameters are measured from their prior's centre. A step that does not improve is halved.
    """
    theta = start.copy()
    value, slope = model(theta)
    residual = (target - value) / noise
    best = _objective(residual, weight, theta, prior)
    count = 0
    while count < _ITERATIONS:
        count += 1
        robust = weight * np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-12))
        scaled = slope / noise
        curvature = scaled.T @ (robust[:, None] * scaled) + np.diag(1.0 / prior**2)
        step = np.linalg.solve(curvature, scaled.T @ (robust * residual) - theta / prior**2)
        step *= min(1.0, _STEP_LIMIT / max(float(np.abs(step).max()), 1e-12))
        gained = False
        for _ in range(4):
            value, new_slope = model(theta + step)
            new_residual = (target - value) / noise
            objective = _objective(new_residual, weight, theta + step, prior)
            if objective < best:
                gained = True
                break
            step = step / 2.0
        if not gained:
            break
        theta, slope, residual = theta + step, new_slope, new_residual
        improved, best = best - objective, objective
        if improved < _DONE * max(1.0, best):
            break
    scaled = slope / noise
    robust = weight * np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-12))
    covariance = np.linalg.inv(scaled.T @ (robust[:, None] * scaled) + np.diag(1.0 / prior**2))
    deviation = np.sqrt(np.diag(covariance))
    return Fit(
        theta=theta,
        deviation=deviation,
        determined=1.0 - (deviation / prior) ** 2,
        iterations=count,
        objective=best,
    )

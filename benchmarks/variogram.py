"""How much do the planner's errors on one machine have in common? The figures of planner/own_runs.py.

    python -m benchmarks.variogram

Each published run is predicted without its source; pairs of runs of one source on one kind of accelerator
are what a person's own runs are. Printed: the share of the variance that such pairs have in common, by their
distance, and the least-squares COMMON, NEAR and REACH of
`COMMON + NEAR exp(-distance / REACH)`.
"""

from __future__ import annotations

from importlib.resources import files

import click
import numpy as np

from outlay.planner.calibrate import calibrate
from outlay.planner.estimate.candidates import Array
from outlay.planner.nearest import features_of
from outlay.planner.own_runs import separation
from outlay.planner.spec.strategy import Strategy

EDGES = (0.0, 0.01, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
MOST_PAIRS = 400
"""Runs of one source on one accelerator, at most: pairs grow as the square."""


def pairs(seed: int = 0) -> tuple[Array, Array, Array, float]:
    """(distance, product of the two errors, weight) of all pairs, and the variance of the errors."""
    c = calibrate([str(files("outlay.profiles") / "measurements" / "published.csv")])
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(c.rows):
        groups.setdefault((row.source, row.case.cluster.accelerator.name), []).append(i)
    rng = np.random.default_rng(seed)
    far, product, weight, square = [], [], [], []
    for members in groups.values():
        if len(members) < 2:
            continue
        chosen = rng.permutation(members)[:MOST_PAIRS]
        asked = [
            features_of(x.spec, x.job, x.cluster, Strategy(), software=x.software.family)
            for x in (c.rows[i].case for i in chosen)
        ]
        error = c.left_out[chosen]
        count = len(chosen) * (len(chosen) - 1) / 2
        square.append((float(np.mean(error**2)), np.sqrt(len(chosen))))
        for a in range(len(chosen)):
            for b in range(a):
                far.append(separation(asked[a], asked[b]))
                product.append(error[a] * error[b])
                weight.append(np.sqrt(len(chosen)) / count)
    values, sizes = np.array(square).T
    variance = float(np.sum(values * sizes) / sizes.sum())
    return np.array(far), np.array(product), np.array(weight), variance


@click.command()
def main() -> None:
    """Print the variogram and the fit."""
    far, product, weight, variance = pairs()
    shared = product / variance
    click.echo(f"{len(far)} pairs; standard deviation of the errors {np.sqrt(variance):.1%}")
    for low, high in zip(EDGES, (*EDGES[1:], np.inf), strict=True):
        here = (far >= low) & (far < high)
        if here.any():
            mean = float(np.average(shared[here], weights=weight[here]))
            click.echo(
                f"distance {low:4.2f} to {high:4.2f}: {here.sum():7d} pairs, in common {mean:6.1%}"
            )
    best = min(
        (float(np.average((shared - k - n * np.exp(-far / r)) ** 2, weights=weight)), k, n, r)
        for k in np.linspace(0.0, 0.6, 13)
        for n in np.linspace(0.0, 0.6, 13)
        for r in (0.5, 1.0, 2.0, 4.0)
    )
    click.echo(f"COMMON {best[1]:.2f}, NEAR {best[2]:.2f}, REACH {best[3]:.1f}")


if __name__ == "__main__":
    main()

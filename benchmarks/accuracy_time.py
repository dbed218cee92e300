"""Step time against published measurements: errors, intervals, ranking, and the choice in sweeps.

    python -m benchmarks.accuracy_time FILE.csv

Errors are those of the figures as they are in profiles/efficiency, so of a fit that saw the rows it is
shown; what a source costs that was never seen is printed by benchmarks/calibrate.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import click
import numpy as np

from outlay.planner.calibrate import Row, load
from outlay.planner.cases import evaluate_case
from outlay.planner.estimate.candidates import Array

SMALL_SOURCE = 20
"""90th percentiles are pooled over sources with at least so many rows."""
LEAST = 4
"""Rows of a model for a rank correlation, strategies of a sweep."""


def spearman(a: Array, b: Array) -> float:
    """Correlation of the ranks, ties by the order of the rows; nan where one of the two is constant."""
    ranks = [np.argsort(np.argsort(x, kind="stable")).astype(float) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def correlations(rows: list[Row], predicted: Array) -> Array:
    """Spearman's of tokens a second a rank, of each model with at least LEAST rows."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.source, row.case.spec].append(i)
    work = np.array(
        [r.case.strategy.global_batch * r.case.job.seq_len / r.case.cluster.ranks for r in rows]
    )
    measured = np.array([r.measured_s for r in rows])
    members = [np.array(m) for m in groups.values() if len(m) >= LEAST]
    return np.array([spearman(work[m] / measured[m], work[m] / predicted[m]) for m in members])


def sweeps(rows: list[Row], predicted: Array) -> Array:
    """Measured time of the strategy with the least predicted time over the best measured, each sweep.

    A strategy that was measured more than once counts with its mean.
    """
    groups: dict[Hashable, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        c = row.case
        key = (row.source, c.spec, c.job.precision, c.cluster.accelerator.name, c.cluster.ranks,
               c.job.seq_len, c.strategy.global_batch)  # fmt: skip
        groups[key][c.strategy].append(i)
    found = []
    for strategies in groups.values():
        if len(strategies) < LEAST:
            continue
        measured = [float(np.mean([rows[i].measured_s for i in m])) for m in strategies.values()]
        ours = [float(predicted[m[0]]) for m in strategies.values()]
        found.append(measured[int(np.argmin(ours))] / min(measured))
    return np.array(found)


def _by_source(rows: list[Row], error: Array) -> list[str]:
    sources = np.array([r.source for r in rows])
    lines, medians, large = [], [], np.zeros(len(rows), bool)
    for name in sorted(set(sources)):
        here = sources == name
        medians.append(float(np.median(error[here])))
        large |= here & (here.sum() >= SMALL_SOURCE)
        lines.append(
            f"{name[:52]:<52} {here.sum():>5} {medians[-1]:>7.1%} {np.quantile(error[here], 0.9):>7.1%}"
        )
    lines.append(
        f"mean of the medians {np.mean(medians):.1%}, pooled 90th percentile {np.quantile(error[large], 0.9):.1%}"
    )
    return lines


@click.command()
@click.argument("cases", nargs=-1, required=True, type=Path)
def main(cases: tuple[Path, ...]) -> None:
    """Print the scores."""
    rows = load(cases)
    predicted, low, high = (np.zeros(len(rows)) for _ in range(3))
    for i, row in enumerate(rows):
        e = evaluate_case(row.case)
        assert e.step is not None and e.step_low is not None and e.step_high is not None
        predicted[i], low[i], high[i] = e.step.time_s[0], e.step_low[0], e.step_high[0]
    measured = np.array([r.measured_s for r in rows])
    click.echo("source, rows, median error, 90th percentile")
    click.echo("\n".join(_by_source(rows, np.abs(predicted / measured - 1))))
    inside = (low <= measured) & (measured <= high)
    click.echo(
        f"inside the 90 % interval: {inside.mean():.1%}; median half width {np.median(high / predicted - 1):.1%}"
    )
    rank = correlations(rows, predicted)
    rank = rank[np.isfinite(rank)]
    click.echo(
        f"rank correlation within a model: median {np.median(rank):.3f}, mean {rank.mean():.3f} of {len(rank)}"
    )
    lost = sweeps(rows, predicted)
    click.echo(
        f"{len(lost)} sweeps: chosen within 5 % of the best {np.mean(lost <= 1.05):.1%}, "
        f"within 10 % {np.mean(lost <= 1.10):.1%}, worst {lost.max():.2f}"
    )


if __name__ == "__main__":
    main()

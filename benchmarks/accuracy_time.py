"""Step time against published measurements: errors, intervals, ranking, and the choice in sweeps.

    python -m benchmarks.accuracy_time [FILE.csv…]

Errors are those of the figures as they are in profiles/efficiency, so of a fit that saw the rows it is
shown; what a source costs that was never seen is printed by `outlay calibrate`, and stands in
docs/accuracy.md (benchmarks/accuracy.py).
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Hashable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import numpy as np

from outlay.planner.calibrate import Row, calibrate, load
from outlay.planner.calibration import coverage
from outlay.planner.cases import evaluate_case
from outlay.planner.estimate.candidates import Array
from outlay.planner.hardware import read_cluster
from outlay.planner.nearest import COLUMNS, TABLE, describe, features_of
from outlay.planner.spec.files import write_text

PROFILES = Path(str(files("outlay.profiles")))
PUBLISHED = PROFILES / "measurements" / "published.csv"
CPU_GRID = PROFILES / "measurements" / "cpu-grid.csv"
SMALL_SOURCE = 20
"""90th percentiles are pooled over sources with at least so many rows (truth/README.md)."""
LEAST = 4
"""Rows of a model for a rank correlation, strategies of a sweep."""


def ranks(values: Array) -> Array:
    """Rank of each value; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(float)
    return np.asarray((last - (counts - 1) / 2.0)[inverse])


def spearman(a: Array, b: Array) -> float:
    """Correlation of the ranks; nan where one of the two is constant."""
    x, y = ranks(a), ranks(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def correlations(rows: list[Row], predicted: Array, *, per_token: bool) -> Array:
    """Spearman's of step time, or of seconds a token and rank, of each model with at least LEAST rows."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.source, row.case.spec].append(i)
    work = np.array(
        [r.case.strategy.global_batch * r.case.job.seq_len / r.case.cluster.ranks for r in rows]
    )
    work = work if per_token else np.ones(len(rows))
    measured = np.array([r.measured_s for r in rows])
    members = [np.array(m) for m in groups.values() if len(m) >= LEAST]
    found = np.array([spearman(measured[m] / work[m], predicted[m] / work[m]) for m in members])
    return np.asarray(found[np.isfinite(found)])


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


def predict(rows: Sequence[Row]) -> tuple[Array, Array, Array]:
    """(expected, low, high) seconds of each row, by the figures as they are shipped."""
    predicted, low, high = (np.zeros(len(rows)) for _ in range(3))
    for i, row in enumerate(rows):
        e = evaluate_case(row.case)
        assert e.step is not None and e.step_low is not None and e.step_high is not None
        predicted[i], low[i], high[i] = e.step.time_s[0], e.step_low[0], e.step_high[0]
    return predicted, low, high


def table_of(rows: list[Row], columns: Sequence[Array]) -> list[str]:
    """Markdown: by source, median and 90th percentile of each column of predictions."""
    sources = np.array([r.source for r in rows])
    measured = np.array([r.measured_s for r in rows])
    errors = [np.abs(p / measured - 1) for p in columns]
    names = sorted(set(sources))
    large = np.array([(sources == s).sum() >= SMALL_SOURCE for s in sources])
    lines = ["| source | rows |" + " median | p90 |" * len(columns),
             "|---|---:|" + "---:|---:|" * len(columns)]  # fmt: skip
    for name in names:
        here = sources == name
        cells = [f"{np.median(e[here]):.1%} | {np.quantile(e[here], 0.9):.1%}" for e in errors]
        lines.append(f"| {name[:60]} | {here.sum()} | " + " | ".join(cells) + " |")
    means = [float(np.mean([np.median(e[sources == s]) for s in names])) for e in errors]
    pooled = [float(np.quantile(e[large], 0.9)) for e in errors]
    cells = [f"**{m:.1%}** | **{p:.1%}**" for m, p in zip(means, pooled, strict=True)]
    title = f"**all** (mean of medians; p90 pooled over sources of {SMALL_SOURCE} rows)"
    return [*lines, f"| {title} | {len(rows)} | " + " | ".join(cells) + " |"]


def choice_lines(rows: list[Row], predicted: Array) -> list[str]:
    """Markdown: ranking and the choice in sweeps."""
    lost = sweeps(rows, predicted)
    lines = [
        f"- {len(lost)} sweeps of at least {LEAST} strategies: the one we would choose is within 5 % of "
        f"the best measured in {np.mean(lost <= 1.05):.1%}, within 10 % in {np.mean(lost <= 1.10):.1%}, "
        f"at worst {lost.max():.2f} times its time."
    ]
    for per_token, what in ((False, "step time"), (True, "seconds a token and accelerator")):
        r = correlations(rows, predicted, per_token=per_token)
        lines.append(
            f"- Rank correlation of {what} within a model: median {np.median(r):.3f}, mean {r.mean():.3f} "
            f"over {len(r)} models of at least {LEAST} rows."
        )
    return lines


def time_section(path: Path) -> list[str]:
    """Markdown of the time scores, fitted and with each source left out."""
    c = calibrate([path])
    rows = list(c.rows)
    measured = np.array([r.measured_s for r in rows])
    shipped, low, high = predict(rows)
    left_out = measured * np.exp(-c.left_out)
    covered, by_source, width = coverage(c)
    inside = (low <= measured) & (measured <= high)
    return [
        "", "## Step time", "",
        "*Fitted on all* (the first two columns of figures): as shipped. *Source left out* (the last two): all "
        "figures of step time fitted again without the source.", "",
        *table_of(rows, (shipped, left_out)), "",
        f"- Inside the 90 % interval: {inside.mean():.1%} as shipped; source left out {covered:.1%} of rows, "
        f"{by_source:.1%} mean over sources, with a median half width of {width:.0%}.",
        "", "Fitted on all:", "", *choice_lines(rows, shipped),
        "", "Source left out:", "", *choice_lines(rows, left_out),
    ]  # fmt: skip


def write_table() -> None:
    """profiles/measurements/step_times.csv: what `nearest` of an estimate shows."""
    rows = load([PUBLISHED])
    rows += load([CPU_GRID], read_cluster(CPU_GRID.with_suffix(".cluster.yaml")))
    predicted, _, _ = predict(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row, p in zip(rows, predicted, strict=True):
        c = row.case
        writer.writerow({
            "id": row.id, "source": row.source, "measured_s": f"{row.measured_s:.5g}", "predicted_s": f"{p:.5g}",
            "what": describe(c.spec, c.job, c.cluster, c.strategy, c.software.family),
            **features_of(c.spec, c.job, c.cluster, c.strategy, software=c.software.family),
        })  # fmt: skip
    write_text(PROFILES / TABLE, buffer.getvalue())


@click.command()
@click.argument("cases", nargs=-1, type=Path)
def main(cases: tuple[Path, ...]) -> None:
    """Print the scores of the figures as shipped."""
    rows = load(cases or (PUBLISHED,))
    predicted, low, high = predict(rows)
    measured = np.array([r.measured_s for r in rows])
    click.echo("\n".join(table_of(rows, (predicted,))))
    inside = (low <= measured) & (measured <= high)
    click.echo(
        f"- Inside the 90 % interval: {inside.mean():.1%}; median half width {np.median(high / predicted - 1):.1%}"
    )
    click.echo("\n".join(choice_lines(rows, predicted)))


if __name__ == "__main__":
    main()

"""Real runs on this machine: calibrated on one half, how far off is the other?

    outlay calibrate --measure --most 48 --out measured.csv      (a few minutes on two idle cores)
    python -m benchmarks.cpu_halves measured.csv

Rows are halved at random by a fixed seed; each half is predicted by a fit to the other. Printed: the median and
the 90th percentile of the errors before any fit to this machine, and of the halves.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import click
import numpy as np

from outlay.planner.calibrate import StepModel, calibrate, load, priors
from outlay.planner.cases import COLUMNS_IN, evaluate_case
from outlay.planner.estimate.candidates import Array
from outlay.planner.hardware import read_cluster


def left_out(path: Path, cluster_file: Path, seed: int = 0) -> tuple[Array, Array]:
    """log(measured / predicted) of every row: as the planner ships, and by a fit to the other half."""
    cluster = read_cluster(cluster_file)
    with path.open(newline="") as file:
        raw = list(csv.DictReader(file))
    rows = load([path], cluster)
    shipped = []
    for row in rows:
        found = evaluate_case(row.case)
        assert found.step is not None
        shipped.append(float(np.log(row.measured_s / found.step.time_s[0])))
    order = np.random.default_rng(seed).permutation(len(raw))
    halves = [set(order[: len(raw) // 2].tolist()), set(order[len(raw) // 2 :].tolist())]
    residual = np.zeros(len(rows))
    by_id = {row.id: i for i, row in enumerate(rows)}
    for mine, other in (halves, halves[::-1]):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "half.csv"
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS_IN)
                writer.writeheader()
                writer.writerows(raw[i] for i in sorted(mine))
            c = calibrate([part], cluster=cluster, leave_out=False)
        asked = [by_id[raw[i]["id"]] for i in sorted(other) if raw[i]["id"] in by_id]
        chosen = [rows[i] for i in asked]
        model = StepModel(chosen, c.params, priors("cpu"))
        residual[asked] = np.log([r.measured_s for r in chosen]) - model.value(c.fit.theta)
    return np.array(shipped), residual


@click.command()
@click.argument("measured", type=Path)
def main(measured: Path) -> None:
    """Print both errors."""
    shipped, halves = left_out(measured, measured.with_suffix(".cluster.yaml"))
    for name, residual in (("as shipped", shipped), ("fitted to the other half", halves)):
        error = np.abs(np.expm1(-residual))
        click.echo(
            f"{name:<26} {len(error)} runs, median error {np.median(error):.1%}, "
            f"90th percentile {np.quantile(error, 0.9):.1%}, bias {np.median(np.expm1(-residual)):+.1%}"
        )


if __name__ == "__main__":
    main()

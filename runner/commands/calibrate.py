"""`outlay calibrate`: fit the efficiency figures to measured step times, or measure this machine."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from outlay.profiles.errors import UsageError


@click.command()
@click.option(
    "--cases",
    multiple=True,
    type=Path,
    help="CSV of measured runs (columns of `estimate --cases`).",
)
@click.option("--cluster", type=Path, help="Cluster file of the machine that CPU rows ran on.")
@click.option("--alone", is_flag=True, help="Fit to these files alone, without the published runs.")
@click.option(
    "--measure", is_flag=True, help="Run real steps of small models on this machine first."
)
@click.option(
    "--steps", type=click.IntRange(3), default=5, show_default=True, help="With --measure."
)
@click.option("--most", type=click.IntRange(1), default=12, show_default=True,
              help="With --measure: runs of the grid, at most.")  # fmt: skip
@click.option("--out", type=Path, help="Folder for the figures (default: this user's own, used from then on); "
              "with --measure: the CSV file (default: measured.csv).")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print; write nothing.")
def calibrate(
    cases: tuple[Path, ...], cluster: Path | None, alone: bool, measure: bool, steps: int, most: int,
    out: Path | None, dry_run: bool,
) -> None:  # fmt: skip
    """Fit the efficiency figures to measured runs, or measure this machine.

    --cases fits (about a minute with the published runs) and says what each figure came to and how well
    the data determine it. --measure runs a grid of small models (micro-batch, sequence, ZeRO stage,
    checkpointing), prints measured against predicted, and narrows the intervals on this machine at once.
    """
    if measure == bool(cases):
        raise UsageError(
            "give either --cases FILE or --measure", do="see `outlay calibrate --help`"
        )
    if measure:
        from outlay.runner.measure_grid import measure_grid

        measure_grid(steps=steps, most=most, out=out or Path("measured.csv"), keep=not dry_run)
        return
    _fit(cases, cluster, alone, out, dry_run)


def _fit(
    cases: tuple[Path, ...], cluster: Path | None, alone: bool, out: Path | None, dry_run: bool
) -> None:
    from outlay.planner.calibrate import calibrate as fit
    from outlay.planner.calibration import figures_text, outcome
    from outlay.planner.estimate.efficiency import own_folder
    from outlay.planner.hardware import read_cluster
    from outlay.planner.spec.files import write_text

    folder = out or own_folder()
    if folder is None and not dry_run:
        raise UsageError("OUTLAY_EFFICIENCY is off", do="pass --out FOLDER, or --dry-run")
    machine = None if cluster is None else read_cluster(cluster)
    given = list(cases)
    if not alone and machine is None:
        given.append(Path(str(files("outlay.profiles") / "measurements" / "published.csv")))
    c = fit(given, cluster=machine)
    names = ", ".join(path.name for path in given)
    found = outcome(c, f"fitted to {len(c.rows)} step times of {names}")
    click.echo(found.text)
    if dry_run or folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, figures in found.figures.items():
        path = folder / f"{name}.yaml"
        write_text(path, figures_text(name, figures, path.read_text() if path.exists() else ""))
    click.echo(f"wrote {len(found.figures)} files into {folder}", err=True)

"""`outlay calibrate`: figures come out of a file of cases, and rubbish is refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml
from click.testing import CliRunner

from outlay.planner.estimate.efficiency import SCHEMA_EFFICIENCY
from outlay.runner.cli import cli

GRID = Path(str(files("outlay.profiles") / "measurements" / "cpu-grid.csv"))


def test_cases_of_a_cpu_become_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures"
    cluster = GRID.with_suffix(".cluster.yaml")
    done = CliRunner().invoke(
        cli, ["calibrate", "--cases", str(GRID), "--cluster", str(cluster), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "determined" in done.output
    written = yaml.safe_load((out / "cpu.yaml").read_text())
    assert written["schema"] == SCHEMA_EFFICIENCY
    assert any(f["kind"] == "fitted" for f in written["figures"].values())
    for figure in written["figures"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_nothing_asked_or_nothing_in_the_file_is_an_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli, ["calibrate"]).exit_code != 0
    empty = tmp_path / "empty.csv"
    empty.write_text(GRID.read_text().splitlines()[0] + "\n")
    done = CliRunner().invoke(cli, ["calibrate", "--cases", str(empty), "--alone", "--dry-run"])
    assert done.exit_code != 0
    assert done.exception is not None and "no row has a step time" in str(done.exception)

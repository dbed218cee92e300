"""Files with a fault from a public issue: `check` names the fault and its mend. Sound ones raise no alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from outlay.planner.read.document import read_document
from outlay.planner.read.kinds import KINDS, kind_of
from outlay.runner.cli import cli

CONFIGS = Path(__file__).parent / "configs"
FLAWED: list[dict[str, Any]] = yaml.safe_load((CONFIGS / "flawed.yaml").read_text())
SOUND: list[dict[str, Any]] = yaml.safe_load((CONFIGS / "sound.yaml").read_text())


def checked(path: Path, row: dict[str, Any], *more: str) -> dict[str, Any]:
    args = ["check", str(path), "--hardware", row["hardware"], "--format", "json"]
    result = CliRunner().invoke(cli, [*args, *row.get("flags", ()), *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("row", FLAWED, ids=lambda row: row["file"])
def test_the_fault_of_an_issue_is_named_with_its_mend(row: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / ("out" + Path(row["file"]).suffix)
    value = checked(CONFIGS / "flawed" / row["file"], row, "--write", str(out))
    found = [f for f in value["findings"] if f["rule"] == row["rule"]]
    assert found, value["findings"]
    written = "".join(Path(name).read_text() for name in value["written"])
    said = " ".join(f["do"] for f in found)
    assert row["mend"] in said or row["mend"] in written
    again = {f["where"]: f["rule"] for f in checked(out, row)["findings"] if f["level"] != "advice"}
    assert row["rule"] not in again.values() or not any(f["mended"] for f in found)


@pytest.mark.parametrize("row", SOUND, ids=lambda row: row["file"])
def test_a_sound_file_raises_no_alarm(row: dict[str, Any]) -> None:
    value = checked(CONFIGS / "sound" / row["file"], row)
    assert [f for f in value["findings"] if f["level"] != "advice"] == []


def test_every_format_is_there_and_every_issue_is_cited() -> None:
    assert len(FLAWED) >= 40
    assert len(SOUND) >= 20
    assert all("#" in row["issue"] for row in FLAWED)
    for name, rows in (("flawed", FLAWED), ("sound", SOUND)):
        assert {kind_of(read_document(CONFIGS / name / row["file"])) for row in rows} == set(KINDS)

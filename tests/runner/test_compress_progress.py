"""What a run says about its compression, and what its flags change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks as r
from click.testing import CliRunner

from outlay.planner.spec.compress import Compression, Pruning, Qat
from outlay.planner.spec.files import to_yaml, write_text
from outlay.profiles.errors import MissingExtra, UsageError
from outlay.runner import fit
from outlay.runner.cli import cli
from outlay.runner.commands.run import with_compression
from outlay.runner.compress.progress import Progress
from outlay.runner.events import EventLog, read_events
from outlay.runner.folder import Attempts, RunFolder

REPORT = {
    "asked": 0.5, "wanted": 50, "sparsity": 0.3, "zeros": 30, "weights": 100,
    "matrices": {"a": {"zeros": 30, "weights": 100}},
}  # fmt: skip


class Scripted:
    """A compressor that changes at the steps it is told."""

    def __init__(self, changes: dict[int, dict[str, Any]], report: dict[str, Any]) -> None:
        self.changes, self._report = changes, report

    def before_step(self, step: int, total: int) -> dict[str, Any]:
        assert total == 9
        return self.changes.get(step, {})

    def report(self) -> dict[str, Any]:
        return self._report


def said(folder: Path, compressor: Any, *, lead: bool = True) -> tuple[Progress, list[Any]]:
    log = EventLog(folder / "events.jsonl", lambda: 1.0)
    progress = Progress(compressor, log, lead=lead)
    for step in range(3):
        progress.before_step(step, 9)
    progress.at_end(3)
    return progress, list(read_events(folder / "events.jsonl"))


def test_changes_and_the_end_are_events(tmp_path: Path) -> None:
    progress, events = said(tmp_path, Scripted({1: {"sparsity": 0.2}}, REPORT))
    assert [(e.kind, e.step) for e in events] == [("compress", 2), ("compress", 3), ("warning", 3)]
    assert events[0].data == {"sparsity": 0.2}
    assert events[1].data == REPORT == progress.report
    message = events[2].data["message"]
    assert "30 of 100 weights are zero, 30.00%, where 50.00%" in message


def test_what_arrived_is_no_warning(tmp_path: Path) -> None:
    _, events = said(tmp_path, Scripted({}, REPORT | {"zeros": 50, "sparsity": 0.5}))
    assert [e.kind for e in events] == ["compress"]


def test_other_ranks_are_silent_and_dense_runs_too(tmp_path: Path) -> None:
    progress, events = said(tmp_path, Scripted({1: {"sparsity": 0.2}}, REPORT), lead=False)
    assert events == [] and progress.report == REPORT
    progress, events = said(tmp_path, None)
    assert events == [] and progress.report is None


def test_flags_of_a_run_over_its_plan() -> None:
    plan = r.tiny_plan(job={"compress": Compression(pruning=Pruning(sparsity=0.5))})
    assert with_compression(plan, None, None) == plan
    assert with_compression(plan, "none", None).job.compress is None
    both = with_compression(plan, "2:4", "int8").job.compress
    assert both == Compression(pruning=Pruning(pattern="2:4"), qat=Qat(bits=8, activation_bits=8))


def test_a_plan_edited_by_hand_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a rank is started: groups that do not divide, and a package that is absent."""
    fit.check_rules(r.tiny_plan(job={"compress": Compression(qat=Qat(bits=4))}))
    with pytest.raises(UsageError, match="4-bit groups of 128"):
        fit.check_rules(r.tiny_plan(job={"compress": Compression(qat=Qat(bits=4, group=128))}))

    def version(name: str) -> str:
        raise fit.PackageNotFoundError(name)

    monkeypatch.setattr(fit, "version", version)
    with pytest.raises(MissingExtra, match=r"torchao[\s\S]*outlay\[compress\]"):
        fit.check_rules(r.tiny_plan(job={"compress": Compression(qat=Qat())}))


def test_status_has_the_share(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", lambda: 1.0)
    log.write("step", 4, loss=5.0)
    log.write("compress", 4, **REPORT)
    folder = RunFolder(tmp_path)
    write_text(folder.plan, to_yaml(r.tiny_plan()))
    folder.write_attempts(Attempts())
    shown = CliRunner().invoke(cli, ["status", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    lines = dict(line.split(None, 1) for line in shown.output.splitlines())
    assert (lines["sparsity"], lines["zeros"], lines["asked"]) == ("0.3", "30", "0.5")
    assert "matrices" not in lines

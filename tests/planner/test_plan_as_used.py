"""`plan` and `size` in a shell: a reader that leaves early, a budget that shortens what has a warm-up."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from outlay.planner.commands.reader import reader_may_leave
from outlay.planner.jobs import default_precision
from outlay.planner.search import search
from outlay.planner.size.allocator import keep_freed_memory
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.profiles.errors import UsageError
from outlay.runner.cli import cli

ONE_B = ["--model", "llama-3.2-1b", "--hardware", "h100-sxm:8"]


@pytest.mark.parametrize(
    "command", [["plan", *ONE_B], ["size", *ONE_B, "--price-usd-per-h", "24", "--format", "json"]]
)
def test_a_reader_may_leave(command: list[str], tmp_path: Path) -> None:
    """`| head` closes the pipe: the answer is written, the exit code 0, nothing on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from outlay.runner.cli import main; main()", *command],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0, said
    assert "Error" not in said
    assert "Exception" not in said
    assert (tmp_path / ("plan.yaml" if command[0] == "plan" else "size.json")).is_file()


def test_memory_is_kept_or_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice is as good as once; another system or C library is left as it is."""
    told: list[tuple[int, int]] = []

    class Glibc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            told.append((option, value))
            return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Glibc())
    keep_freed_memory()
    keep_freed_memory()
    assert told == [(-1, 256 << 20), (-3, 64 << 20)] * 2
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()
    assert len(told) == 4


def test_other_exits_pass_through() -> None:
    with pytest.raises(SystemExit) as left, reader_may_leave():
        raise SystemExit(3)
    assert left.value.code == 3


def test_a_warm_up_is_compared_with_the_steps_that_the_budget_holds(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: llama-3.2-1b\nhardware: h100-sxm:8\nprice_usd_per_h: 24\nbudget: [1usd]\n"
        "schedule: {warmup_steps: 1000}\n"
    )
    args = ["plan", str(job), "--dry-run", "--format", "json"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    steps = plan["job"]["steps"]
    assert steps < 1000
    (note,) = [
        a for a in plan["estimate"]["assumptions"] if a["what"] == "schedule_warmup_steps"
    ]  # fmt: skip
    assert f"{steps:,} steps" in note["source"]


@pytest.mark.parametrize("hardware", ["rtx-4090:1", "v100-sxm-32gb:8", "h100-sxm:8"])
def test_no_other_precision_would_be_chosen(hardware: str) -> None:
    """Why precision is no axis of the search: on a GPU the one that is taken by itself is the fastest by far."""
    from outlay.planner.hardware import resolve_hardware

    spec, _ = resolve_model("llama-3.2-1b")
    cluster = resolve_hardware(hardware)
    seconds = {}
    for precision in ("bf16", "fp16", "tf32", "fp32"):
        job = Job(
            model="m", seq_len=2048, global_batch=64, steps=10, precision=precision  # type: ignore[arg-type]
        )  # fmt: skip
        try:
            found = search(spec, job, cluster)
        except UsageError:  # it has none of that
            continue
        assert found.estimates.step is not None
        seconds[precision] = float(found.estimates.step.time_s[found.best_index])
    taken = default_precision(cluster)[0]
    assert seconds[taken] == min(seconds.values())
    assert all(seconds[p] > 1.4 * seconds[taken] for p in ("tf32", "fp32") if p in seconds)

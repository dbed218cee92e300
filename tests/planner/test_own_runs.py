"""Own measurements shift the step time and narrow its interval, on their kind of machine only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from outlay.planner.calibration import figures_text
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.efficiency import efficiency_for
from outlay.planner.estimate.estimator import Estimates, evaluate
from outlay.planner.hardware import resolve_hardware
from outlay.planner.own_runs import append, correction
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import FileError

SPEC, _ = resolve_model("llama-3-8b")
CLUSTER = resolve_hardware("h100-sxm:8")
JOB = Job(model="llama-3-8b", seq_len=4096, global_batch=64, steps=10, precision="bf16")
STRATEGY = Strategy(zero=2, dp=8, micro_batch=1, grad_accum=8, activation_checkpointing="full")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "own.csv"
    monkeypatch.setenv("OUTLAY_MEASUREMENTS", str(path))
    return path


def estimated(**changes: Any) -> Estimates:
    return evaluate(SPEC, JOB, CLUSTER, Candidates.of([STRATEGY]), **changes)


def seconds(e: Estimates) -> tuple[float, float, float]:
    assert e.step is not None and e.step_low is not None and e.step_high is not None
    return float(e.step_low[0]), float(e.step.time_s[0]), float(e.step_high[0])


def measure(ratio: float, runs: int, **changes: Any) -> None:
    _, predicted_s, _ = seconds(estimated(own=False))
    for i in range(runs):
        append(
            spec=SPEC, job=dataclasses.replace(JOB, **changes), cluster=CLUSTER, strategy=STRATEGY,
            software="deepspeed", measured_s=predicted_s * ratio, predicted_s=predicted_s, name=f"run-{i}",
            measured_at="2026-11-24T00:00:00+00:00",
        )  # fmt: skip


def test_runs_that_were_slower_shift_and_narrow(own: Path) -> None:
    low, expected, high = seconds(estimated())
    measure(1.3, runs=4)
    own_low, own_expected, own_high = seconds(estimated())
    assert expected < own_expected < 1.3 * expected
    assert own_high / own_low < high / low
    e = estimated()
    assert e.step is not None
    assert sum(float(v[0]) for v in e.step.parts.values()) == pytest.approx(own_expected)


def test_more_runs_are_trusted_more_and_far_ones_less(own: Path) -> None:
    measure(1.3, runs=1)
    one = correction(SPEC, JOB, CLUSTER, software="deepspeed", half_width=0.5)
    measure(1.3, runs=5)
    many = correction(SPEC, JOB, CLUSTER, software="deepspeed", half_width=0.5)
    far_job = dataclasses.replace(JOB, seq_len=262_144)
    far = correction(SPEC, far_job, CLUSTER, software="deepspeed", half_width=0.5)
    assert one and many and far
    assert 1 < one.factor < many.factor < 1.3
    assert many.half_width < one.half_width < 0.5
    assert 1 < far.factor < many.factor
    assert many.half_width < far.half_width


def test_another_accelerator_and_the_cases_are_left_alone(own: Path) -> None:
    before = seconds(estimated(own=False))
    measure(1.3, runs=4)
    assert seconds(estimated(own=False)) == before
    elsewhere = resolve_hardware("a100-sxm-80gb:8")
    assert correction(SPEC, JOB, elsewhere, software="deepspeed", half_width=0.5) is None


def test_a_file_of_rubbish_is_one_clear_error(own: Path) -> None:
    own.parent.mkdir()
    own.write_text("a,b\n1,2\n")
    with pytest.raises(FileError, match="columns"):
        estimated()
    own.unlink()
    measure(1.3, runs=1)
    own.write_text(own.read_text().replace("run-0,h100-sxm,", "run-0,h100-sxm,-"))
    with pytest.raises(FileError, match="not a positive number"):
        estimated()


def test_own_figures_lie_over_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "interval.step_fraction_datasheet"
    entry = {"value": 0.111, "low": 0.1, "high": 0.2, "kind": "fitted", "source": "a test"}
    (tmp_path / "h100-sxm.yaml").write_text(figures_text("h100-sxm", {name: entry}, ""))
    monkeypatch.setenv("OUTLAY_EFFICIENCY", str(tmp_path))
    assert efficiency_for(CLUSTER.accelerator)[name] == 0.111
    monkeypatch.setenv("OUTLAY_EFFICIENCY", "off")
    assert efficiency_for(CLUSTER.accelerator)[name] != 0.111
    (tmp_path / "gpu.yaml").write_text("schema: outlay/efficiency@1\nfigures: [1]\n")
    monkeypatch.setenv("OUTLAY_EFFICIENCY", str(tmp_path))
    with pytest.raises(FileError, match="not a file of efficiency figures"):
        efficiency_for(CLUSTER.accelerator)

"""The fit recovers what made the measurements, says what they did not show, and repeats itself."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from outlay.planner.calibrate import (
    FULL_WEIGHT,
    Prior,
    StepModel,
    apply,
    calibrate,
    load,
    parameters,
    priors,
    weights,
)
from outlay.planner.cases import COLUMNS_IN
from outlay.planner.fit import least_squares
from outlay.planner.spec.cluster import Cluster
from outlay.profiles.errors import FileError

GPT = {
    "arch": "gpt", "layers": "24", "hidden": "4096", "heads": "32", "ffn": "16384", "vocab": "51200",
    "seq_len": "2048", "gpu": "a100-sxm-80gb", "gpus": "8", "gpus_per_node": "8",
    "framework": "megatron", "precision": "bf16", "zero": "0", "attention": "flash",
    "activation_checkpointing": "full",
}  # fmt: skip


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS_IN)
        writer.writeheader()
        writer.writerows(rows)
    return path


def measurements(path: Path, shift: dict[str, float]) -> Path:
    """Rows of three sources whose times are the model's own, with figures moved by `shift`."""
    rows = [
        GPT | {"id": f"{tp}-{micro}", "source": f"source {tp}", "tp": str(tp), "dp": str(8 // tp),
               "micro_batch": str(micro), "global_batch": str(32), "measured_step_s": "1"}
        for tp in (1, 2, 4) for micro in (1, 2, 4)
    ]  # fmt: skip
    known = load([write(path, rows)])
    params = parameters(known, priors("gpu"))
    theta = np.array([shift.get(p.figure, 0.0) if p.level == "spread" else 0.0 for p in params])
    seconds = np.exp(StepModel(known, params, priors("gpu")).value(theta))
    return write(
        path, [row | {"measured_step_s": f"{s:.6g}"} for row, s in zip(rows, seconds, strict=True)]
    )


def test_the_fit_moves_to_what_made_the_measurements(tmp_path: Path) -> None:
    path = measurements(tmp_path / "slow.csv", {"compute.gemm_fraction": -0.25})
    c = calibrate([path], leave_out=False)
    moved = [
        t for p, t in zip(c.params, c.fit.theta, strict=True) if p.figure == "compute.gemm_fraction"
    ]
    assert sum(moved) < -0.1
    assert np.abs(c.residual).max() < 0.06
    at_prior = StepModel(c.rows, c.params, priors("gpu")).value(np.zeros(len(c.params)))
    before = np.abs(np.log([r.measured_s for r in c.rows]) - at_prior)
    assert np.abs(c.residual).mean() < before.mean() / 4


def test_what_the_rows_do_not_show_stays_at_its_prior(tmp_path: Path) -> None:
    c = calibrate([measurements(tmp_path / "m.csv", {})], leave_out=False)
    index = {p.figure: i for i, p in enumerate(c.params) if p.level == "spread"}
    for figure in ("moe.dispatch_factor", "compute.fp4_factor", "communication.inter_fraction"):
        assert c.fit.determined[index[figure]] == pytest.approx(0.0, abs=1e-6)
        assert c.fit.theta[index[figure]] == pytest.approx(0.0, abs=1e-6)
    assert c.fit.determined[index["compute.gemm_fraction"]] > 0.1


def test_the_same_rows_give_the_same_figures_and_left_out_sources_are_harder(
    tmp_path: Path,
) -> None:
    path = measurements(tmp_path / "m.csv", {"compute.gemm_fraction": -0.25})
    one, two = calibrate([path]), calibrate([path])
    assert (one.fit.theta == two.fit.theta).all()
    assert (one.left_out == two.left_out).all()
    assert np.abs(one.left_out).mean() >= np.abs(one.residual).mean()


def test_derivatives_are_those_of_the_values(tmp_path: Path) -> None:
    rows = load([measurements(tmp_path / "m.csv", {})])
    params = parameters(rows, priors("gpu"))
    model = StepModel(rows, params, priors("gpu"))
    zero = np.zeros(len(params))
    value, slope = model(zero)
    assert value == pytest.approx(model.value(zero))
    j = next(i for i, p in enumerate(params) if p.figure == "compute.gemm_fraction")
    assert (slope[:, j] < 0).all()
    moved = zero.copy()
    moved[j] = 1e-3
    assert (model.value(moved) - value) / 1e-3 == pytest.approx(slope[:, j])


def test_a_machine_of_cpus_fits_its_own_figures(tmp_path: Path, cpu_cluster: Cluster) -> None:
    rows = [
        GPT | {"id": str(n), "source": "grid", "gpu": "cpu", "gpus": "2", "gpus_per_node": "2", "tp": "1",
               "pp": "1", "dp": "2", "layers": "4", "hidden": "128", "heads": "4", "ffn": "512", "seq_len": "64",
               "framework": "deepspeed", "precision": "fp32", "micro_batch": str(n),
               "global_batch": str(2 * n), "measured_step_s": "0.5"}
        for n in (1, 2, 4, 8)
    ]  # fmt: skip
    path = write(tmp_path / "cpu.csv", rows)
    c = calibrate([path], cluster=cpu_cluster, leave_out=False)
    assert {p.where for p in c.params} == {"cpu"}
    assert {p.figure for p in c.params} == set(priors("cpu"))
    before = StepModel(c.rows, c.params, priors("cpu")).value(np.zeros(len(c.params)))
    assert np.abs(c.residual).mean() < np.abs(np.log(0.5) - before).mean()


def test_no_row_that_can_be_used_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "none.csv", [GPT | {"id": "1", "tp": "1", "pp": "1"}])
    with pytest.raises(FileError, match="no row has a step time"):
        calibrate([path])


def test_a_large_source_weighs_as_the_root_of_its_size() -> None:
    sources = np.array(["small"] * FULL_WEIGHT + ["large"] * 100 * FULL_WEIGHT)
    found = weights(sources)
    assert found[0] == 1
    assert found[sources == "large"].sum() == pytest.approx(10 * FULL_WEIGHT)


def test_figures_stay_where_they_make_sense() -> None:
    share = Prior(value=0.8, transform="logit", spread=1.0, source="test")
    rate = dataclasses.replace(share, transform="log", centres={"here": 0.5})
    shifts = np.array([-9.0, 0.0, 9.0])
    assert ((apply(share, shifts) > 0) & (apply(share, shifts) < 1)).all()
    assert apply(share, 0.0) == pytest.approx(0.8)
    assert (apply(rate, shifts) > 0).all()
    assert apply(rate, 0.0, "here") == pytest.approx(0.5)
    assert apply(rate, 0.0, "elsewhere") == pytest.approx(0.8)


def test_outliers_pull_little_and_priors_hold() -> None:
    slope = np.ones((10, 1))
    target = np.array([1.0] * 9 + [50.0])

    def line(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return slope @ theta, slope

    free = least_squares(line, target, np.ones(10), 0.1, np.array([100.0]), np.zeros(1))
    assert free.theta[0] == pytest.approx(1.0, abs=0.05)
    assert free.determined[0] > 0.99
    tight = least_squares(line, target, np.ones(10), 0.1, np.array([1e-3]), np.zeros(1))
    assert abs(tight.theta[0]) < 0.01


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_priors_are_sound(kind: str) -> None:
    for name, prior in priors(kind).items():
        assert prior.transform in ("log", "logit"), name
        assert prior.spread > 0, name
        assert prior.value > 0, name
        assert prior.value < 1 or prior.transform == "log", name
        assert prior.source, name

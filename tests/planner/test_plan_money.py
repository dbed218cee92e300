"""Data and budgets decide how long a plan is; figures that divide are range-checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from outlay.planner.assumed import parse_assumed
from outlay.planner.cost import budget_s, carbon_of
from outlay.planner.hardware import resolve_hardware
from outlay.planner.jobs import JobFile, data_of, resolve_job, tokens_of
from outlay.planner.report.terminal import budget_rows
from outlay.planner.spec.cluster import Cluster, Link
from outlay.planner.spec.job import Budget, Job, Optimizer
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import UsageError


@pytest.fixture
def prepared(tmp_path: Path) -> str:
    """A folder as `outlay data prepare` leaves it, as far as the planner reads it."""
    (tmp_path / "dataset.json").write_text(json.dumps({"train": {"tokens": 10_000}}))
    return str(tmp_path)


def test_a_prepared_folder_is_tokens_and_anything_else_text(prepared: str, tmp_path: Path) -> None:
    data = data_of(prepared)
    assert data is not None
    assert data.format == "tokens"
    assert tokens_of(data) == 10_000
    (tmp_path / "corpus").mkdir()
    text = data_of(str(tmp_path / "corpus"))
    assert text is not None
    assert text.format == "text"
    assert tokens_of(text) is None


def test_without_a_length_the_data_is_seen_once(
    prepared: str, tiny_spec: ModelSpec, cpu_cluster: Cluster
) -> None:
    file = JobFile(model="m", data=prepared, seq_len=50, global_batch=10, precision="fp32")
    resolved = resolve_job(file, tiny_spec, cpu_cluster)
    assert resolved.job.steps == 20
    assert [a["what"] for a in resolved.assumptions] == ["steps"]
    assert "one epoch" in resolved.assumptions[0]["source"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30min", 1800.0), ("2gpuh", 3600.0), ("0.2usd", 7200.0), ("1kWh", None)]
)
def test_seconds_of_a_budget(
    text: str, seconds: float | None, cpu_cluster: Cluster, tiny_job: Job
) -> None:
    assert budget_s(Budget.parse(text), cpu_cluster, tiny_job) == pytest.approx(seconds)


def test_seconds_of_a_budget_of_energy(tiny_job: Job) -> None:
    """1 kW of TDP at half load in a server of twice that, PUE 1.5: 1.5 kW."""
    cluster = resolve_hardware("h100-sxm:1", inter_node_gbps=None, price_usd_per_h=None)
    one_kw = dataclasses.replace(
        cluster, accelerator=dataclasses.replace(cluster.accelerator, tdp_w=1000.0)
    )
    assume = parse_assumed(["tdp_fraction=0.5", "server_power_factor=2", "pue=1.5"])
    job = dataclasses.replace(tiny_job, assume=assume)
    assert budget_s(Budget.parse("3kWh"), one_kw, job) == pytest.approx(7200)
    assert budget_s(Budget.parse("3kgCO2e"), one_kw, job) is None
    here = dataclasses.replace(job, region="FRA")
    carbon = carbon_of("FRA")
    assert carbon is not None
    assert budget_s(Budget.parse("3kgCO2e"), one_kw, here) == pytest.approx(7200 / carbon[0])


def test_a_plan_says_when_its_budget_ends_it(cpu_cluster: Cluster, tiny_job: Job) -> None:
    job = dataclasses.replace(tiny_job, steps=100, budget=(Budget.parse("10s"),))
    ((_, text),) = budget_rows(job, cpu_cluster, 1.0)
    assert "10s holds about 10 steps of 100" in text
    assert "STOP AT THE BUDGET" in text
    ((_, text),) = budget_rows(job, cpu_cluster, 0.01)
    assert "STOP" not in text
    assert "the run has 100" in text
    free = dataclasses.replace(cpu_cluster, price_usd_per_h=None)
    money = dataclasses.replace(job, budget=(Budget.parse("1usd"),))
    ((_, text),) = budget_rows(money, free, 1.0)
    assert "needs a price" in text


@pytest.mark.parametrize("text", ["20s", "2.75min", "72h", "0.02usd"])
def test_budgets_print_as_they_are_typed(text: str) -> None:
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_nonsense_learning_rates(lr: float) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.lr"):
        Optimizer(lr=lr)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_figures_that_divide_are_positive(value: float, cpu_cluster: Cluster) -> None:
    with pytest.raises(UsageError, match="positive and finite"):
        Link(kind="pcie", bytes_per_s=value, latency_s=1e-6, source="test")
    assert cpu_cluster.rates is not None
    with pytest.raises(UsageError, match="fp32 must be positive"):
        dataclasses.replace(cpu_cluster.rates, gemm_flops={"fp32": value})
    with pytest.raises(UsageError, match="positive and finite"):
        dataclasses.replace(cpu_cluster, nodes=0)


@pytest.mark.parametrize("tokens", ["0", "1e300", 0])
def test_nonsense_token_counts(
    tokens: str | int, tiny_spec: ModelSpec, cpu_cluster: Cluster
) -> None:
    with pytest.raises(UsageError, match="tokens"):
        resolve_job(JobFile(model="m", tokens=tokens), tiny_spec, cpu_cluster)

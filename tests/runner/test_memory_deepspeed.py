"""The memory that real DeepSpeed ranks take is the memory that the estimate says."""

from __future__ import annotations

import statistics

import pytest
from click.testing import CliRunner

from benchmarks import memory_deepspeed as bench

MEDIAN, WORST = 0.08, 0.20
"""The bar: relative error of a configuration."""


def _errors(numbers: tuple[int, ...]) -> dict[int, float]:
    with bench.in_living_ranks() as measure:
        return {n: float(bench.row_of(n, measure)["error"]) for n in numbers}


@pytest.mark.ranks
def test_six_configurations() -> None:
    errors = _errors(bench.IN_CI)
    assert len(errors) == 6
    assert max(abs(e) for e in errors.values()) <= WORST, errors
    assert statistics.median(abs(e) for e in errors.values()) <= MEDIAN, errors


@pytest.mark.ranks
@pytest.mark.long
def test_all_configurations() -> None:
    errors = _errors(tuple(range(len(bench.CASES))))
    assert len(errors) >= 24
    assert max(abs(e) for e in errors.values()) <= WORST, errors
    assert statistics.median(abs(e) for e in errors.values()) <= MEDIAN, errors


def test_what_was_measured_is_within_the_bar() -> None:
    rows = bench.scored(bench.MEASURED)
    assert [row["number"] for row in rows] == list(range(len(bench.CASES)))
    errors = [abs(float(row["error"])) for row in rows]
    assert statistics.median(errors) <= MEDIAN
    assert max(errors) <= WORST


def test_the_configurations_are_as_varied_as_they_say() -> None:
    strategies = [case.strategy for case in bench.CASES]
    assert {s.zero for s in strategies} == {0, 1, 2, 3}
    assert {s.pp for s in strategies} == {1, 2}
    assert {s.offload_optimizer for s in strategies} == {"none", "cpu"}
    assert {s.offload_param for s in strategies} == {"none", "cpu"}
    assert {s.activation_checkpointing for s in strategies} == {"none", "full"}
    assert {case.model for case in bench.CASES} == set(bench.MODELS)
    assert len({s.micro_batch for s in strategies}) >= 5
    assert len({case.seq_len for case in bench.CASES}) >= 5
    assert len({(c.model, c.seq_len, c.attention, c.strategy) for c in bench.CASES}) == len(
        bench.CASES
    )


def test_numbers_of_cases_that_make_no_sense_are_refused() -> None:
    for text in ("x", "3-1", "99", "-1"):
        result = CliRunner().invoke(bench.main, ["--only", text])
        assert result.exit_code == 1
        assert "--only" in result.output


def test_the_csv_has_the_columns_it_says() -> None:
    row = bench.row_of(23, lambda plan: [200_000_000, 190_000_000])
    assert tuple(row) == bench.COLUMNS
    assert row["measured_bytes"] == 200_000_000
    assert float(row["error"]) == pytest.approx(row["predicted_bytes"] / 2e8 - 1, abs=1e-4)

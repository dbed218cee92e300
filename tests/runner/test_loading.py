"""What loading takes of each rank is what the estimate says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import loading as bench
from benchmarks.memory_deepspeed import in_living_ranks

WORST = 0.20
"""The bar: relative error of a configuration."""


def _rows(numbers: tuple[int, ...], folder: Path) -> dict[int, dict[str, float]]:
    weights = folder / "weights"
    bench.write_weights(weights)
    with in_living_ranks(steps=0) as measure:
        return {n: bench.row_of(bench.CASES[n], weights, measure) for n in numbers}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "numbers",
    [bench.IN_CI, pytest.param(tuple(range(6)), marks=pytest.mark.long)],
    ids=["three", "six"],
)
def test_loading_takes_what_the_estimate_says(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    rows = _rows(numbers, tmp_path)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) >= 4
    errors = {rows[n]["strategy"]: rows[n]["error"] for n in numbers}
    assert max(abs(error) for error in errors.values()) <= WORST, errors

"""Masks hold in every ZeRO stage and in a pipeline: exactly the zeros that were asked for, none revives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r

from outlay.planner.spec.compress import Compression, Pruning
from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks
STEPS = 8
STAGES: dict[str, Any] = {"dp": 1, "pp": 2, "grad_accum": 4}
SLICES: dict[str, Any] = {"dp": 1, "tp": 2, "grad_accum": 4}
STRATEGIES = (
    {"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 0, **STAGES}, {"zero": 1, **STAGES},
    {"zero": 1, **SLICES},
)  # fmt: skip
OFFLOADED = ({"zero": 1, "offload_optimizer": "cpu"},
             {"zero": 3, "offload_optimizer": "cpu", "offload_param": "cpu"})  # fmt: skip
HALF = Pruning(sparsity=0.5, updates=3)
PATTERN = Pruning(pattern="2:4")
Run = dict[str, Any]
Train = Callable[..., list[Run]]


def name_of(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}{value[key]}" for key in value if key not in ("dp", "grad_accum"))
    if isinstance(value, Pruning):
        return f"{value.pattern or value.sparsity}-{value.scope}-{value.schedule}"
    return str(value)


def plan_of(pruning: Pruning, family: str = "llama", **strategy: Any) -> Any:
    return r.tiny_plan(
        family, steps=STEPS, job={"compress": Compression(pruning=pruning)}, **strategy
    )


@pytest.fixture(scope="module")
def unsplit(ranks: RankPool) -> Callable[[Pruning], Run]:
    """ZeRO-0, what the others must agree with; made once for each pruning."""

    @cache
    def run(pruning: Pruning) -> Run:
        plan = plan_of(pruning, zero=0)
        first: Run = ranks.call("ranks_compress:train_compressed", plan, STEPS)[0]
        return first

    return run


def assert_exact(runs: list[Run], pruning: Pruning) -> None:
    """In memory and in what would be exported, by matrix or in all."""
    weights, report = runs[0]["weights"], runs[0]["report"]
    matrices = report["matrices"]
    assert len(matrices) == 21
    exported = {name: int((weights[name] == 0).sum()) for name in matrices}
    assert exported == {name: m["zeros"] for name, m in matrices.items()}
    asked = pruning.final_sparsity
    if pruning.scope == "layer":
        assert exported == {name: round(asked * m["weights"]) for name, m in matrices.items()}
    assert report["zeros"] == report["wanted"] == round(asked * report["weights"])
    assert report["weights"] == sum(weights[name].size for name in matrices)
    assert [run["alive"] for run in runs] == [0, 0]
    assert all(run["report"] == report for run in runs)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=name_of)
def test_half_of_each_matrix(
    ranks: RankPool, unsplit: Callable[[Pruning], Run], strategy: dict[str, Any]
) -> None:
    runs = ranks.call("ranks_compress:train_compressed", plan_of(HALF, **strategy), STEPS)
    assert_exact(runs, HALF)
    np.testing.assert_allclose(runs[0]["losses"], unsplit(HALF)["losses"], rtol=0, atol=1e-4)
    assert [step for step, _ in runs[0]["changes"]] == [2, 4, 5]
    total = sum(run["mask_bytes"] for run in runs)
    # a mask lies where the master lies: once in all, but for ZeRO-0's copies
    copies = 2 if strategy == {"zero": 0} else 1
    assert total == copies * runs[0]["report"]["weights"]


@pytest.mark.parametrize("strategy", OFFLOADED, ids=name_of)
def test_masters_on_the_host(
    ranks: RankPool, unsplit: Callable[[Pruning], Run], strategy: dict[str, Any]
) -> None:
    runs = ranks.call("ranks_compress:train_compressed", plan_of(HALF, **strategy), STEPS)
    assert_exact(runs, HALF)
    np.testing.assert_allclose(runs[0]["losses"], unsplit(HALF)["losses"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "strategy",
    [{"zero": 1}, {"zero": 3}, {"zero": 1, **STAGES}, {"zero": 1, **SLICES}],
    ids=name_of,
)
@pytest.mark.parametrize(
    "pruning", [PATTERN, Pruning(sparsity=0.7, scope="global", schedule="one_shot")], ids=name_of
)
def test_groups_and_all_together(
    ranks: RankPool, unsplit: Callable[[Pruning], Run], strategy: dict[str, Any], pruning: Pruning
) -> None:
    runs = ranks.call("ranks_compress:train_compressed", plan_of(pruning, **strategy), STEPS)
    assert_exact(runs, pruning)
    np.testing.assert_allclose(runs[0]["losses"], unsplit(pruning)["losses"], rtol=0, atol=1e-4)
    if pruning.pattern is not None:
        for name in runs[0]["report"]["matrices"]:
            groups = runs[0]["weights"][name].reshape(-1, 4)
            assert set((groups == 0).sum(1)) == {2}


@pytest.mark.parametrize(
    "strategy", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"zero": 1, **STAGES}], ids=name_of
)
def test_in_half_precision(ranks: RankPool, strategy: dict[str, Any]) -> None:
    """The masters are apart from the weights there: in DeepSpeed's flat copies."""
    plan = r.tiny_plan(
        precision="bf16", steps=STEPS, job={"compress": Compression(pruning=HALF)}, **strategy
    )
    assert_exact(ranks.call("ranks_compress:train_compressed", plan, STEPS), HALF)


@pytest.mark.parametrize(
    "strategy", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"zero": 1, **STAGES}], ids=name_of
)
def test_masks_come_back_with_the_checkpoint(
    ranks: RankPool, unsplit: Callable[[Pruning], Run], tmp_path: Path, strategy: dict[str, Any]
) -> None:
    """Saved between two choices of masks: the rest of the run is the same to the bit."""
    plan = plan_of(HALF, **strategy)
    whole = ranks.call("ranks_compress:train_compressed", plan, STEPS)
    ranks.call("ranks_compress:train_compressed", plan, STEPS, save=str(tmp_path), stop=4)
    assert (tmp_path / "step-00000004" / "masks" / "rank-00000.npz").is_file()
    folder = str(tmp_path / "step-00000004")
    rest = ranks.call("ranks_compress:train_compressed", plan, STEPS, resume=folder)
    assert_exact(rest, HALF)
    assert rest[0]["losses"] == whole[0]["losses"][4:]
    assert [step for step, _ in rest[0]["changes"]] == [4, 5]
    for name, weight in whole[0]["weights"].items():
        np.testing.assert_array_equal(rest[0]["weights"][name], weight)


@pytest.mark.parametrize("strategy", [{"zero": 0}, {"zero": 3}], ids=name_of)
def test_a_matrix_that_is_kept_turned(ranks: RankPool, strategy: dict[str, Any]) -> None:
    """GPT-2 keeps [inputs, outputs]: the groups of a pattern still lie along the inputs."""
    plan = plan_of(PATTERN, "gpt2", **strategy)
    runs = ranks.call("ranks_compress:train_compressed", plan, STEPS)
    for name in runs[0]["report"]["matrices"]:
        groups = runs[0]["weights"][name].T.reshape(-1, 4)
        assert set((groups == 0).sum(1)) == {2}
    assert len(runs[0]["report"]["matrices"]) == 12
    assert runs[0]["alive"] == 0


def test_a_tied_table_is_pruned_once(ranks: RankPool) -> None:
    pruning = Pruning(sparsity=0.25, parts=("embedding",), schedule="one_shot")
    plan = plan_of(pruning, "qwen2", zero=1)
    runs = ranks.call("ranks_compress:train_compressed", plan, 3)
    weight = runs[0]["weights"]["model.embed_tokens.weight"]
    assert (weight == 0).sum() == round(0.25 * weight.size)
    np.testing.assert_array_equal(runs[0]["weights"]["lm_head.weight"], weight)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_selection_is_sorting(ranks: RankPool, seed: int, together: bool) -> None:
    """Over pieces on two ranks: those pruned before, then the smallest, of equal ones the first."""
    found = ranks.call("ranks_compress:select_in_pieces", seed, together)
    magnitudes, units = found[0]["weights"], found[0]["units"]
    chosen = [[False] * len(w) for w in magnitudes]
    before = [[False] * len(w) for w in magnitudes]
    for rank in found:
        assert rank["kept"]
        for index, start, marks, old in rank["pieces"]:
            chosen[index][start : start + len(marks)] = marks
            before[index][start : start + len(old)] = old
    for unit, count in enumerate(found[0]["wanted"]):
        places = [
            (not before[i][j], value, i, j)
            for i, weight in enumerate(magnitudes)
            if units[i] == unit
            for j, value in enumerate(weight)
        ]
        expected = {(i, j) for _, _, i, j in sorted(places)[:count]}
        assert {(i, j) for _, _, i, j in places if chosen[i][j]} == expected

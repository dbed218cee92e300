"""Pipeline and tensor parallel together: the mathematics of one process, saved, resumed, exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r
from test_parallel_plans import planned

from outlay.planner.rules.runner_parallel import TENSOR_PARALLEL_FAMILIES
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.fit import check_rules
from outlay.runner.pool import RankPool
from outlay.runner.refuse import refuse

STEPS = 20
Reference = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Reference:
    """The curve of one process, made once for each family."""

    @cache
    def run(family: str) -> dict[str, Any]:
        result: dict[str, Any] = ranks.call("ranks:reference", r.tiny_plan(family), STEPS)[0]
        return result

    return run


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def eight() -> Iterator[RankPool]:
    with RankPool(8) as pool:
        yield pool


def grid_plan(family: str = "llama", **strategy: Any) -> Plan:
    return r.tiny_plan(family, **{"dp": 1, "tp": 2, "pp": 2, **strategy})


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slices_in_one_stage_are_one_process(
    ranks: RankPool, reference: Reference, family: str
) -> None:
    """All but the transfer between stages, which two ranks have no room for."""
    first, second = ranks.call("ranks_parallel:train_on_grid", grid_plan(family, pp=1), STEPS)
    r.compare(first, reference(family))
    assert second["losses"] == first["losses"]
    assert second["weights"] is None


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", {"zero": 0}),
        ("llama", {"zero": 1}),
        ("llama", {"zero": 1, "activation_checkpointing": "full"}),
        ("gpt2", {"zero": 1}),
        ("qwen2", {"zero": 1}),
        ("qwen3", {"zero": 1}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}{x}" for k, x in v.items()),
)
def test_two_stages_of_two_slices_are_one_process(
    four: RankPool, reference: Reference, family: str, strategy: dict[str, Any]
) -> None:
    found = four.call("ranks:train", grid_plan(family, **strategy), STEPS)
    r.compare(found[0], reference(family))
    assert all(rank["losses"] == found[0]["losses"] for rank in found)
    assert [rank["is_loss_rank"] for rank in found] == [False, False, True, True]
    assert [rank["dp_rank"] for rank in found] == [0] * 4


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("zero", [0, 1])
def test_data_parallel_goes_with_both(eight: RankPool, reference: Reference, zero: int) -> None:
    found = eight.call("ranks:train", grid_plan(dp=2, zero=zero), STEPS)
    r.compare(found[0], reference("llama"))
    assert [rank["dp_rank"] for rank in found] == [0, 0, 1, 1] * 2


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "zero", "precision"),
    [("llama", 0, "fp32"), ("llama", 1, "fp32"), ("llama", 1, "bf16"), ("gpt2", 1, "fp32")],
)
def test_a_resume_repeats_the_losses_to_the_last_bit(
    four: RankPool, tmp_path: Path, family: str, zero: int, precision: str
) -> None:
    plan = grid_plan(family, zero=zero, precision=precision)
    went_on = four.call("ranks_saved:train_save_train", plan, str(tmp_path), 3, 3)
    resumed = four.call("ranks_saved:resume_train", plan, went_on[0]["folder"], 3)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in went_on]


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_loads_what_was_trained(four: RankPool, tmp_path: Path, family: str) -> None:
    """The exported weights are the gathered ones, bit for bit; cut again they give the same loss."""
    folder, plan = tmp_path / "export", grid_plan(family, zero=1)
    trained = four.call("ranks_parallel:train_and_export_grid", plan, 3, str(folder))
    back = four.call("ranks_saved:reloaded", str(folder), plan)[0]
    np.testing.assert_array_equal(back["logits"], trained[0]["plain"])
    assert back["missing"] == []
    source = dataclasses.replace(plan.model, weights=str(folder))
    again = four.call("ranks_saved:heldout_at_start", dataclasses.replace(plan, model=source))
    assert again == [rank["heldout"] for rank in trained]


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", TENSOR_PARALLEL_FAMILIES)
def test_what_the_planner_recommends_starts(four: RankPool, family: str, precision: str) -> None:
    """As with stages alone, whose losses of three steps it has (in bf16 to its digits)."""
    plan = planned(family, {"tp": 2, "pp": 2, "zero": 1}, precision, 4)
    assert plan is not None
    assert (plan.strategy.tp, plan.strategy.pp) == (2, 2)
    check_rules(plan)
    found = four.call("ranks_parallel:three_steps", plan)
    assert all(losses == found[0] for losses in found)
    alone = planned(family, {"tp": 1, "pp": 2, "dp": 2}, precision, 4)
    assert alone is not None
    wanted = four.call("ranks_parallel:three_steps", alone)[0]
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=1e-4 if precision == "fp32" else 0.05)


@pytest.mark.long
@pytest.mark.processes
def test_closed_engines_leave_nothing(four: RankPool) -> None:
    plans = [grid_plan(zero=zero) for zero in (0, 1)]
    for rank in four.call("ranks:left_behind", plans):
        assert rank == [{"large_tensors": 0, "groups": 1, "own_linear": 0}] * len(plans)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [({"sp": 2, "pp": 1}, "sp 2"), ({"zero": 2}, "does not go with ZeRO-2")],
)
def test_what_is_not_run_is_refused(strategy: dict[str, Any], message: str) -> None:
    plan = grid_plan(**strategy)
    with pytest.raises(UsageError, match=message):
        refuse(plan, plan.strategy.world, "cpu")

"""Tensor and sequence parallel on two ranks: the mathematics of one process, saved, resumed, exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r

from outlay.planner.rules import RULES, runner_parallel
from outlay.planner.rules.runner_parallel import (
    SEQUENCE_PARALLEL_FAMILIES,
    TENSOR_PARALLEL_FAMILIES,
)
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.host import build_ops, ops_needed, prepare_environment
from outlay.runner.pool import RankError, RankPool
from outlay.runner.refuse import refuse

STEPS = 20
NO_WINDOW = {"mistral": {"sliding_window": None}}

Reference = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Reference:
    """The curve of one process, made once for each family."""

    @cache
    def run(family: str) -> dict[str, Any]:
        plan = r.tiny_plan(family, config=NO_WINDOW.get(family))
        result: dict[str, Any] = ranks.call("ranks:reference", plan, STEPS)[0]
        return result

    return run


def shared_plan(family: str = "llama", *, axis: str, **strategy: Any) -> Plan:
    """dp 1 and two ranks along `axis`, tp or sp."""
    return r.tiny_plan(family, config=NO_WINDOW.get(family), **{"dp": 1, axis: 2, **strategy})


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items())


_LLAMA: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 2, "activation_checkpointing": "full"},
    {"zero": 3},
]
IN_CI = [(axis, "llama", strategy) for axis in ("tp", "sp") for strategy in _LLAMA] + [
    ("tp", "gpt2", {"zero": 1}),
    ("tp", "gpt2", {"zero": 3}),
    ("sp", "gpt2", {"zero": 3}),
    ("tp", "qwen3", {"zero": 1}),
    ("tp", "qwen3", {"zero": 3}),
]
LONG = [
    ("sp", "gpt2", {"zero": 1}),
    ("sp", "qwen3", {"zero": 1}),
    ("sp", "qwen3", {"zero": 3}),
    *(
        (axis, family, strategy)
        for axis in ("tp", "sp")
        for family, strategy in (
            ("qwen2", {"zero": 1}),
            ("mistral", {"zero": 0}),
            ("gpt_neox", {"zero": 2}),
        )
    ),
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("axis", "family", "strategy"),
    [*IN_CI, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
    ids=_name,
)
def test_two_ranks_are_one_process(
    ranks: RankPool, reference: Reference, axis: str, family: str, strategy: dict[str, Any]
) -> None:
    first, second = ranks.call("ranks:train", shared_plan(family, axis=axis, **strategy), STEPS)
    r.compare(first, reference(family))
    assert second["losses"] == first["losses"]
    assert second["weights"] is None
    assert (first["dp_rank"], second["dp_rank"]) == (0, 0)


def test_the_runner_refuses_by_each_rule_of_the_planner() -> None:
    here = {rule.name for rule in RULES if rule.forbids.__module__ == runner_parallel.__name__}
    assert here == set(runner_parallel.PARALLEL_RULES)


def test_every_family_that_a_plan_may_have_is_trained() -> None:
    trained = {(axis, family) for axis, family, _ in [*IN_CI, *LONG]}
    assert {family for axis, family in trained if axis == "tp"} == set(TENSOR_PARALLEL_FAMILIES)
    assert {family for axis, family in trained if axis == "sp"} == set(SEQUENCE_PARALLEL_FAMILIES)


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("axis", ["tp", "sp"])
@pytest.mark.parametrize(
    ("family", "strategy"),
    [("llama", {"zero": z}) for z in range(4)] + [("gpt2", {"zero": 1}), ("qwen3", {"zero": 3})],
    ids=_name,
)
def test_two_groups_of_two_are_one_process(
    four: RankPool, reference: Reference, axis: str, family: str, strategy: dict[str, Any]
) -> None:
    plan = shared_plan(family, axis=axis, dp=2, **strategy)
    found = four.call("ranks:train", plan, STEPS)
    r.compare(found[0], reference(family))
    assert [rank["dp_rank"] for rank in found] == [0, 0, 1, 1]
    assert all(rank["losses"] == found[0]["losses"] for rank in found)


_LONG = pytest.mark.long


@pytest.mark.ranks
@pytest.mark.parametrize("axis", ["tp", "sp"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"zero": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        pytest.param({"zero": 1, "offload_optimizer": "cpu"}, marks=_LONG),
    ],
    ids=_name,
)
def test_offload_to_the_host_goes_with_it(
    ranks: RankPool, reference: Reference, axis: str, strategy: dict[str, Any]
) -> None:
    plan = shared_plan(axis=axis, **strategy)
    environment = prepare_environment(2, 1, "cpu", ranks.extensions_dir)
    build_ops(ops_needed(plan.deepspeed), environment)
    r.compare(ranks.call("ranks:train", plan, STEPS)[0], reference("llama"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("axis", "zero"),
    [
        ("tp", 1),
        ("sp", 3),
        pytest.param("tp", 3, marks=_LONG),
        pytest.param("sp", 1, marks=_LONG),
    ],
)
def test_a_resume_repeats_the_losses_to_the_last_bit(
    ranks: RankPool, tmp_path: Path, axis: str, zero: int
) -> None:
    plan = shared_plan(axis=axis, zero=zero)
    went_on = ranks.call("ranks_saved:train_save_train", plan, str(tmp_path), 3, 3)
    resumed = ranks.call("ranks_saved:resume_train", plan, went_on[0]["folder"], 3)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in went_on]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("axis", "family", "zero"), [("tp", "gpt2", 1), ("tp", "qwen3", 3), ("sp", "llama", 3)]
)
def test_transformers_loads_what_was_trained(
    ranks: RankPool, tmp_path: Path, axis: str, family: str, zero: int
) -> None:
    """Identical logits in one process; the engine's own add up in another order."""
    folder = tmp_path / "export"
    plan = shared_plan(family, axis=axis, zero=zero)
    trained = ranks.call("ranks_parallel:train_and_export", plan, 3, str(folder))
    back = ranks.call("ranks_saved:reloaded", str(folder), plan)[0]
    np.testing.assert_array_equal(back["logits"], trained[0]["plain"])
    np.testing.assert_allclose(trained[1]["engine"], back["logits"], rtol=0, atol=2e-5)
    assert back["missing"] == []
    assert back["tied"] == (family == "gpt2")
    source = dataclasses.replace(plan.model, weights=str(folder))
    again = ranks.call("ranks_saved:heldout_at_start", dataclasses.replace(plan, model=source))
    assert again == [rank["heldout"] for rank in trained]


@pytest.mark.ranks
def test_other_data_in_a_group_is_refused(ranks: RankPool) -> None:
    with pytest.raises((UsageError, RankError), match="Data inconsistency"):
        ranks.call("ranks_parallel:other_batches", shared_plan(axis="tp", zero=1))


@pytest.mark.ranks
def test_closed_engines_leave_nothing(ranks: RankPool) -> None:
    plans = [shared_plan(axis=axis, zero=zero) for axis in ("tp", "sp") for zero in (1, 3)]
    for rank in ranks.call("ranks:left_behind", plans):
        assert rank == [{"large_tensors": 0, "groups": 1, "own_linear": 0}] * len(plans)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"dp": 1, "tp": 2, "sp": 2}, "does not combine tensor parallel"),
        ("opt", {"dp": 1, "tp": 2}, "does not train opt tensor parallel"),
        ("opt", {"dp": 1, "sp": 2}, "does not train opt sequence parallel"),
        (
            "llama",
            {"dp": 1, "tp": 2, "zero": 3, "offload_optimizer": "nvme"},
            "does not combine offload to NVMe with tp 2",
        ),
        ("mistral", {"dp": 1, "sp": 2}, "no window shorter than the sequence"),
    ],
    ids=_name,
)
def test_what_is_not_run_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    plan = r.tiny_plan(family, **changes)
    with pytest.raises(UsageError, match=message):
        refuse(plan, plan.strategy.world, "cpu")

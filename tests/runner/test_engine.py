"""ZeRO 0–3 on two ranks do the mathematics of one process; engines come and go in living ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import ranks as r

from outlay.profiles.errors import UsageError
from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks
STEPS = 20

Reference = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Reference:
    """The curve of one process, made once for each family."""

    @cache
    def run(family: str) -> dict[str, Any]:
        result: dict[str, Any] = ranks.call("ranks:reference", r.tiny_plan(family), STEPS)[0]
        return result

    return run


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", {"zero": 0}),
        ("llama", {"zero": 1}),
        ("llama", {"zero": 2}),
        ("llama", {"zero": 3}),
        ("llama", {"zero": 2, "grad_accum": 4}),
        ("llama", {"zero": 1, "grad_accum": 1, "activation_checkpointing": "full"}),
        ("llama", {"zero": 3, "activation_checkpointing": "full"}),
        ("gpt2", {"zero": 1}),
        ("gpt2", {"zero": 3}),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items())
    ),
)
def test_two_ranks_are_one_process(
    ranks: RankPool, reference: Reference, family: str, strategy: dict[str, Any]
) -> None:
    first, second = ranks.call("ranks:train", r.tiny_plan(family, **strategy), STEPS)
    r.compare(first, reference(family))
    assert second["losses"] == first["losses"]
    assert second["weights"] is None
    assert (first["dp_rank"], second["dp_rank"]) == (0, 1)
    assert first["is_loss_rank"] and second["is_loss_rank"] and not first["pipeline"]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_bf16_follows_fp32(ranks: RankPool, reference: Reference, zero: int) -> None:
    """To bf16's rounding. DeepSpeed's silent first step (repairs.py) would be off by 0.06."""
    found = ranks.call("ranks:train", r.tiny_plan(zero=zero, precision="bf16"), STEPS)[0]
    expected = reference("llama")["losses"]
    assert max(abs(a - b) for a, b in zip(found["losses"], expected, strict=True)) < 0.02


@pytest.mark.parametrize(
    ("strategy", "counts"),
    [
        ({"zero": 1}, [2, 2, 2]),
        ({"zero": 1, "activation_checkpointing": "full"}, [4, 4, 4]),
        ({"zero": 3, "activation_checkpointing": "full", "recompute_layers": 1}, [4, 2, 2]),
        ({"dp": 1, "pp": 2, "activation_checkpointing": "full"}, [4, 4]),
    ],
    ids=["none", "full", "one-layer", "pipeline"],
)
def test_checkpointing_computes_blocks_again(
    ranks: RankPool, strategy: dict[str, Any], counts: list[int]
) -> None:
    first = ranks.call("ranks:block_forwards", r.tiny_plan(**strategy))[0]
    assert first["counts"] == counts  # two micro-batches


@pytest.mark.parametrize("strategy", [{"zero": 0}, {"zero": 3}, {"dp": 1, "pp": 2, "zero": 1}])
def test_learning_rate_and_gradient_norm(ranks: RankPool, strategy: dict[str, Any]) -> None:
    seen = ranks.call("ranks:still_at_zero_lr", r.tiny_plan(**strategy))
    first = seen[0]
    assert first["losses"][0] == first["losses"][1] == first["losses"][2]
    assert first["losses"][3] < first["losses"][2]
    assert first["norm_before"] is None
    assert first["norm"] == pytest.approx(seen[1]["norm"]) and first["norm"] > 0


def test_closed_engines_leave_nothing(ranks: RankPool) -> None:
    kinds = [{"zero": 3}, {"zero": 1}, {"zero": 1, "dp": 1, "pp": 2}, {"zero": 0}, {"zero": 2}]
    for rank in ranks.call("ranks:left_behind", [r.tiny_plan(**kind) for kind in kinds]):
        assert rank == [{"large_tensors": 0, "groups": 1, "own_linear": 0}] * len(kinds)


@pytest.mark.parametrize("strategy", [{"zero": 1}, {"zero": 1, "dp": 1, "pp": 2}])
def test_what_deepspeed_refuses_is_one_error_and_the_next_engine_builds(
    ranks: RankPool, strategy: dict[str, Any]
) -> None:
    plan = r.tiny_plan(**strategy)
    section = {**plan.deepspeed["zero_optimization"], "reduce_buckett_size": 1}
    broken = dataclasses.replace(plan, deepspeed={**plan.deepspeed, "zero_optimization": section})
    with pytest.raises(UsageError, match="DeepSpeed refuses the configuration") as caught:
        ranks.call("ranks:block_forwards", broken)
    assert "reduce_buckett_size" in caught.value.why
    assert ranks.call("ranks:block_forwards", r.tiny_plan(zero=2))[0]["loss"] > 0


def test_wrong_batches_are_refused_with_the_numbers(ranks: RankPool) -> None:
    plan = r.tiny_plan(zero=1)
    with pytest.raises(UsageError, match=r"takes 2 micro-batches of the shape \(2, 32\), given 1"):
        ranks.call("ranks:feed", plan, [(2, 32)])
    with pytest.raises(UsageError, match=r"given 2 of \[\(2, 31\)\]"):
        ranks.call("ranks:feed", plan, [(2, 31), (2, 31)])
    with pytest.raises(UsageError, match="not one batch"):
        ranks.call("ranks:evaluate_nothing", plan)

"""Quantization-aware training: the same in every stage, and what is stored is what was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import ranks as r

from outlay.planner.spec.compress import Compression, Pruning, Qat
from outlay.planner.spec.job import Optimizer
from outlay.profiles.errors import UsageError
from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks
STEPS, LONG = 6, 20
KINDS = ("int8", "int8-weight", "int4:g32", "int4-act8:g32")
RATE = 0.1
"""Of plain gradient descent: it takes gradients as they are, where Adam makes a rounding error of a small one
as large as a step. A weight at the edge of two steps of its grid falls to either side by such an error, and in
a model this small one weight moves the loss by 1e-4 (8 bits) to 1e-3 (4 bits): `benchmarks/qat_rounding.py`."""


def plan_of(kind: str, family: str = "llama", **strategy: Any) -> Any:
    compress = Compression(qat=Qat.parse(kind))
    return r.tiny_plan(family, steps=STEPS, job={"compress": compress}, **strategy)


def by_descent(plan: Any) -> Any:
    """The plan with SGD in the place of AdamW."""
    how = Optimizer(name="sgd", lr=RATE, weight_decay=0.0)
    params = {"lr": RATE, "weight_decay": 0.0}
    return dataclasses.replace(
        plan,
        job=dataclasses.replace(plan.job, optimizer=how, gradient_clipping=1e9),
        deepspeed={
            **plan.deepspeed,
            "optimizer": {"type": "SGD", "params": params},
            "gradient_clipping": 1e9,
        },
    )


def train(
    ranks: RankPool, plan: Any, steps: int = STEPS, lr: float | None = None
) -> dict[str, Any]:
    target = "ranks_compress:train_compressed"
    first: dict[str, Any] = ranks.call(target, plan, steps, lr=lr)[0]
    return first


@pytest.fixture(scope="module")
def unsplit(ranks: RankPool) -> Callable[[str], dict[str, Any]]:
    """ZeRO-0, what the others must agree with; made once for each kind."""
    return cache(lambda kind: train(ranks, by_descent(plan_of(kind, zero=0)), 3))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The losses before and after one update, which lowers them by 0.03; then the grid shows."""
    np.testing.assert_allclose(found["losses"][:2], expected["losses"][:2], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=3e-3)
    assert expected["losses"][1] < expected["losses"][0] - 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_was_trained(
    ranks: RankPool, unsplit: Callable[[str], dict[str, Any]], kind: str
) -> None:
    """The loss of the converted model is that of the last forward passes; stages 0 and 3 agree."""
    plan = plan_of(kind, zero=0)
    whole, split = unsplit(kind), train(ranks, by_descent(plan_of(kind, zero=3)), 3)
    assert_same(split, whole)
    found = ranks.call("ranks_compress:converted_loss", plan, whole["weights"])[0]
    assert found["converted"] == pytest.approx(whole["heldout"], rel=1e-5)
    assert found["dense"] != found["converted"]


@pytest.mark.parametrize("zero", [1, 2])
def test_other_stages_agree(
    ranks: RankPool, unsplit: Callable[[str], dict[str, Any]], zero: int
) -> None:
    kind = "int4-act8:g32"
    assert_same(train(ranks, by_descent(plan_of(kind, zero=zero)), 3), unsplit(kind))


@pytest.mark.parametrize(("zero", "nodes"), [(2, False), (3, True)])
def test_stages_are_one_arithmetic(ranks: RankPool, zero: int, nodes: bool) -> None:
    """Twenty steps of AdamW at a high rate, 4-bit weights and 8-bit inputs: where sums are added up in one
    order (one micro-batch on each of two ranks, no norm of all gradients), no stage differs. What parts
    stages elsewhere is that order alone: ZeRO-3's hooks change it where a tensor is read three times."""

    def losses(zero: int, nodes: bool) -> list[float]:
        plan = plan_of("int4-act8:g32", zero=zero, grad_accum=1)
        plan = dataclasses.replace(plan, deepspeed={**plan.deepspeed, "gradient_clipping": 0.0})
        found = ranks.call("ranks_compress:train_compressed", plan, LONG, lr=3e-3, nodes=nodes)[0]
        each: list[float] = found["losses"]
        return each

    whole = losses(0, nodes)
    np.testing.assert_allclose(losses(zero, False), whole, rtol=0, atol=1e-4)
    assert whole[-1] < whole[0] - 0.5


def test_two_pipeline_stages_agree(ranks: RankPool) -> None:
    """With AdamW at a low rate."""
    kind, lr = "int8-weight", 1e-4
    whole = train(ranks, plan_of(kind, zero=0), lr=lr)
    staged = train(ranks, plan_of(kind, zero=1, dp=1, pp=2, grad_accum=4), lr=lr)
    np.testing.assert_allclose(staged["losses"], whole["losses"], rtol=0, atol=1e-4)
    assert staged["losses"][-1] < staged["losses"][0]


def test_it_begins_when_it_is_told(ranks: RankPool) -> None:
    """Before, the losses are those of plain training; with masks besides, both hold."""
    compress = Compression(qat=Qat(bits=4, start=0.5), pruning=Pruning(pattern="2:4", start=0.5))
    late = train(ranks, r.tiny_plan(steps=STEPS, zero=3, job={"compress": compress}))
    plain = ranks.call("ranks:train", r.tiny_plan(steps=STEPS, zero=3), STEPS)[0]
    assert late["losses"][:3] == plain["losses"][:3]
    assert late["losses"][3] != plain["losses"][3]
    assert [(step, changed.get("quantizes")) for step, changed in late["changes"]][:2] == [
        (0, False),
        (3, True),
    ]
    assert late["report"]["zeros"] == late["report"]["wanted"]


@pytest.mark.parametrize("kind", ["int8", "int4:g32"])
def test_the_rounded_weights_are_not_kept(ranks: RankPool, kind: str) -> None:
    """torchao's own layers keep them from the forward to the backward pass; the growth here is small."""
    found = ranks.call("ranks_compress:saved_bytes", plan_of(kind))[0]
    assert found["ours"] < 1.05 * found["dense"]
    assert found["torchao"] > 1.2 * found["dense"]


def test_recomputed_blocks(ranks: RankPool) -> None:
    plain = train(ranks, plan_of("int8", zero=3))
    again = train(ranks, plan_of("int8", zero=3, activation_checkpointing="full"))
    np.testing.assert_allclose(again["losses"], plain["losses"], rtol=0, atol=1e-5)


def test_what_cannot_be_stored_is_refused(ranks: RankPool) -> None:
    with pytest.raises(UsageError, match="Conv1D"):
        train(ranks, plan_of("int8", "gpt2"))
    with pytest.raises(UsageError, match="tensor-parallel"):
        train(ranks, plan_of("int8", dp=1, tp=2, grad_accum=4))

"""Plans that this runner does not run are refused before memory is taken, with the difference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ranks import tiny_plan, with_strategy

from outlay.profiles.errors import UsageError
from outlay.runner.refuse import refuse


def test_a_plan_that_fits_passes() -> None:
    refuse(tiny_plan(zero=3), 2, "cpu")
    refuse(tiny_plan(dp=1, pp=2, zero=1), 2, "cpu")
    refuse(tiny_plan(precision="bf16"), 2, "cuda")


def test_another_number_of_ranks() -> None:
    with pytest.raises(UsageError, match=r"for 2 ranks \(ZeRO-1 dp2 mb2 ga2\), this run has 3"):
        refuse(tiny_plan(zero=1), 3, "cpu")


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"cp": 2, "dp": 1}, 2, "context parallel"),
        ({"ep": 2}, 2, "expert parallel"),
        ({"vpp": 2}, 2, "virtual pipeline stages"),
        ({"sequence_parallel": True}, 2, "sequence_parallel"),
        ({"activation_checkpointing": "selective"}, 2, "selective"),
        ({"dp": 1, "pp": 2, "zero": 2}, 2, "a pipeline of 2 stages does not go with ZeRO-2"),
    ],
)
def test_strategies(changes: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refuse(with_strategy(tiny_plan(zero=1), **changes), world, "cpu")


@pytest.mark.parametrize(
    ("precision", "accelerator", "message"),
    [
        ("fp16", "cpu", "fp16 does not exist on CPU"),
        ("tf32", "cpu", "tf32 does not exist on CPU"),
        ("fp8", "cuda", "fp8 is estimated only"),
    ],
)
def test_precisions(precision: str, accelerator: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refuse(tiny_plan(precision=precision), 2, accelerator)


def test_flash_attention_on_cpu() -> None:
    with pytest.raises(UsageError, match="flash needs a GPU"):
        refuse(tiny_plan(job={"attention": "flash"}), 2, "cpu")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, the strategy makes it 8"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
        ({"zero_optimization": {"stage": 2}}, "stage is 2, the strategy says ZeRO-1"),
        ({"bf16": {"enabled": True}}, "the job says fp32.*bf16.enabled: true"),
    ],
)
def test_the_two_halves_of_an_edited_plan(edit: dict[str, Any], message: str) -> None:
    plan = tiny_plan(zero=1)
    with pytest.raises(UsageError, match=message):
        refuse(dataclasses.replace(plan, deepspeed={**plan.deepspeed, **edit}), 2, "cpu")

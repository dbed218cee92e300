"""A package or compiler that a plan's methods need is asked for before any rank starts."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import ranks as r

from outlay.planner.spec.job import Finetune, Optimizer
from outlay.profiles.errors import MissingExtra, UsageError
from outlay.runner.needs import check_needs


@pytest.mark.parametrize(
    ("job", "package", "extra"),
    [
        ({"finetune": Finetune()}, "peft", "run"),
        ({"finetune": Finetune(quant="nf4-dq")}, "bitsandbytes", "quantized"),
        ({"optimizer": Optimizer(name="adamw_8bit")}, "bitsandbytes", "quantized"),
    ],
)
def test_packages(
    job: dict[str, Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    plan = r.tiny_plan(job=job)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(MissingExtra, match=package) as caught:
        check_needs(plan)
    assert f"outlay[{extra}]" in caught.value.do
    check_needs(r.tiny_plan())


def test_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="C\\+\\+ compiler no-such-compiler"):
        check_needs(r.tiny_plan(job={"compile": True}))

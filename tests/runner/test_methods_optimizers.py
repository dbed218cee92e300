"""Each optimizer that the runner takes is that optimizer, at every ZeRO stage that it is allowed at."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import ranks as r

from outlay.planner.rules.runner_methods import OPTIMIZERS
from outlay.planner.spec.job import Optimizer
from outlay.profiles.errors import UsageError
from outlay.runner.pool import RankPool
from outlay.runner.refuse import refuse

pytestmark = pytest.mark.ranks
STEPS = 20
HOW: dict[str, Optimizer] = {
    "adam": Optimizer(name="adam", lr=3e-3, weight_decay=0.0),
    "sgd": Optimizer(name="sgd", lr=0.3, weight_decay=0.01),
    "momentum": Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0),
    "rmsprop": Optimizer(name="rmsprop", lr=1e-3, momentum=0.5, weight_decay=0.0),
    "lion": Optimizer(name="lion", lr=1e-3, betas=(0.9, 0.99)),
    "adafactor": Optimizer(name="adafactor", lr=3e-2, weight_decay=0.0),
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("adam", {"zero": 1}),
        ("sgd", {"zero": 2}),
        pytest.param("momentum", {"zero": 0}, marks=pytest.mark.long),
        ("momentum", {"zero": 3}),
        pytest.param("rmsprop", {"zero": 1}, marks=pytest.mark.long),
        ("rmsprop", {"zero": 3}),
        pytest.param("lion", {"zero": 0}, marks=pytest.mark.long),
        ("lion", {"zero": 2}),
        ("lion", {"zero": 1, "dp": 1, "pp": 2, "grad_accum": 4}),
        ("adafactor", {"zero": 0}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}{x}" for k, x in v.items()),
)
def test_two_ranks_are_torch_in_one_process(
    ranks: RankPool, name: str, strategy: dict[str, Any]
) -> None:
    job = {"optimizer": HOW[name]}
    expected = ranks.call("ranks:reference", r.tiny_plan(job=job), STEPS)[0]
    first = ranks.call("ranks:train", r.tiny_plan(job=job, **strategy), STEPS)[0]
    np.testing.assert_allclose(first["losses"], expected["losses"], rtol=0, atol=1e-4)
    assert first["losses"][-1] < first["losses"][0] - 0.3
    for key, weight in expected["weights"].items():
        assert np.linalg.norm(first["weights"][key] - weight) <= 1e-3 * np.linalg.norm(weight), key


def _muon(**strategy: Any) -> Any:
    how = Optimizer(name="muon", lr=0.01, adam_lr=3e-3)
    return r.tiny_plan("gpt2", job={"optimizer": how, "gradient_clipping": 0.0}, **strategy)


def test_muon_is_the_same_at_every_stage(ranks: RankPool) -> None:
    """GPT-2, whose tables DeepSpeed's own rule would take for matrices."""
    whole = ranks.call("ranks:train", _muon(zero=0), STEPS)[0]
    assert whole["losses"][-1] < whole["losses"][0] - 0.5
    for zero in (1, 2, 3):
        found = ranks.call("ranks:train", _muon(zero=zero), STEPS)[0]
        np.testing.assert_allclose(found["losses"], whole["losses"], rtol=0, atol=1e-3)


def test_muon_steps_matrices_of_blocks_and_leaves_the_rest_to_adam(ranks: RankPool) -> None:
    """After one step: of a matrix all singular values moved alike; Adam's weights moved by its rate."""
    start = ranks.call("ranks:train", _muon(zero=1), 0)[0]["weights"]
    after = ranks.call("ranks:train", _muon(zero=1), 1)[0]["weights"]
    name = "transformer.h.1.mlp.c_fc.weight"
    change = after[name] - start[name] * (1 - 0.01 * 0.1)
    values = np.linalg.svd(change, compute_uv=False)
    # a LayerNorm before it leaves the gradient one rank short
    assert values[-2] > 0.003 and values[0] < 0.03
    table = after["transformer.wte.weight"] - start["transformer.wte.weight"] * (1 - 3e-3 * 0.1)
    assert np.abs(table).max() == pytest.approx(3e-3, rel=0.02)


@pytest.mark.parametrize("strategy", [{"zero": 1}, {"zero": 3}])
def test_eight_bit_adam_follows_adam(ranks: RankPool, strategy: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    how = Optimizer(name="adamw_8bit", lr=3e-3)
    found = ranks.call("ranks:train", r.tiny_plan(job={"optimizer": how}, **strategy), STEPS)[0]
    adam = ranks.call("ranks:reference", r.tiny_plan(), STEPS)[0]
    assert max(abs(a - b) for a, b in zip(found["losses"], adam["losses"], strict=True)) < 0.05


def test_eight_bit_states_are_eight_bits(ranks: RankPool) -> None:
    pytest.importorskip("bitsandbytes")
    plan = r.tiny_plan(job={"optimizer": Optimizer(name="adamw_8bit", lr=3e-3)}, zero=1)
    held = ranks.call("ranks:optimizer_bytes", plan)[0]
    # two moments of a byte; scales and tables of values beside them
    assert 2.0 <= held["states"] / held["elements"] < 2.3


def test_every_optimizer_is_tried() -> None:
    tried = {how.name for how in HOW.values()} | {"adamw", "muon", "adamw_8bit"}
    assert tried == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "strategy", "says"),
    [
        ("lamb", {"zero": 1}, "does not train with lamb"),
        ("paged_adamw", {"zero": 1}, "does not train with paged_adamw"),
        ("adafactor", {"zero": 1}, "adafactor with ZeRO-1 would not be Adafactor"),
        ("muon", {"zero": 0, "dp": 1, "pp": 2}, "does not train with muon at tp 1, pp 2"),
        ("muon", {"zero": 1}, "would clip Muon's update: use --gradient-clipping 0"),
    ],
)
def test_what_is_refused(name: str, strategy: dict[str, Any], says: str) -> None:
    plan = r.tiny_plan(**strategy)
    job = dataclasses.replace(plan.job, optimizer=Optimizer(name=name))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=says):
        refuse(dataclasses.replace(plan, job=job), 2, "cpu")

"""Expert parallel on two ranks: the mathematics of one process, saved, resumed, exported, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parallel_plans import cluster

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.planning import make_plan
from outlay.planner.rules import RULES, runner_expert
from outlay.planner.rules.runner_expert import EXPERT_PARALLEL_FAMILIES
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Optimizer
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.fit import check_rules
from outlay.runner.host import build_ops, ops_needed, prepare_environment
from outlay.runner.pool import RankPool
from outlay.runner.refuse import refuse

STEPS = 20
SEEDS = {"mixtral": 10, "balanced": 4, "qwen2_moe": 9, "qwen3_moe": 6}
"""Of which no token's second and third choice come nearer than 6e-6 in 20 steps: with others the order of a
sum decides, for one process in other micro-batches too (docs/guides/parallel.md)."""
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "balanced": ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
    "qwen2_moe": (
        "llama",
        {**_QWEN, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("llama", {**_QWEN, "model_type": "qwen3_moe", "head_dim": 16}),
}
"""By name: the small config that it changes, and how. `balanced` is trained with its router's loss."""

Reference = Callable[[str], dict[str, Any]]


def spread(kind: str = "mixtral", **changes: Any) -> Plan:
    """Two ranks that hold half of the experts each."""
    family, config = FAMILIES[kind]
    job = {"seed": SEEDS[kind], "optimizer": Optimizer(lr=3e-3, eps=1e-6), **changes.pop("job", {})}
    return r.tiny_plan(family, config=config, job=job, **{"ep": 2, "zero": 1, **changes})


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Reference:
    """The curve of one process, made once for each model."""

    @cache
    def run(kind: str) -> dict[str, Any]:
        found: dict[str, Any] = ranks.call("ranks_expert:reference", spread(kind), STEPS)[0]
        return found

    return run


_LONG = pytest.mark.long


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items())


IN_CI: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"zero": 0}),
    ("mixtral", {"zero": 1}),
    ("balanced", {"zero": 2, "activation_checkpointing": "full"}),
    ("qwen2_moe", {"zero": 1}),
    ("qwen3_moe", {"zero": 2}),
]
IN_LONG: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"zero": 1, "loss": "chunked"}),
    ("balanced", {"zero": 0}),
    ("balanced", {"zero": 1, "loss": "fused"}),
    ("qwen2_moe", {"zero": 0}),
    ("qwen3_moe", {"zero": 0}),
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [*IN_CI, *(pytest.param(*case, marks=_LONG) for case in IN_LONG)],
    ids=_name,
)
def test_two_ranks_are_one_process(
    ranks: RankPool, reference: Reference, kind: str, strategy: dict[str, Any]
) -> None:
    first, second = ranks.call("ranks:train", spread(kind, **strategy), STEPS)
    r.compare(first, reference(kind))
    assert second["losses"] == first["losses"]
    assert second["norms"] == first["norms"]
    assert second["weights"] is None
    assert (first["dp_rank"], second["dp_rank"]) == (0, 1)


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2])
def test_offload_to_the_host_goes_with_it(ranks: RankPool, reference: Reference, zero: int) -> None:
    plan = spread(zero=zero, offload_optimizer="cpu")
    environment = prepare_environment(2, 1, "cpu", ranks.extensions_dir)
    build_ops(ops_needed(plan.deepspeed), environment)
    r.compare(ranks.call("ranks:train", plan, STEPS)[0], reference("mixtral"))


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_four_ranks_are_one_process(
    four: RankPool, reference: Reference, ep: int, zero: int
) -> None:
    """Two groups of two, whose members hold the same experts in pairs; and one group of four."""
    plan = spread("balanced", dp=4, ep=ep, zero=zero, micro_batch=2, grad_accum=1)
    found = four.call("ranks:train", plan, STEPS)
    r.compare(found[0], reference("balanced"))
    assert all(rank["losses"] == found[0]["losses"] for rank in found)
    trained = four.call("ranks_expert:held", plan)
    assert [rank["experts"] for rank in trained] == [_experts() // ep] * 4


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [pytest.param(0, marks=_LONG), 1, pytest.param(2, marks=_LONG)])
def test_a_resume_repeats_the_losses_to_the_last_bit(
    ranks: RankPool, tmp_path: Path, zero: int
) -> None:
    plan = spread(zero=zero)
    went_on = ranks.call("ranks_saved:train_save_train", plan, str(tmp_path), 3, 3)
    resumed = ranks.call("ranks_saved:resume_train", plan, went_on[0]["folder"], 3)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in went_on]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen2_moe", marks=_LONG), "qwen3_moe"])
def test_transformers_loads_what_was_trained(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """And the runner: spread weights come back from the export, each rank reading its own."""
    folder, plan = tmp_path / "export", spread(kind)
    trained = ranks.call("ranks_saved:train_and_export", plan, 3, str(folder), None)
    back = ranks.call("ranks_saved:reloaded", str(folder), plan)[0]
    assert back["missing"] == []
    for rank in trained:
        np.testing.assert_array_equal(rank["logits"], back["logits"])
    source = dataclasses.replace(plan.model, weights=str(folder))
    again = ranks.call("ranks_saved:heldout_at_start", dataclasses.replace(plan, model=source))
    assert again == [rank["heldout"] for rank in trained]


@pytest.mark.ranks
def test_a_step_says_how_the_experts_were_used(ranks: RankPool, reference: Reference) -> None:
    plan = spread("balanced", activation_checkpointing="full")
    first, second = ranks.call("ranks_expert:use", plan, 2)
    assert first == second
    whole = ranks.call("ranks_expert:use", spread("balanced", ep=1, zero=3), 2)[0]
    assert [use["tokens"] for use in whole] == [use["tokens"] for use in first]
    pairs = plan.job.tokens_per_step * plan.model.config["num_hidden_layers"] * 2
    for use, expected in zip(first, reference("balanced")["balance"], strict=False):
        assert sum(use["tokens"]) == pairs
        assert use["router_loss"] == pytest.approx(expected, rel=1e-5)
        assert 1.0 < use["expert_imbalance"] < 4.0
        assert use["expert_tokens_most"] == max(use["tokens"])


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 2])
def test_a_rank_whose_experts_are_given_nothing_waits_for_nobody(
    ranks: RankPool, zero: int
) -> None:
    """All tokens go to the first rank's experts."""
    spread_out, whole = (
        ranks.call("ranks_expert:starved", spread(ep=ep, zero=zero), 3) for ep in (2, 1)
    )
    for rank in spread_out:
        assert rank["losses"] == pytest.approx(whole[0]["losses"], abs=1e-5)
        assert rank["idle"] == whole[0]["idle"] == 2 * 3


def _experts() -> int:
    """Weights of all routed experts."""
    spec = spec_from_config(spread().model.config, name="mixtral", source="test")
    blocks = zip(spec.blocks, parameter_counts(spec).blocks, strict=True)
    return sum(group.count * one.experts for group, one in blocks)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1])
def test_a_rank_holds_what_the_plan_says(ranks: RankPool, zero: int) -> None:
    plan = spread(zero=zero)
    spec = spec_from_config(plan.model.config, name="mixtral", source="test")
    asked = {"ep": 2, "zero": zero, "micro_batch": 1}
    made = make_plan(spec, plan.model.config, plan.job, cluster(2), fixed=asked)
    predicted = made.estimate["memory"]["parts"]
    for rank in ranks.call("ranks_expert:held", plan):
        assert 4 * (rank["experts"] + rank["others"]) == predicted["parameters"]
        states = rank["moments"] + (rank["masters"] if zero else 0)
        assert 4 * states == pytest.approx(predicted["optimizer_states"], rel=1e-3)
        assert rank["experts"] == _experts() // 2


@pytest.mark.ranks
def test_its_memory_is_probed(ranks: RankPool) -> None:
    """The probe warms up with a model of its own, which must have experts to spread, too."""
    for reading in ranks.call("outlay.runner.memory_probe:reading_in_rank", spread(), 1):
        assert reading.kind == "host_growth"
        assert reading.growth_bytes >= 0


@pytest.mark.ranks
def test_plan_recommends_it_and_it_starts(ranks: RankPool) -> None:
    plan = spread()
    spec = spec_from_config(plan.model.config, name="mixtral", source="test")
    for precision in ("fp32", "bf16"):
        job = dataclasses.replace(plan.job, precision=precision, steps=3)
        made = make_plan(spec, plan.model.config, job, cluster(2))
        assert made.strategy.ep == 2, made.strategy.label()
        check_rules(made)
        losses = ranks.call("ranks_parallel:three_steps", made)
        assert losses[0] == losses[1]
        assert np.isfinite(losses).all()


@pytest.mark.ranks
def test_closed_engines_leave_nothing(ranks: RankPool) -> None:
    plans = [spread(zero=zero) for zero in (0, 1)]
    for rank in ranks.call("ranks:left_behind", plans):
        assert rank == [{"large_tensors": 0, "groups": 1, "own_linear": 0}] * len(plans)


@pytest.mark.ranks
def test_a_capacity_drops_and_says_how_much(ranks: RankPool) -> None:
    """A large one changes nothing; of a small one every expert takes what it may, and no more."""
    plain, roomy = (
        ranks.call("ranks_expert:use", spread(job={"expert_capacity": factor}), 2)
        for factor in (None, 2.0)
    )
    assert roomy == plain
    assert plain[0][0]["tokens_dropped"] == 0
    plan = spread(job={"expert_capacity": 0.5}, activation_checkpointing="full")
    for use in ranks.call("ranks_expert:use", plan, 2)[0]:
        # each expert takes half of an even share at most
        assert use["tokens_dropped"] >= sum(use["tokens"]) / 2


@settings(max_examples=30, deadline=None)
@given(
    chosen=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    limit=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_of_each_expert_the_pairs_with_the_most_weight_are_kept(
    chosen: list[int], limit: int, seed: int
) -> None:
    import torch

    from outlay.runner.parallel.expert import within_capacity

    weights = torch.rand(len(chosen), generator=torch.Generator().manual_seed(seed))
    kept = within_capacity(torch.tensor(chosen), weights, limit).tolist()
    assert [chosen[i] for i in kept] == sorted(chosen[i] for i in kept)
    for expert in range(4):
        given_to = [i for i, e in enumerate(chosen) if e == expert]
        best = sorted(given_to, key=lambda i: -float(weights[i]))[:limit]
        assert sorted(i for i in kept if chosen[i] == expert) == sorted(best)


def test_large_experts_make_no_empty_group() -> None:
    """DeepSpeed's own division makes one before an expert weight of more than 178,956,971 elements."""
    import torch
    from torch import nn

    from outlay.runner.parallel.expert import _groups_of

    model = nn.Module()
    model.router = nn.Parameter(torch.empty(8, 8, device="meta"))
    model.experts = nn.Parameter(torch.empty(2, 10_000, 10_000, device="meta"))
    vars(model.experts).update(allreduce=False, group_name="ep_size_2")
    shared, experts = _groups_of(model, "ep_size_2")
    assert (shared["params"], experts["params"]) == ([model.router], [model.experts])
    assert experts["moe"]


def test_the_runner_refuses_by_each_rule_of_the_planner() -> None:
    here = {rule.name for rule in RULES if rule.forbids.__module__ == runner_expert.__name__}
    assert here == set(runner_expert.EXPERT_RULES)


def test_every_family_that_a_plan_may_have_is_trained() -> None:
    trained = {spread(kind).model.config["model_type"] for kind, _ in IN_CI}
    assert trained == set(EXPERT_PARALLEL_FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": 3}, "does not execute ep 2 at ZeRO-3: use --zero 2"),
        ({"dp": 2, "pp": 2}, "does not combine expert parallel .ep 2. with pp 2"),
        ({"zero": 0, "precision": "bf16"}, "ep 2 in bf16 at ZeRO-0 is not run: use --zero 1"),
        ({"kind": "balanced", "ep": 1, "loss": "chunked"}, "asks for its router's load-balance"),
        ({"ep": 1, "job": {"expert_capacity": 1.5}}, "drops tokens of spread experts, and ep is 1"),
        ({"kind": "balanced", "ep": 1, "dp": 1, "pp": 2}, "asks for its router's load-balance"),
    ],
    ids=_name,
)
def test_what_is_not_run_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = spread(**changes)
    with pytest.raises(UsageError, match=message):
        refuse(plan, plan.strategy.world, "cpu")


def test_a_dense_model_has_nothing_to_spread() -> None:
    plan = r.tiny_plan("llama", ep=2, zero=1)
    with pytest.raises(UsageError, match="does not train llama expert parallel"):
        refuse(plan, 2, "cpu")

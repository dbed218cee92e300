"""What `plan` recommends starts: plans over models, precisions and asked strategies take three steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import ranks as r

from outlay.planner.planning import make_plan
from outlay.planner.spec.cluster import Cluster, Rates
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible
from outlay.runner.fit import check_rules
from outlay.runner.pool import RankPool

MODELS = ("llama", "gpt2", "qwen3", "mistral", "gpt_neox", "qwen2")
ASKED: tuple[dict[str, int], ...] = (
    {},
    {"zero": 3},
    {"tp": 2},
    {"sp": 2},
    {"pp": 2},
    {"tp": 2, "zero": 2},
    {"sp": 2, "zero": 3},
    {"zero": 2, "micro_batch": 1},
)
"""What a person fixes; the search chooses the rest."""
PRECISIONS = ("fp32", "bf16")


def cluster(ranks: int) -> Cluster:
    found = r.cpu_cluster(ranks)
    rates = Rates(
        ranks=ranks, threads_per_rank=1, gemm_flops={"fp32": 50e9, "bf16": 5e9},
        memory_bytes_per_s=10e9, all_reduce=((4096, 1e-4), (2**20, 1e-3), (2**26, 6e-2)),
        measured_at="2026-01-01T00:00:00+00:00", source="test",
    )  # fmt: skip
    return dataclasses.replace(found, rates=rates, usable_bytes=2**33, price_usd_per_h=1.0)


def planned(family: str, asked: dict[str, int], precision: str, ranks: int) -> Plan | None:
    """Null where nothing fits or closes, as the planner says."""
    config = {**r.CONFIGS[family], **({"sliding_window": None} if family == "mistral" else {})}
    spec = spec_from_config(config, name=family, source="test")
    job = Job(
        model=family, seq_len=r.SEQ_LEN, global_batch=r.GLOBAL_BATCH, steps=3, precision=precision,
        optimizer=Optimizer(lr=1e-3), seed=3,
    )  # fmt: skip
    try:
        return make_plan(spec, config, job, cluster(ranks), fixed=asked)
    except NotFeasible:
        return None


def grid(ranks: int, cases: int) -> list[Plan]:
    """So many plans of the grid, evenly spread over it; no two the same."""
    every = list(itertools.product(MODELS, ASKED, PRECISIONS))
    # A stride that shares no factor with the grid visits all of it in a mixed order.
    stride = next(s for s in range(37, 200) if math.gcd(s, len(every)) == 1)
    found: dict[tuple[Any, ...], Plan] = {}
    for i in range(len(every)):
        family, asked, precision = every[i * stride % len(every)]
        plan = planned(family, asked, precision, ranks)
        if plan is not None:
            found.setdefault((family, precision, plan.strategy), plan)
        if len(found) == cases:
            break
    return list(found.values())


def start(pool: RankPool, plans: list[Plan]) -> None:
    for plan in plans:
        check_rules(plan)
        seen = pool.call("ranks_parallel:three_steps", plan)
        for losses in seen:
            assert all(math.isfinite(loss) for loss in losses), plan.strategy.label()
            assert losses == seen[0], plan.strategy.label()


@pytest.mark.ranks
def test_twelve_plans_for_two_ranks_start(ranks: RankPool) -> None:
    plans = grid(2, 12)
    assert len(plans) == 12
    axes = [(s.tp, s.sp, s.pp, s.zero) for s in (plan.strategy for plan in plans)]
    assert {1, 2} == {tp for tp, *_ in axes} == {sp for _, sp, *_ in axes}
    start(ranks, plans)


@pytest.fixture
def four() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.long
@pytest.mark.processes
def test_sixty_plans_for_two_and_four_ranks_start(ranks: RankPool, four: RankPool) -> None:
    for pool, number in ((ranks, 30), (four, 30)):
        plans = grid(pool.n, number)
        assert len(plans) == number
        start(pool, plans)

"""Step time: what must hold whatever the figures are, and that the three ways to compute it agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.estimate.buckets import reduce_buckets
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.efficiency import efficiency_for
from outlay.planner.estimate.operators import Speed, speed_of
from outlay.planner.estimate.software import (
    CPU_DEEPSPEED,
    DEEPSPEED,
    FSDP_COMPILED,
    MEGATRON,
    MEGATRON_CORE,
    ZERO_BUBBLE,
    Software,
)
from outlay.planner.estimate.step import PARTS, Step, estimate_step
from outlay.planner.hardware import resolve_hardware
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec
from outlay.planner.spec.strategy import Strategy

NEARLY = 1 + 1e-12
"""Sums in another order differ in the last digits."""
SOFTWARE = (DEEPSPEED, MEGATRON, MEGATRON_CORE, FSDP_COMPILED, ZERO_BUBBLE)


def model(layers: int = 16, hidden: int = 2048, experts: int = 0) -> ModelSpec:
    attention = Attention(heads=hidden // 128, kv_heads=hidden // 256, head_dim=128)
    mlp = Mlp(ffn=hidden * 3, gated=True, experts=experts, top_k=2 if experts else 0)
    return ModelSpec(
        name="m", source="test", family="llama", hidden=hidden, vocab=32000,
        blocks=(Block(count=layers, attention=attention, mlp=mlp),),
        positions="rotary", max_positions=4096,
    )  # fmt: skip


def job(**changes: Any) -> Job:
    base: dict[str, Any] = {
        "model": "m",
        "seq_len": 2048,
        "global_batch": 64,
        "steps": 1,
        "precision": "bf16",
    }
    return Job(**(base | changes))


def cluster(gpus: int = 64, gbps: float = 1600, name: str = "a100-sxm-80gb") -> Cluster:
    return resolve_hardware(
        f"{name}:{gpus}/8" if gpus > 8 else f"{name}:{gpus}", inter_node_gbps=gbps
    )


def step(
    strategies: list[Strategy], *, spec: ModelSpec | None = None, of: Job | None = None,
    on: Cluster | None = None, software: Software = DEEPSPEED, tabled: bool = True,
) -> Step:  # fmt: skip
    spec, of, on = spec or model(), of or job(), on or cluster()
    c = Candidates.of(strategies)
    figures = efficiency_for(on.accelerator)
    speed = speed_of(on, of.precision, figures)
    assert speed is not None
    return estimate_step(
        spec,
        of,
        c,
        on,
        speed,
        bucket=reduce_buckets(spec, c),
        figures=figures,
        software=software,
        tabled=tabled,
    )


strategies = st.builds(
    Strategy,
    zero=st.integers(0, 3), dp=st.sampled_from([1, 2, 8, 16]), tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 4, 8]), vpp=st.just(1), cp=st.sampled_from([1, 2]), sp=st.sampled_from([1, 2]),
    micro_batch=st.integers(1, 8), grad_accum=st.integers(1, 16),
    activation_checkpointing=st.sampled_from(["none", "selective", "full"]),
    offload_optimizer=st.sampled_from(["none", "cpu"]), overlap_comm=st.booleans(),
)  # fmt: skip
software = st.sampled_from(SOFTWARE)


@given(st.lists(strategies, min_size=1, max_size=20), software)
@settings(deadline=None, max_examples=40)
def test_parts_sum_to_the_time_and_none_is_negative(many: list[Strategy], s: Software) -> None:
    found = step(many, software=s)
    assert set(found.parts) == set(PARTS)
    assert np.sum(list(found.parts.values()), axis=0) == pytest.approx(found.time_s)
    assert all((part >= -1e-12).all() for part in found.parts.values())
    assert (found.time_s > 0).all()


@given(st.lists(strategies, min_size=1, max_size=20), software)
@settings(deadline=None, max_examples=25)
def test_tables_give_what_each_candidate_alone_gives(many: list[Strategy], s: Software) -> None:
    together = step(many, software=s).time_s
    assert step(many, software=s, tabled=False).time_s == pytest.approx(together)
    assert np.concatenate([step([one], software=s).time_s for one in many]) == pytest.approx(
        together
    )


@given(strategies, software)
@settings(deadline=None, max_examples=60)
def test_full_recomputation_is_never_faster(one: Strategy, s: Software) -> None:
    words = ("none", "selective", "full")
    none, selective, full = step(
        [dataclasses.replace(one, activation_checkpointing=w) for w in words],
        software=s,  # type: ignore[arg-type]
    ).time_s
    assert none <= selective * NEARLY
    assert selective <= full * NEARLY


@given(strategies, software, st.sampled_from(["intra", "inter"]), st.floats(1.0, 20.0))
@settings(deadline=None, max_examples=60)
def test_more_bandwidth_is_never_slower(
    one: Strategy, s: Software, link: str, factor: float
) -> None:
    slow = cluster()
    wider = dataclasses.replace(
        getattr(slow, link), bytes_per_s=getattr(slow, link).bytes_per_s * factor
    )
    fast = dataclasses.replace(slow, **{link: wider})
    before, after = step([one], on=slow, software=s).time_s, step([one], on=fast, software=s).time_s
    assert after <= before * NEARLY


@given(strategies, software, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_time_grows_with_the_batch(one: Strategy, s: Software, more: int) -> None:
    larger = [
        one,
        dataclasses.replace(one, micro_batch=one.micro_batch + more),
        dataclasses.replace(one, grad_accum=one.grad_accum + more),
    ]
    base, wider, longer = step(larger, software=s).time_s
    assert wider * NEARLY >= base
    assert longer * NEARLY >= base


@given(strategies, software, st.integers(1, 32))
@settings(deadline=None, max_examples=40)
def test_time_grows_with_the_depth(one: Strategy, s: Software, more: int) -> None:
    shallow, deep = model(layers=16), model(layers=16 + more)
    before = step([one], spec=shallow, software=s).time_s
    assert step([one], spec=deep, software=s).time_s * NEARLY >= before


def test_stage_two_reduces_at_every_micro_batch_and_stage_one_once() -> None:
    one, two = (
        step([Strategy(zero=zero, dp=64, grad_accum=n) for n in (1, 8)]).parts[
            "data_parallel_exposed"
        ]
        for zero in (1, 2)
    )
    assert one[1] == pytest.approx(one[0], rel=1e-6)
    assert two[1] > 4 * two[0]


def test_offloading_costs_the_host_link_and_the_host_optimizer() -> None:
    plain, away = step(
        [Strategy(zero=2, dp=8), Strategy(zero=2, dp=8, offload_optimizer="cpu")], on=cluster(8)
    ).time_s
    assert away > plain


def test_low_precision_is_faster_where_the_hardware_has_it_and_unknown_where_not() -> None:
    hopper = cluster(8, name="h100-sxm")
    slow, fast = (
        step(
            [Strategy(dp=8, micro_batch=4)], spec=model(hidden=8192), of=job(precision=p), on=hopper
        ).time_s[0]
        for p in ("bf16", "fp8")
    )
    assert fast < slow
    ampere = cluster(8)
    assert speed_of(ampere, "fp8", efficiency_for(ampere.accelerator)) is None


def test_experts_on_other_ranks_cost_an_all_to_all_and_less_between_fewer_nodes() -> None:
    spec = model(experts=16)
    here, near, far = step(
        [Strategy(dp=64, ep=ep, micro_batch=2) for ep in (1, 8, 16)], spec=spec
    ).parts["expert_parallel"]
    assert here == 0 < near < far


def test_on_a_cpu_starting_operators_adds_to_running_them(cpu_cluster: Cluster) -> None:
    fp32 = job(precision="fp32", seq_len=64)
    figures = dict(efficiency_for(cpu_cluster.accelerator))
    c = Candidates.of([Strategy(dp=2)])
    times = []
    for start in (0.0, 1e-3):
        figures["compute.operator_start_s"] = start
        speed = speed_of(cpu_cluster, "fp32", figures)
        assert isinstance(speed, Speed)
        assert speed.measured
        times.append(
            estimate_step(
                model(layers=2, hidden=256), fp32, c, cpu_cluster, speed,
                bucket=reduce_buckets(model(), c), figures=figures, software=CPU_DEEPSPEED,
            ).time_s[0]
        )  # fmt: skip
    forward = 2 * CPU_DEEPSPEED.block_operators * 1e-3
    back = figures["compute.backward_start_factor"]
    late = 1 + figures["communication.straggler_per_doubling"]
    assert times[1] - times[0] == pytest.approx(forward * (1 + back) * late)

"""Properties of the memory estimate that hold for any strategy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.estimate.buckets import reduce_buckets
from outlay.planner.estimate.candidates import CHECKPOINTING, Array, Candidates
from outlay.planner.estimate.efficiency import efficiency_for
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.memory import PARTS, Memory, estimate_memory
from outlay.planner.estimate.phases import WholeRun
from outlay.planner.estimate.software import (
    CPU_DEEPSPEED,
    DDP,
    DEEPSPEED,
    FSDP,
    FSDP_COMPILED,
    MEGATRON,
    MEGATRON_DEEPSPEED,
    SINGLE,
    Software,
)
from outlay.planner.estimate.stages import stage_loads
from outlay.planner.estimate.states import Held, States, state_bytes
from outlay.planner.hardware import resolve_hardware
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.loader import accelerator

SOFTWARE = (
    DEEPSPEED,
    CPU_DEEPSPEED,
    MEGATRON,
    MEGATRON_DEEPSPEED,
    FSDP,
    FSDP_COMPILED,
    DDP,
    SINGLE,
)
FIGURES = efficiency_for(accelerator("a100-sxm-80gb"))
powers = st.sampled_from([1, 2, 4, 8])


def _spec(layers: int, heads: int, *, gated: bool, experts: int = 0) -> ModelSpec:
    attention = Attention(
        heads=heads, kv_heads=max(1, heads // 2), head_dim=64, dropout=0.0 if gated else 0.1
    )
    mlp = Mlp(ffn=256 * heads, gated=gated, experts=experts, top_k=min(2, experts))
    return ModelSpec(
        name="any", source="test", family="llama" if gated else "gpt", hidden=64 * heads, vocab=5000,
        blocks=(Block(count=layers, attention=attention, mlp=mlp),),
        positions="rotary" if gated else "learned", max_positions=4096,
        norm="rmsnorm" if gated else "layernorm", residual_dropout=0.0 if gated else 0.1,
    )  # fmt: skip


specs = st.builds(_spec, st.integers(8, 40), st.sampled_from([4, 8, 16]), gated=st.booleans(),
                  experts=st.sampled_from([0, 8]))  # fmt: skip


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    """A strategy with at most one kind of model parallelism that ZeRO forbids beside it."""
    pp = draw(powers)
    zero = draw(st.integers(0, 3)) if pp == 1 else draw(st.integers(0, 1))
    return Strategy(
        zero=zero, dp=draw(powers), tp=draw(st.sampled_from([1, 2, 4])), pp=pp,
        vpp=draw(st.sampled_from([1, 2])), ep=1, micro_batch=draw(st.integers(1, 8)),
        grad_accum=draw(st.integers(1, 64)),
        activation_checkpointing=draw(st.sampled_from(CHECKPOINTING)),  # type: ignore[arg-type]
        sequence_parallel=draw(st.booleans()), loss=draw(st.sampled_from(["plain", "fused", "chunked"])),  # type: ignore[arg-type]
    )  # fmt: skip


def _job(attention: str = "flash", precision: str = "bf16", seq_len: int = 512) -> Job:
    return Job(
        model="any",
        seq_len=seq_len,
        global_batch=1,
        steps=1,
        precision=precision,
        attention=attention,
    )  # type: ignore[arg-type]


def _memory(
    spec: ModelSpec, software: Software, *several: Strategy, run: WholeRun | None = None, **job: object
) -> Memory:  # fmt: skip
    c = Candidates.of(several)
    return estimate_memory(
        spec,
        _job(**job),
        c,
        bucket=reduce_buckets(spec, c),
        figures=FIGURES,
        software=software,
        run=run,
    )


runs = st.sampled_from([None, WholeRun(on_host=False), WholeRun(on_host=True)])


@settings(max_examples=1500, deadline=None)
@given(specs, strategies(), st.sampled_from(SOFTWARE), st.sampled_from(["eager", "flash"]),
       st.sampled_from(["fp32", "bf16", "fp16"]), runs)  # fmt: skip
def test_parts_sum_and_are_finite(
    spec: ModelSpec, strategy: Strategy, software: Software, attention: str, precision: str,
    run: WholeRun | None,
) -> None:  # fmt: skip
    m = _memory(spec, software, strategy, attention=attention, precision=precision, run=run)
    assert (m.each_phase >= m.by_phase - 1).all()
    assert (m.each_phase >= 0).all()
    assert set(m.parts) == set(PARTS)
    total = sum(float(v[0]) for v in m.parts.values())
    assert total == pytest.approx(float(m.device[0]), rel=1e-9)
    for values in (*m.parts.values(), m.device, m.allocated, m.least):
        assert np.isfinite(values).all()
        assert (values >= 0).all()
    assert m.allocated[0] <= m.least[0] <= m.device[0]
    assert float(m.by_phase[:, 0].max()) == pytest.approx(float(m.device[0]))


@settings(max_examples=600, deadline=None)
@given(specs, strategies(), st.sampled_from(SOFTWARE), st.sampled_from(["eager", "flash"]))
def test_more_checkpointing_never_needs_more(
    spec: ModelSpec, strategy: Strategy, software: Software, attention: str
) -> None:
    several = [dataclasses.replace(strategy, activation_checkpointing=w) for w in CHECKPOINTING]  # type: ignore[arg-type]
    m = _memory(spec, software, *several, attention=attention)
    assert m.allocated[0] * (1 + 1e-9) >= m.allocated[1]
    assert m.allocated[1] * (1 + 1e-9) >= m.allocated[2]


@settings(max_examples=600, deadline=None)
@given(specs, strategies(), st.sampled_from(SOFTWARE))
def test_linear_in_micro_batch(spec: ModelSpec, strategy: Strategy, software: Software) -> None:
    """In every phase each sequence more costs the same; the peak, their maximum, only bends upwards."""
    several = [dataclasses.replace(strategy, micro_batch=n) for n in (1, 2, 3, 256, 512, 768)]
    m = _memory(spec, software, *several)
    for i in (0, 3):
        a, b, c = m.allocated[i : i + 3]
        assert a <= b <= c
        assert c - b >= (b - a) * (1 - 1e-6)
        if len(set(m.peak_position[i : i + 3])) == 1:
            a, b, c = m.by_phase[:, i], m.by_phase[:, i + 1], m.by_phase[:, i + 2]
            assert b - a == pytest.approx(c - b, rel=1e-6, abs=16)


def _zero3(spec: ModelSpec, software: Software, ranks: list[int]) -> States:
    c = Candidates.of([Strategy(zero=3, dp=n) for n in ranks])
    loads = stage_loads(spec, 512, c.pp)
    ones: Array = np.ones(len(c))
    held = Held(dense=loads.dense_parameters, experts=loads.expert_parameters, block=1e6 * ones,
                root=0 * loads.dense_parameters, largest_tensor=1e6)  # fmt: skip
    return state_bytes(
        held, c, software=software, precision="bf16", optimizer="adamw", bucket=1e6 * ones
    )


@settings(max_examples=600, deadline=None)
@given(specs, st.sampled_from([DEEPSPEED, FSDP, FSDP_COMPILED, MEGATRON]))
def test_zero3_states_never_grow_with_ranks(spec: ModelSpec, software: Software) -> None:
    s = _zero3(spec, software, [1, 2, 3, 5, 8, 64, 1000, 100_000])
    for values in (s.parameters, s.optimizer_states, s.gradients_held):
        assert (np.diff(values[0]) <= 0).all()


@st.composite
def mixtures(draw: st.DrawFn) -> Candidates:
    """60 candidates, more than are computed one by one, each like the first but for one or two fields."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    few = {"zero": 4, "activation_checkpointing": 3, "sequence_parallel": 2, "offload_optimizer": 3,
           "offload_param": 3, "loss": 3, "overlap_comm": 2}  # fmt: skip
    columns = {name: rng.integers(0, size, 60) for name, size in few.items()}
    for name in ("dp", "tp", "pp", "vpp", "cp", "sp", "ep"):
        columns[name] = rng.choice([1, 2, 4], 60)
    columns["micro_batch"] = rng.integers(1, 5, 60)
    columns["grad_accum"] = rng.choice([1, 2, 3, 8, 64], 60)
    columns["recompute_layers"] = rng.choice([-1, 2], 60)
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        columns[name] = rng.choice([-1, 10_000_000], 60)
    several = rng.choice(list(columns), (60, 2))
    return Candidates(**{
        name: np.where((several == name).any(axis=1), values, values[0])
        for name, values in columns.items()
    })  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(specs, mixtures(), st.sampled_from(SOFTWARE), st.booleans())
def test_tables_give_what_one_by_one_gives(
    spec: ModelSpec, c: Candidates, software: Software, whole_run: bool
) -> None:
    """What the tables of memory and time are keyed by is all that they depend on."""
    cluster = resolve_hardware("h100-sxm:64/8", inter_node_gbps=400)
    both = evaluate(spec, _job(), cluster, c, software=software, own=False)
    run = WholeRun(on_host=False) if whole_run else None
    together = estimate_memory(
        spec, _job(), c, bucket=reduce_buckets(spec, c), figures=FIGURES, software=software, run=run
    )
    for start in range(0, len(c), 6):
        piece = slice(start, start + 6)
        few = c.take(piece)
        alone = estimate_memory(
            spec, _job(), few, bucket=reduce_buckets(spec, few), figures=FIGURES, software=software,
            run=run,
        )  # fmt: skip
        assert alone.device == pytest.approx(together.device[piece], rel=1e-12)
        assert alone.each_phase == pytest.approx(together.each_phase[:, piece], rel=1e-12)
        timed = evaluate(spec, _job(), cluster, few, software=software, own=False)
        assert timed.step is not None
        assert both.step is not None
        assert timed.step.time_s == pytest.approx(both.step.time_s[piece], rel=1e-12)


def test_many_candidates_at_once_are_each_one_alone() -> None:
    spec = _spec(24, 8, gated=True)
    grid = Candidates.grid(zero=[0, 1, 2, 3], dp=[1, 4, 16], tp=[1, 2], micro_batch=[1, 4],
                           activation_checkpointing=[0, 1, 2])  # fmt: skip
    bucket = reduce_buckets(spec, grid)
    whole = estimate_memory(spec, _job(), grid, bucket=bucket, figures=FIGURES, software=DEEPSPEED)
    for i in range(0, len(grid), 17):
        one = _memory(spec, DEEPSPEED, grid.strategy(i))
        assert float(one.device[0]) == float(whole.device[i])

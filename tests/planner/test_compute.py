"""FLOPs against published formulas, and the seconds of single kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.compute import (
    block_gemms,
    forward_flops_per_token,
    keys_per_token,
    model_flops_per_token,
)
from outlay.planner.estimate.efficiency import efficiency_for
from outlay.planner.estimate.operators import (
    UNFUSED_SOFTMAX_OPERATORS,
    Speed,
    attention_s,
    block_s,
    fused_softmax_fits,
    gemm_s,
    speed_of,
)
from outlay.planner.estimate.parameters import attention_parameters
from outlay.planner.estimate.software import MEGATRON
from outlay.planner.hardware import resolve_hardware
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec
from outlay.planner.spec.strategy import Strategy

A100 = resolve_hardware("a100-sxm-80gb:8")
FIGURES = efficiency_for(A100.accelerator)


def gpt(layers: int, hidden: int, heads: int, vocab: int) -> ModelSpec:
    width = hidden // heads
    block = Block(
        count=layers,
        attention=Attention(heads=heads, kv_heads=heads, head_dim=width),
        mlp=Mlp(ffn=4 * hidden, gated=False, activation="gelu"),
    )
    return ModelSpec(
        name="gpt", source="test", family="gpt", hidden=hidden, vocab=vocab, blocks=(block,),
        positions="learned", max_positions=2048,
    )  # fmt: skip


def speed() -> Speed:
    found = speed_of(A100, "bf16", FIGURES)
    assert found is not None
    return found


def test_model_flops_are_those_of_the_megatron_paper() -> None:
    """72·B·s·l·h²·(1 + s/6h + V/12lh) without recomputation: arXiv 2104.04473, equation 3 less its
    recomputed forward pass; attention over the full square."""
    layers, hidden, s, vocab = 96, 12288, 2048, 51200
    spec = gpt(layers, hidden, 96, vocab)
    expected = 72 * layers * hidden**2 * (1 + s / (6 * hidden) + vocab / (12 * layers * hidden))
    assert 3 * forward_flops_per_token(spec, s, causal=False) == pytest.approx(expected)
    assert model_flops_per_token(spec, s) < expected


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 400)))
def test_keys_are_counted_one_by_one(seq_len: int, window: int | None) -> None:
    reach = window or seq_len
    mean = sum(min(i + 1, reach) for i in range(seq_len)) / seq_len
    assert keys_per_token(seq_len, window, causal=True) == pytest.approx(mean)


def test_latent_attention_multiplies_what_it_stores() -> None:
    latent = Attention(
        heads=128,
        kv_heads=128,
        head_dim=192,
        value_head_dim=128,
        q_rank=1536,
        kv_rank=512,
        rope_head_dim=64,
    )
    spec = dataclasses.replace(
        gpt(1, 7168, 56, 1000),
        blocks=(Block(count=1, attention=latent, mlp=Mlp(ffn=1, gated=False)),),
    )
    products = [g for g in block_gemms(spec, spec.blocks[0]) if g.name not in ("up", "down")]
    assert sum(g.k * g.n for g in products) == attention_parameters(latent, 7168)


@given(st.integers(1, 20000), st.integers(64, 20000), st.integers(64, 20000))
@settings(deadline=None)
def test_a_product_never_beats_arithmetic_or_memory_and_grows_with_its_sides(
    m: int, k: int, n: int
) -> None:
    def seconds(a: int, b: int, c: int) -> float:
        return float(
            gemm_s(np.array(float(a)), np.array(float(b)), np.array(float(c)), speed(), 2, FIGURES)
        )

    found = seconds(m, k, n)
    assert found >= 2 * m * k * n / speed().gemm_flops
    assert found >= 2 * (m * k + k * n + m * n) / speed().memory_bytes_per_s
    assert max(seconds(m, k, n), 0) <= min(
        seconds(m + 128, k, n), seconds(m, k + 8, n), seconds(m, k, n + 128)
    )


def test_a_large_product_reaches_the_sustained_rate() -> None:
    size = np.array(16384.0)
    assert 2 * 16384**3 / gemm_s(size, size, size, speed(), 2, FIGURES) == pytest.approx(
        speed().gemm_flops, rel=0.05
    )


def _attention(kind: str, heads: int, seq_len: int) -> float:
    spec = gpt(1, 4096, heads, 1000)
    job = Job(model="m", seq_len=seq_len, global_batch=1, steps=1, precision="bf16", attention=kind)  # type: ignore[arg-type]
    c = Candidates.of([Strategy()])
    forward, backward = attention_s(
        spec.blocks[0], job, c, c.micro_batch * float(seq_len), speed(), FIGURES, MEGATRON
    )
    return float(forward[0] + backward[0])


def test_unfused_attention_is_slower_and_rows_that_are_not_aligned_more_so() -> None:
    assert _attention("eager", 32, 4096) > 2 * _attention("flash", 32, 4096)
    odd = gpt(1, 4096, 32, 1000).blocks[0]
    odd = dataclasses.replace(odd, attention=dataclasses.replace(odd.attention, head_dim=124))
    job = Job(model="m", seq_len=2048, global_batch=1, steps=1, precision="bf16", attention="eager")
    c = Candidates.of([Strategy()])
    aligned = dataclasses.replace(odd, attention=dataclasses.replace(odd.attention, head_dim=128))
    slow, fast = (
        attention_s(b, job, c, c.micro_batch * 2048.0, speed(), FIGURES, MEGATRON)[0][0]
        for b in (odd, aligned)
    )
    assert slow > fast


def test_megatrons_fused_softmax_takes_four_rows_at_a_time() -> None:
    """fused_softmax.py, `is_kernel_available`: else its kernels run one by one."""
    spec = gpt(1, 2048, 16, 1000)
    block = spec.blocks[0]
    job = Job(model="m", seq_len=1024, global_batch=1, steps=1, precision="fp16", attention="eager")
    c = Candidates.of([Strategy(tp=tp, micro_batch=m) for tp in (4, 8) for m in (1, 2)])
    assert fused_softmax_fits(block, job, c).tolist() == [True, True, False, True]
    for change in ({"seq_len": 16}, {"seq_len": 8192}, {"seq_len": 1022}, {"precision": "fp32"}):
        assert not fused_softmax_fits(block, dataclasses.replace(job, **change), c).any()  # type: ignore[arg-type]
    found = block_s(spec, block, job, c, speed(), FIGURES, MEGATRON)
    starts = FIGURES["compute.operator_start_s"] * UNFUSED_SOFTMAX_OPERATORS
    assert found.host_forward - found.host_forward[0] == pytest.approx([0, 0, starts, 0], abs=1e-12)
    # tp 8: with one sequence more than half of the time of two, which run fused.
    assert found.core[2] > 0.6 * found.core[3]


def test_a_precision_that_the_datasheet_lacks_has_no_speed() -> None:
    assert speed_of(A100, "nvfp4", FIGURES) is None
    assert speed_of(A100, "fp32", FIGURES) is not None

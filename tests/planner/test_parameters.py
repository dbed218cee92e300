"""Counting weights: published totals, and that the parts make the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.estimate.parameters import (
    attention_parameters,
    largest_matrix,
    mlp_parameters,
    parameter_counts,
)
from outlay.planner.spec.families import preset_names, resolve_model
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec

PUBLISHED = {
    # Totals as the authors or the checkpoints state them.
    "gpt-neox-20b": (20_554_567_680, "arXiv:2204.06745"),
    "bloom-7b1": (7_069_016_064, "BLOOM-7b1 model card"),
    "bloom-176b": (176_247_271_424, "BLOOM model card"),
    "qwen3-30b-a3b": (30_532_122_624, "checkpoint index"),
    "gpt-oss-120b": (116_829_156_672, "gpt-oss model card, 116.83B"),
}
ACTIVE = {
    # What one token visits, in billions, as published (embeddings in).
    "mixtral-8x7b": (12.9, "arXiv:2401.04088: 13B"),
    "mixtral-8x22b": (39.2, "Mistral AI: 39B"),
    "deepseek-v2": (21.4, "arXiv:2405.04434: 21B"),
    "deepseek-v3": (37.6, "arXiv:2412.19437: 37B"),
    "qwen3-30b-a3b": (3.35, "Qwen3 technical report: 3.3B"),
    "qwen3-235b-a22b": (22.2, "Qwen3 technical report: 22B"),
    "llama-4-scout": (17.2, "Meta: 17B"),
    "llama-4-maverick": (17.2, "Meta: 17B"),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_total_is_what_is_published(name: str) -> None:
    assert parameter_counts(resolve_model(name)[0]).total == PUBLISHED[name][0]


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_active_is_what_is_published(name: str) -> None:
    active = parameter_counts(resolve_model(name)[0]).active
    assert active / 1e9 == pytest.approx(ACTIVE[name][0], rel=0.01)


@pytest.mark.parametrize("name", preset_names())
def test_parts_make_the_whole(name: str) -> None:
    spec, _ = resolve_model(name)
    counts = parameter_counts(spec)
    blocks = sum(b.count * one.total for b, one in zip(spec.blocks, counts.blocks, strict=True))
    assert counts.total == counts.embedding + blocks + counts.final + counts.head
    routed = any(block.mlp.experts for block in spec.blocks)
    assert (counts.active < counts.total) == routed
    assert 0 < largest_matrix(spec) < counts.total


def test_grouped_attention_by_hand() -> None:
    attention = Attention(heads=4, kv_heads=2, head_dim=8, qkv_bias=True, out_bias=True)
    # q 32·10, k and v 16·10 each, biases 64; out 10·32 and its bias 10
    assert attention_parameters(attention, 10) == 320 + 2 * 160 + 64 + 320 + 10


def test_latent_attention_by_hand() -> None:
    attention = Attention(
        heads=4, kv_heads=4, head_dim=12, value_head_dim=6, q_rank=5, kv_rank=7, rope_head_dim=4
    )
    q = 10 * 5 + 5 * 48
    kv = 10 * (7 + 4) + 7 * 4 * (8 + 6)
    assert attention_parameters(attention, 10) == q + kv + 4 * 6 * 10


def test_mlp_by_hand() -> None:
    gated = Mlp(ffn=20, gated=True, bias=True)
    assert mlp_parameters(gated, 10, 20) == 3 * 200 + 2 * 20 + 10
    assert mlp_parameters(replace(gated, gated=False), 10, 20) == 2 * 200 + 20 + 10
    assert mlp_parameters(gated, 10, 0) == 0


def small(**changes: object) -> ModelSpec:
    attention = Attention(heads=2, kv_heads=1, head_dim=4)
    block = Block(count=3, attention=attention, mlp=Mlp(ffn=16, gated=True))
    fields = {
        "name": "small",
        "source": "test",
        "family": "llama",
        "hidden": 8,
        "vocab": 50,
        "blocks": (block,),
        "positions": "rotary",
        "max_positions": 64,
        **changes,
    }
    return ModelSpec(**fields)  # type: ignore[arg-type]


def test_a_tied_head_counts_once_and_keeps_its_bias() -> None:
    untied, tied = small(), small(tie_embeddings=True, head_bias=True)
    assert parameter_counts(untied).head == 50 * 8
    assert parameter_counts(tied).head == 50
    assert parameter_counts(small(has_head=False)).head == 0


@given(
    count=st.integers(1, 200),
    hidden=st.integers(1, 4096),
    ffn=st.integers(1, 4096),
    experts=st.integers(1, 64),
    data=st.data(),
)
@settings(deadline=None, max_examples=300)
def test_more_of_anything_is_never_fewer_weights(
    count: int, hidden: int, ffn: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    attention = Attention(heads=2, kv_heads=1, head_dim=4)
    mlp = Mlp(ffn=ffn, gated=True, experts=experts, top_k=top_k, router_parameters=hidden * experts)
    block = Block(count=count, attention=attention, mlp=mlp)
    counts = parameter_counts(small(hidden=hidden, blocks=(block,)))
    assert counts.total >= counts.active > 0
    assert (counts.total == counts.active) == (top_k == experts)
    wider = replace(block, mlp=replace(mlp, ffn=ffn + 1))
    deeper = replace(block, count=count + 1)
    for more in (wider, deeper):
        assert parameter_counts(small(hidden=hidden, blocks=(more,))).total > counts.total

"""How many weights a model has, exactly, by part.

The arithmetic is that of the modules of transformers; tests count every family and every preset
against the module on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec


@dataclass(frozen=True, kw_only=True)
class BlockParameters:
    """One block."""

    attention: int
    """Projections, biases, norms on q and k; cross attention too."""
    mlp: int
    """The dense MLP, or the router and the shared experts."""
    experts: int
    """All routed experts."""
    norms: int

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.experts + self.norms


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """The whole model; weights that are tied count once."""

    embedding: int
    """Token table, position table, extras before the first block."""
    blocks: tuple[BlockParameters, ...]
    """One for each group of blocks of the spec, of ONE block."""
    final: int
    """Final norm, extras after the last block."""
    head: int
    """Vocabulary projection; only its bias where it is tied."""
    total: int
    active: int
    """What one token visits: top_k of the routed experts."""


def attention_parameters(attention: Attention, hidden: int) -> int:
    """q, k, v and output projections; with latent attention, their low-rank factors.

    Latent: DeepSeek-V2 (arXiv:2405.04434), section 2.1; biases on the compressing projections.
    """
    out = attention.out_width * hidden + (hidden if attention.out_bias else 0)
    extra = attention.qk_norm_parameters + attention.extra_parameters
    if not attention.kv_rank:
        qkv = attention.q_width + attention.k_width + attention.v_width
        return qkv * hidden + (qkv if attention.qkv_bias else 0) + out + extra
    compressed = attention.kv_rank + attention.rope_head_dim
    expanded = attention.k_width - attention.kv_heads * attention.rope_head_dim + attention.v_width
    kv = hidden * compressed + attention.kv_rank * expanded
    bias = compressed + attention.q_rank if attention.qkv_bias else 0
    q = (hidden + attention.q_width) * attention.q_rank or hidden * attention.q_width
    return q + kv + bias + out + extra


def mlp_parameters(mlp: Mlp, hidden: int, ffn: int) -> int:
    """Up, down and, where it is gated, gate projection of one MLP of width ffn."""
    into = 2 if mlp.gated else 1
    return (into + 1) * hidden * ffn + (into * ffn + hidden if mlp.bias and ffn else 0)


def norm_parameters(spec: ModelSpec) -> int:
    """One norm over the hidden width."""
    return spec.hidden * (int(spec.norm_weight) + int(spec.norm_bias))


def block_parameters(block: Block, spec: ModelSpec) -> BlockParameters:
    """One block of a group."""
    hidden, mlp = spec.hidden, block.mlp
    attention = attention_parameters(block.attention, hidden)
    if block.cross_attention is not None:
        attention += attention_parameters(block.cross_attention, hidden)
    one = mlp_parameters(mlp, hidden, mlp.ffn)
    shared = mlp.router_parameters + mlp_parameters(mlp, hidden, mlp.shared_ffn)
    return BlockParameters(
        attention=attention,
        mlp=shared if mlp.experts else one,
        experts=mlp.experts * one,
        norms=block.norms * norm_parameters(spec),
    )


def parameter_counts(spec: ModelSpec) -> ParameterCounts:
    """Exact counts of the model that transformers builds from the config."""
    width = spec.embedding_width or spec.hidden
    embedding = (
        spec.vocab * width
        + spec.learned_positions * (spec.position_width or spec.hidden)
        + spec.extra_parameters
    )
    blocks = tuple(block_parameters(block, spec) for block in spec.blocks)
    final = (norm_parameters(spec) if spec.final_norm else 0) + spec.final_extra_parameters
    head = 0
    if spec.has_head:
        head = (0 if spec.tie_embeddings else spec.vocab * width) + (
            spec.vocab if spec.head_bias else 0
        )
    total = embedding + final + head
    idle = 0
    for group, one in zip(spec.blocks, blocks, strict=True):
        total += group.count * one.total
        if group.mlp.experts:
            idle_experts = group.mlp.experts - group.mlp.top_k
            idle += group.count * one.experts // group.mlp.experts * idle_experts
    return ParameterCounts(
        embedding=embedding, blocks=blocks, final=final, head=head, total=total, active=total - idle
    )


def largest_attention_matrix(attention: Attention, hidden: int) -> int:
    """Elements of the largest projection, as transformers holds it."""
    out = attention.out_width * hidden
    if not attention.kv_rank:
        fused = attention.k_width + attention.v_width if attention.fused_qkv else 0
        return max(attention.q_width + fused, attention.k_width) * hidden
    rope = attention.rope_head_dim
    expanded = attention.k_width - attention.kv_heads * rope + attention.v_width
    compressed = max(attention.q_rank, attention.kv_rank + rope)
    q = attention.q_width * (attention.q_rank or hidden)
    return max(out, q, attention.kv_rank * expanded, compressed * hidden)


def largest_matrix(spec: ModelSpec) -> int:
    """Elements of the largest matrix in a block or table, as transformers holds it, on one rank."""
    return max(largest_matrices(spec))


def largest_matrices(spec: ModelSpec) -> tuple[int, int]:
    """(the largest that every rank holds, the largest of routed experts; 0 = none) in elements.

    The experts of a block are one weight in transformers, with gate and up projection together; ranks
    of expert parallelism hold a part of it each. The extras of DeBERTa (relative positions, convolution)
    and T5 are left out: smaller in any real model.
    """
    tables = 2 if spec.encoder_decoder else 1
    sizes = [
        spec.vocab * (spec.embedding_width or spec.hidden),
        spec.learned_positions // tables * (spec.position_width or spec.hidden),
        spec.embedding_width * spec.hidden,
    ]
    experts = 0
    for block in spec.blocks:
        mlp = block.mlp
        stacked = 2 if mlp.gated and (mlp.fused_gate or mlp.experts) else 1
        inner = stacked * mlp.ffn * spec.hidden
        experts = max(experts, mlp.experts * inner)
        sizes += [
            largest_attention_matrix(block.attention, spec.hidden),
            0 if mlp.experts else inner,
            mlp.shared_ffn * spec.hidden,
        ]
    return max(sizes), experts

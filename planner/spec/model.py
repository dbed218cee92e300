"""ModelSpec: a transformer as the formulas see it.

A model is an embedding, a few groups of identical blocks, a final norm and a head. Sizes only;
the reading of a transformers `config.json` is in `families.py`, the counting in
`planner/estimate/parameters.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention of one block. q: heads·head_dim wide; k and v: kv_heads·head_dim."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_parameters: int = 0
    """Extra norm weights on q and k in one block (Qwen3: 2·head_dim)."""
    window: int | None = None
    """Sliding-window length in tokens; null = every earlier token."""
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Feed-forward of one block; for a mixture of experts, the sizes of one expert."""

    ffn: int
    gated: bool
    bias: bool = False
    activation: str = "silu"
    experts: int = 0
    """Routed experts; 0 = dense."""
    top_k: int = 0
    shared_ffn: int = 0
    """Width of the experts that every token visits, in all."""
    router_parameters: int = 0


@dataclass(frozen=True, kw_only=True)
class Block:
    """`count` identical transformer blocks."""

    count: int
    attention: Attention
    mlp: Mlp
    norms: int = 2
    """Norms over the hidden width in one block."""
    parallel_residual: bool = False
    """Attention and MLP read the same normed input (GPT-NeoX, GPT-J, Falcon)."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes of one model. All counts are exact: a test compares them with the instantiated module."""

    name: str
    source: str
    """Where the sizes come from: preset, file path."""
    family: str
    """transformers' `model_type`."""
    hidden: int
    vocab: int
    blocks: tuple[Block, ...]
    positions: Literal["rotary", "learned", "alibi", "relative", "none"]
    max_positions: int
    """Longest sequence the config allows."""
    learned_positions: int = 0
    """Rows of the position table (OPT has 2 more than max_positions); 0 = no table."""
    tie_embeddings: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = False
    final_norm: bool = True
    head_bias: bool = False
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    extra_parameters: int = 0
    """Weights that fit none of the above (embedding norm, pooler …)."""
    has_head: bool = True
    """A vocabulary projection that makes logits."""

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

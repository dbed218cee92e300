"""ModelSpec: a transformer as the formulas see it.

A model is an embedding, a few groups of identical blocks, a final norm and a head. Sizes only;
the reading of a transformers `config.json` is in `families/`, the counting in
`planner/estimate/parameters.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of one block. q: heads·head_dim wide; k and v: kv_heads·head_dim.

    Latent attention (DeepSeek's MLA) has kv_rank > 0: k and v are expanded from kv_rank numbers a
    token, plus rope_head_dim that all heads share; head_dim then includes rope_head_dim.
    """

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
    causal: bool = True
    value_head_dim: int | None = None
    """Width of one head's v where it is not head_dim; null = head_dim."""
    q_rank: int = 0
    """Latent attention: width of the compressed q; 0 = q is projected in one step."""
    kv_rank: int = 0
    """Latent attention: width of the compressed k and v; 0 = ordinary attention."""
    rope_head_dim: int = 0
    """Latent attention: the part of head_dim that carries the rotary position."""
    fused_qkv: bool = False
    """q, k and v are one matrix (matters where whole matrices are gathered)."""
    extra_parameters: int = 0
    """Weights that fit none of the above (sinks, relative-position tables and projections)."""

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def k_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def v_width(self) -> int:
        return self.kv_heads * (self.value_head_dim or self.head_dim)

    @property
    def out_width(self) -> int:
        """What the output projection reads."""
        return self.heads * (self.value_head_dim or self.head_dim)


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
    """The router's weights, with the gate on the shared expert where there is one."""
    fused_gate: bool = False
    """Gate and up projection are one matrix (matters where whole matrices are gathered)."""
    dropout: float = 0.0
    """On the ffn-wide values inside (T5, BART)."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """`count` identical transformer blocks.

    Blocks of alternating kinds (sliding and full attention, dense and mixture) are merged: a group
    counts all of its kind in its stack, and groups stand in the order of their first block.
    """

    count: int
    attention: Attention
    mlp: Mlp
    norms: int = 2
    """Norms over the hidden width in one block."""
    parallel_residual: bool = False
    """Attention and MLP read the same normed input (GPT-NeoX, GPT-J, Falcon)."""
    stack: Literal["decoder", "encoder"] = "decoder"
    cross_attention: Attention | None = None
    """Attention to the encoder's output (decoder blocks of an encoder-decoder)."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes of one model. Counts are exact: a test compares them with the instantiated module."""

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
    """Longest sequence the config allows; 0 = it sets no limit (T5, BLOOM)."""
    learned_positions: int = 0
    """Rows of the position tables (OPT has 2 more than max_positions; BART has two tables);
    0 = no table."""
    tie_embeddings: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = False
    final_norm: bool = True
    head_bias: bool = False
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    extra_parameters: int = 0
    """Weights before the first block that fit none of the above (embedding norm, token types …)."""
    has_head: bool = True
    """A vocabulary projection that makes logits."""
    embedding_width: int = 0
    """Width of the token table, and of what the head reads; 0 = hidden."""
    position_width: int = 0
    """Width of the position table; 0 = hidden."""
    norm_weight: bool = True
    """Norms have a scale (OLMo's have none)."""
    final_extra_parameters: int = 0
    """Weights between the last block and the head besides the final norm (transform of a masked-LM
    head, projection to the width of the embedding, final norm of the encoder of a T5)."""
    router_loss: bool = False
    """The config asks for the load-balance loss of its experts (`output_router_logits`)."""

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

    @property
    def encoder_decoder(self) -> bool:
        return len({block.stack for block in self.blocks}) > 1

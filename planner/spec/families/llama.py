"""The Llama shape: RMSNorm, rotary positions, gated MLP, grouped-query attention.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import (
    Family,
    head_width,
    kv_heads_of,
    layer_windows,
    switched_window,
)
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec


@dataclass(frozen=True)
class Sizes:
    """The keys that all these families have."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


def sizes_of(
    reader: Reader,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    divides: bool = False,
) -> Sizes:
    """`kv_heads`, `head_dim`: transformers' defaults, null = derived from the others.

    `divides`: transformers refuses heads that do not divide hidden_size, even with a head_dim.
    """
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    width = reader.optional_size("head_dim", head_dim)
    if width is None or divides:
        derived = head_width(reader, hidden, heads)
        width = derived if width is None else width
    return Sizes(
        hidden=hidden,
        layers=reader.layers("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads_of(reader, heads, kv_heads),
        head_dim=width,
        ffn=reader.size("intermediate_size"),
    )


def attention_of(reader: Reader, sizes: Sizes, *, bias_key: str | None = None) -> Attention:
    """`bias_key`: the flag, off by default, that gives all four projections a bias."""
    bias = reader.flag(bias_key, False) if bias_key else False
    return Attention(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        qkv_bias=bias,
        out_bias=bias,
        dropout=reader.probability("attention_dropout", 0.0),
    )


def mlp_of(reader: Reader, sizes: Sizes, *, activation_key: str = "hidden_act") -> Mlp:
    return Mlp(ffn=sizes.ffn, gated=True, activation=reader.activation(activation_key, "silu"))


def windowed(windows: Iterable[int | None], block: Block) -> tuple[Block, ...]:
    """Blocks that differ in their window alone, one group for each window."""
    return tuple(
        replace(block, count=count, attention=replace(block.attention, window=window))
        for window, count in Counter(windows).items()
    )


def model_of(
    reader: Reader,
    sizes: Sizes,
    *,
    name: str,
    blocks: tuple[Block, ...],
    max_positions: int,
    tie: bool = False,
) -> ModelSpec:
    """The model around the blocks: token table, final RMSNorm, head without bias."""
    return ModelSpec(
        name=name,
        source=reader.source,
        family=reader.text("model_type", ""),
        hidden=sizes.hidden,
        vocab=reader.size("vocab_size"),
        blocks=blocks,
        positions="rotary",
        max_positions=reader.size("max_position_embeddings", max_positions),
        tie_embeddings=reader.flag("tie_word_embeddings", tie),
        router_loss=reader.flag("output_router_logits", False),
    )


def read_llama(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, divides=True)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    mlp = replace(mlp_of(reader, sizes), bias=reader.flag("mlp_bias", False))
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp),)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=2048)


def read_mistral(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=8)
    window = reader.optional_size("sliding_window", 4096)
    attention = replace(attention_of(reader, sizes), window=window)
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp_of(reader, sizes)),)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=131072)


def qwen_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """The first max_window_layers see everything, the rest a window, if windows are on at all."""
    window = switched_window(reader, 4096)
    full = layers if window is None else reader.size("max_window_layers", 28, at_least=0)
    default = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    return layer_windows(
        reader, layers, window=window, default=default, window_key="use_sliding_window"
    )


def read_qwen2(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=32)
    attention = replace(attention_of(reader, sizes), qkv_bias=True)
    block = Block(count=sizes.layers, attention=attention, mlp=mlp_of(reader, sizes))
    blocks = windowed(qwen_windows(reader, sizes.layers), block)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=32768)


def read_qwen3(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=32, head_dim=128)
    attention = replace(
        attention_of(reader, sizes, bias_key="attention_bias"),
        qk_norm_parameters=2 * sizes.head_dim,
    )
    block = Block(count=sizes.layers, attention=attention, mlp=mlp_of(reader, sizes))
    blocks = windowed(qwen_windows(reader, sizes.layers), block)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=32768)


def read_smollm3(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=4)
    window = switched_window(reader, None)
    rotary = reader.wholes("no_rope_layers")
    if rotary is None:
        interval = reader.size("no_rope_layer_interval", 4)
        rotary = tuple(int((i + 1) % interval != 0) for i in range(sizes.layers))
    elif len(rotary) != sizes.layers:
        reader.refuse("no_rope_layers", f"has {len(rotary)} entries for {sizes.layers} layers")
    local = window is not None
    default = ["full_attention" if here or not local else "sliding_attention" for here in rotary]
    windows = layer_windows(reader, sizes.layers, window=window, default=default)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    mlp = replace(mlp_of(reader, sizes), bias=reader.flag("mlp_bias", False))
    block = Block(count=sizes.layers, attention=attention, mlp=mlp)
    blocks = windowed(windows, block)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=32768, tie=True)


def read_granite(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    mlp = replace(mlp_of(reader, sizes), bias=reader.flag("mlp_bias", False))
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp),)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=2048)


def read_phi3(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader)
    window = reader.optional_size("sliding_window", None)
    attention = replace(attention_of(reader, sizes), window=window, fused_qkv=True)
    mlp = replace(mlp_of(reader, sizes), fused_gate=True)
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp),)
    spec = model_of(reader, sizes, name=name, blocks=blocks, max_positions=4096)
    return replace(spec, residual_dropout=reader.probability("resid_pdrop", 0.0))


def read_olmo(reader: Reader, name: str) -> ModelSpec:
    """Its LayerNorms have no weights (arXiv:2402.00838)."""
    sizes = sizes_of(reader)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp_of(reader, sizes)),)
    spec = model_of(reader, sizes, name=name, blocks=blocks, max_positions=2048)
    return replace(spec, norm="layernorm", norm_weight=False)


def read_olmo2(reader: Reader, name: str) -> ModelSpec:
    """Norms after attention and MLP, and over the whole of q and of k (arXiv:2501.00656)."""
    sizes = sizes_of(reader)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    attention = replace(attention, qk_norm_parameters=attention.q_width + attention.k_width)
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp_of(reader, sizes)),)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=2048)


FAMILIES = {
    "granite": Family(read=read_granite),
    "llama": Family(read=read_llama),
    "mistral": Family(read=read_mistral),
    "olmo": Family(read=read_olmo),
    "olmo2": Family(read=read_olmo2),
    "phi3": Family(read=read_phi3),
    "qwen2": Family(read=read_qwen2),
    "qwen3": Family(read=read_qwen3),
    "smollm3": Family(read=read_smollm3),
}

"""Mixtures of experts of the Llama shape: Mixtral, Qwen-MoE, Llama 4, GPT-OSS, DeepSeek.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from outlay.planner.spec.families.llama import (
    Sizes,
    attention_of,
    mlp_of,
    model_of,
    sizes_of,
    windowed,
)
from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import (
    Family,
    every,
    head_width,
    layer_windows,
    switched_window,
)
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec


def _experts(
    reader: Reader, *, key: str, default: int | None, top_k: int | None
) -> tuple[int, int]:
    """(routed experts, experts a token visits)."""
    experts = reader.size(key, default)
    visited = reader.size("num_experts_per_tok", top_k)
    if visited > experts:
        reader.refuse("num_experts_per_tok", f"is {visited}, but there are {experts} experts")
    return experts, visited


def _mixed(
    windows: Iterable[int | None],
    sparse: Iterable[bool],
    attention: Attention,
    *,
    dense: Mlp,
    mixture: Mlp,
) -> tuple[Block, ...]:
    """Blocks that differ in window and in whether they have experts, one group for each kind."""
    kinds = Counter(zip(windows, sparse, strict=True))
    return tuple(
        Block(
            count=count,
            attention=replace(attention, window=window),
            mlp=mixture if routed else dense,
        )
        for (window, routed), count in kinds.items()
    )


def read_mixtral(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=8)
    experts, top_k = _experts(reader, key="num_local_experts", default=8, top_k=2)
    window = reader.optional_size("sliding_window", None)
    mlp = replace(
        mlp_of(reader, sizes),
        experts=experts,
        top_k=top_k,
        router_parameters=experts * sizes.hidden,
    )
    attention = replace(attention_of(reader, sizes), window=window)
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp),)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=131072)


def _qwen_sparse(reader: Reader, layers: int) -> list[bool]:
    """Every decoder_sparse_step-th layer has experts, save those in mlp_only_layers."""
    step = reader.size("decoder_sparse_step", 1)
    dense = frozenset(reader.wholes("mlp_only_layers") or ())
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _qwen_mixture(
    reader: Reader, sizes: Sizes, *, experts: int, top_k: int, shared_ffn: int
) -> Mlp:
    """`experts`, `top_k`, `shared_ffn`: transformers' defaults; no shared expert where it is 0."""
    experts, visited = _experts(reader, key="num_experts", default=experts, top_k=top_k)
    if shared_ffn:
        shared_ffn = reader.size("shared_expert_intermediate_size", shared_ffn)
    return replace(
        mlp_of(reader, sizes),
        ffn=reader.size("moe_intermediate_size"),
        experts=experts,
        top_k=visited,
        shared_ffn=shared_ffn,
        router_parameters=(experts + (1 if shared_ffn else 0)) * sizes.hidden,
    )


def read_qwen2_moe(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=16)
    mixture = _qwen_mixture(reader, sizes, experts=60, top_k=4, shared_ffn=5632)
    window = switched_window(reader, 4096)
    last = 0 if window is None else reader.size("max_window_layers", 28, at_least=0)
    types = every(2, sizes.layers)
    default = [kind if i < last else "full_attention" for i, kind in enumerate(types)]
    windows = layer_windows(
        reader, sizes.layers, window=window, default=default, window_key="use_sliding_window"
    )
    attention = attention_of(reader, sizes)
    attention = replace(attention, qkv_bias=reader.flag("qkv_bias", True))
    sparse = _qwen_sparse(reader, sizes.layers)
    blocks = _mixed(windows, sparse, attention, dense=mlp_of(reader, sizes), mixture=mixture)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=32768)


def read_qwen3_moe(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader, kv_heads=4)
    mixture = _qwen_mixture(reader, sizes, experts=128, top_k=8, shared_ffn=0)
    window = switched_window(reader, 4096)
    attention = replace(
        attention_of(reader, sizes, bias_key="attention_bias"),
        window=window,
        qk_norm_parameters=2 * sizes.head_dim,
    )
    sparse = _qwen_sparse(reader, sizes.layers)
    windows = [window] * sizes.layers
    blocks = _mixed(windows, sparse, attention, dense=mlp_of(reader, sizes), mixture=mixture)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=32768)


def _llama4_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """Layers with rotary positions see their chunk only; every fourth, without, sees everything."""
    rotary = reader.wholes("no_rope_layers")
    if rotary and len(rotary) != layers:
        reader.refuse("no_rope_layers", f"has {len(rotary)} entries for {layers} layers")
    if not rotary:
        interval = reader.size("no_rope_layer_interval", 4)
        rotary = tuple(int((i + 1) % interval != 0) for i in range(layers))
    return layer_windows(
        reader,
        layers,
        window=reader.optional_size("attention_chunk_size", 8192),
        default=["chunked_attention" if here else "full_attention" for here in rotary],
        local="chunked_attention",
        window_key="attention_chunk_size",
    )


def read_llama4_text(reader: Reader, name: str) -> ModelSpec:
    """intermediate_size is that of an expert, intermediate_size_mlp that of a dense layer.

    One shared expert, as wide as a routed one; the norms of q and k have no weights.
    """
    sizes = sizes_of(reader, kv_heads=8, head_dim=128)
    experts, top_k = _experts(reader, key="num_local_experts", default=16, top_k=1)
    routed = reader.wholes("moe_layers")
    if routed is None:
        step = reader.size("interleave_moe_layer_step", 1)
        routed = tuple(range(step - 1, sizes.layers, step))
    sparse = [i in frozenset(routed) for i in range(sizes.layers)]
    dense = replace(mlp_of(reader, sizes), ffn=reader.size("intermediate_size_mlp", 16384))
    mixture = replace(
        mlp_of(reader, sizes),
        experts=experts,
        top_k=top_k,
        shared_ffn=sizes.ffn,
        router_parameters=experts * sizes.hidden,
    )
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    windows = _llama4_windows(reader, sizes.layers)
    blocks = _mixed(windows, sparse, attention, dense=dense, mixture=mixture)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=131072)


def read_gpt_oss(reader: Reader, name: str) -> ModelSpec:
    """A learned sink a head; biases on the router and the experts too."""
    sizes = sizes_of(reader, kv_heads=8, head_dim=64)
    experts, top_k = _experts(reader, key="num_local_experts", default=128, top_k=4)
    windows = layer_windows(
        reader,
        sizes.layers,
        window=reader.optional_size("sliding_window", 128),
        default=every(2, sizes.layers),
    )
    bias = reader.flag("attention_bias", True)
    attention = replace(
        attention_of(reader, sizes), qkv_bias=bias, out_bias=bias, extra_parameters=sizes.heads
    )
    mlp = replace(
        mlp_of(reader, sizes),
        bias=True,
        experts=experts,
        top_k=top_k,
        router_parameters=experts * (sizes.hidden + 1),
    )
    block = Block(count=sizes.layers, attention=attention, mlp=mlp)
    blocks = windowed(windows, block)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=131072)


def _latent_attention(reader: Reader, heads: int) -> Attention:
    """Multi-head latent attention: arXiv:2405.04434, section 2.1."""
    q_rank = reader.optional_size("q_lora_rank", 1536) or 0
    kv_rank = reader.size("kv_lora_rank", 512)
    rope = reader.size("qk_rope_head_dim", 64)
    bias = reader.flag("attention_bias", False)
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=reader.size("qk_nope_head_dim", 128) + rope,
        value_head_dim=reader.size("v_head_dim", 128),
        q_rank=q_rank,
        kv_rank=kv_rank,
        rope_head_dim=rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm_parameters=q_rank + kv_rank,
        dropout=reader.probability("attention_dropout", 0.0),
    )


def _read_deepseek(
    reader: Reader,
    name: str,
    *,
    experts: int,
    top_k: int | None,
    shared: int,
    first_dense: int,
    max_positions: int,
) -> ModelSpec:
    """The numbers are transformers' defaults, in which the versions differ."""
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    layers = reader.layers("num_hidden_layers")
    head_width(reader, hidden, heads)
    activation = reader.activation("hidden_act", "silu")
    bias = reader.flag("mlp_bias", False)
    ffn = reader.size("intermediate_size")
    dense = Mlp(ffn=ffn, gated=True, bias=bias, activation=activation)
    experts, visited = _experts(reader, key="n_routed_experts", default=experts, top_k=top_k)
    width = reader.size("moe_intermediate_size")
    mixture = replace(
        dense,
        ffn=width,
        experts=experts,
        top_k=visited,
        shared_ffn=width * reader.size("n_shared_experts", shared),
        router_parameters=experts * hidden,
    )
    first = reader.size("first_k_dense_replace", first_dense, at_least=0)
    sparse = [i >= first for i in range(layers)]
    attention = _latent_attention(reader, heads)
    blocks = _mixed([None] * layers, sparse, attention, dense=dense, mixture=mixture)
    sizes = Sizes(hidden, layers, heads, heads, attention.head_dim, ffn)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=max_positions)


def read_deepseek_v2(reader: Reader, name: str) -> ModelSpec:
    return _read_deepseek(
        reader, name, experts=64, top_k=None, shared=2, first_dense=0, max_positions=2048
    )


def read_deepseek_v3(reader: Reader, name: str) -> ModelSpec:
    """The extra layers that predict further tokens are not built by transformers."""
    return _read_deepseek(
        reader, name, experts=256, top_k=8, shared=1, first_dense=3, max_positions=4096
    )


FAMILIES = {
    "deepseek_v2": Family(read=read_deepseek_v2, aliases={"n_routed_experts": "num_experts"}),
    "deepseek_v3": Family(read=read_deepseek_v3, aliases={"n_routed_experts": "num_local_experts"}),
    "gpt_oss": Family(read=read_gpt_oss, aliases={"num_local_experts": "num_experts"}),
    "llama4_text": Family(read=read_llama4_text),
    "mixtral": Family(read=read_mixtral, aliases={"num_local_experts": "num_experts"}),
    "qwen2_moe": Family(read=read_qwen2_moe),
    "qwen3_moe": Family(read=read_qwen3_moe, aliases={"num_experts": "num_local_experts"}),
}

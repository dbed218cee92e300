"""Gemma and Cohere: Llama's parts with tied embeddings, other norms, alternating windows.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from dataclasses import replace

from outlay.planner.spec.families.llama import attention_of, mlp_of, model_of, sizes_of, windowed
from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import Family, every, layer_windows
from outlay.planner.spec.model import Block, ModelSpec

GELU = "gelu_pytorch_tanh"


def read_gemma(reader: Reader, name: str) -> ModelSpec:
    """`hidden_act: gelu` in the published configs means its tanh form, as transformers takes it."""
    sizes = sizes_of(reader, kv_heads=16, head_dim=256)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    activation = reader.activation("hidden_act", GELU)
    mlp = replace(mlp_of(reader, sizes), activation=GELU if activation == "gelu" else activation)
    blocks = (Block(count=sizes.layers, attention=attention, mlp=mlp),)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=8192, tie=True)


def _alternating(
    reader: Reader, name: str, *, period: int, max_positions: int, qk_norm: bool
) -> ModelSpec:
    """Gemma 2 and 3: four norms a block; each period-th layer sees everything."""
    sizes = sizes_of(reader, kv_heads=4, head_dim=256, divides=True)
    window = reader.optional_size("sliding_window", 4096)
    if qk_norm and window is not None and reader.optional_flag("use_bidirectional_attention"):
        window = window // 2 + 1
    default = every(period, sizes.layers)
    windows = layer_windows(reader, sizes.layers, window=window, default=default)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    if qk_norm:
        attention = replace(attention, qk_norm_parameters=2 * sizes.head_dim)
    activation = reader.activation("hidden_activation", GELU)
    mlp = replace(mlp_of(reader, sizes), activation=activation)
    block = Block(count=sizes.layers, attention=attention, mlp=mlp, norms=4)
    blocks = windowed(windows, block)
    return model_of(reader, sizes, name=name, blocks=blocks, max_positions=max_positions, tie=True)


def read_gemma2(reader: Reader, name: str) -> ModelSpec:
    return _alternating(reader, name, period=2, max_positions=8192, qk_norm=False)


def read_gemma3(reader: Reader, name: str) -> ModelSpec:
    period = reader.size("sliding_window_pattern", 6)
    return _alternating(reader, name, period=period, max_positions=131072, qk_norm=True)


def read_cohere(reader: Reader, name: str) -> ModelSpec:
    """One LayerNorm without bias feeds attention and MLP alike."""
    sizes = sizes_of(reader)
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    if reader.optional_flag("use_qk_norm"):
        attention = replace(attention, qk_norm_parameters=attention.q_width + attention.k_width)
    mlp = mlp_of(reader, sizes)
    block = Block(count=sizes.layers, attention=attention, mlp=mlp, norms=1, parallel_residual=True)
    spec = model_of(reader, sizes, name=name, blocks=(block,), max_positions=8192, tie=True)
    return replace(spec, norm="layernorm")


def read_cohere2(reader: Reader, name: str) -> ModelSpec:
    sizes = sizes_of(reader)
    period = reader.size("sliding_window_pattern", 4)
    windows = layer_windows(
        reader,
        sizes.layers,
        window=reader.optional_size("sliding_window", 4096),
        default=every(period, sizes.layers),
    )
    attention = attention_of(reader, sizes, bias_key="attention_bias")
    mlp = mlp_of(reader, sizes)
    block = Block(count=sizes.layers, attention=attention, mlp=mlp, norms=1, parallel_residual=True)
    blocks = windowed(windows, block)
    spec = model_of(reader, sizes, name=name, blocks=blocks, max_positions=8192, tie=True)
    return replace(spec, norm="layernorm")


FAMILIES = {
    "cohere": Family(read=read_cohere),
    "cohere2": Family(read=read_cohere2),
    "gemma": Family(read=read_gemma),
    "gemma2": Family(read=read_gemma2),
    "gemma3_text": Family(read=read_gemma3),
}

"""The GPT shape: LayerNorm with bias and a plain MLP. GPT-2, GPT-J, GPT-NeoX, OPT, Phi, StarCoder2.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from dataclasses import replace

from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import Family, head_width, kv_heads_of
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec

GPT2_ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def _gpt2_sizes(reader: Reader, *, dropout: float, bias: bool) -> tuple[int, Attention, Mlp]:
    """hidden, attention and MLP by the key names of GPT-2, which GPT-J shares."""
    hidden = reader.size("n_embd")
    heads = reader.size("n_head")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads, heads_key="n_head", hidden_key="n_embd"),
        qkv_bias=bias,
        out_bias=bias,
        dropout=reader.probability("attn_pdrop", dropout),
    )
    mlp = Mlp(
        ffn=reader.optional_size("n_inner", None) or 4 * hidden,
        gated=False,
        bias=True,
        activation=reader.activation("activation_function", "gelu_new"),
    )
    return hidden, attention, mlp


def read_gpt2(reader: Reader, name: str) -> ModelSpec:
    if reader.flag("add_cross_attention", False):
        reader.refuse("add_cross_attention", "a GPT-2 that attends to an encoder is not known")
    hidden, attention, mlp = _gpt2_sizes(reader, dropout=0.1, bias=True)
    attention = replace(attention, fused_qkv=True)
    positions = reader.size("n_positions", 1024)
    return ModelSpec(
        name=name,
        source=reader.source,
        family="gpt2",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(Block(count=reader.layers("n_layer"), attention=attention, mlp=mlp),),
        positions="learned",
        max_positions=positions,
        learned_positions=positions,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm="layernorm",
        norm_bias=True,
        embedding_dropout=reader.probability("embd_pdrop", 0.1),
        residual_dropout=reader.probability("resid_pdrop", 0.1),
    )


def read_gptj(reader: Reader, name: str) -> ModelSpec:
    hidden, attention, mlp = _gpt2_sizes(reader, dropout=0.0, bias=False)
    layers = reader.layers("n_layer")
    block = Block(count=layers, attention=attention, mlp=mlp, norms=1, parallel_residual=True)
    return ModelSpec(
        name=name,
        source=reader.source,
        family="gptj",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(block,),
        positions="rotary",
        max_positions=reader.size("n_positions", 2048),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        norm="layernorm",
        norm_bias=True,
        head_bias=True,
        embedding_dropout=reader.probability("embd_pdrop", 0.0),
        residual_dropout=reader.probability("resid_pdrop", 0.0),
    )


def read_gpt_neox(reader: Reader, name: str) -> ModelSpec:
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    bias = reader.flag("attention_bias", True)
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads),
        qkv_bias=bias,
        out_bias=bias,
        dropout=reader.probability("attention_dropout", 0.0),
        fused_qkv=True,
    )
    activation = reader.activation("hidden_act", "gelu")
    mlp = Mlp(ffn=reader.size("intermediate_size"), gated=False, bias=True, activation=activation)
    block = Block(
        count=reader.layers("num_hidden_layers"),
        attention=attention,
        mlp=mlp,
        parallel_residual=reader.flag("use_parallel_residual", True),
    )
    dropout = reader.probability("hidden_dropout", 0.0)
    return ModelSpec(
        name=name,
        source=reader.source,
        family="gpt_neox",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(block,),
        positions="rotary",
        max_positions=reader.size("max_position_embeddings", 2048),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        norm="layernorm",
        norm_bias=True,
        embedding_dropout=dropout,
        residual_dropout=dropout,
    )


def _grouped(reader: Reader, *, kv_heads: int | None, bias: bool) -> Attention:
    """Attention by the key names of Llama, for the plain-MLP families that share them."""
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    width = reader.optional_size("head_dim", None)
    return Attention(
        heads=heads,
        kv_heads=kv_heads_of(reader, heads, kv_heads),
        head_dim=head_width(reader, hidden, heads) if width is None else width,
        qkv_bias=bias,
        out_bias=bias,
        dropout=reader.probability("attention_dropout", 0.0),
    )


def read_phi(reader: Reader, name: str) -> ModelSpec:
    """Phi-1, 1.5 and 2; Phi-3 and 4 are of the Llama shape."""
    attention = _grouped(reader, kv_heads=None, bias=True)
    if reader.flag("qk_layernorm", False):
        per_head = head_width(reader, reader.size("hidden_size"), attention.heads)
        attention = replace(attention, qk_norm_parameters=4 * per_head)
    activation = reader.activation("hidden_act", "gelu_new")
    mlp = Mlp(ffn=reader.size("intermediate_size"), gated=False, bias=True, activation=activation)
    layers = reader.layers("num_hidden_layers")
    block = Block(count=layers, attention=attention, mlp=mlp, norms=1, parallel_residual=True)
    return ModelSpec(
        name=name,
        source=reader.source,
        family="phi",
        hidden=reader.size("hidden_size"),
        vocab=reader.size("vocab_size"),
        blocks=(block,),
        positions="rotary",
        max_positions=reader.size("max_position_embeddings", 2048),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        norm="layernorm",
        norm_bias=True,
        head_bias=True,
        embedding_dropout=reader.probability("embd_pdrop", 0.0),
        residual_dropout=reader.probability("resid_pdrop", 0.0),
    )


def read_starcoder2(reader: Reader, name: str) -> ModelSpec:
    bias = reader.flag("use_bias", True)
    window = reader.optional_size("sliding_window", None)
    attention = replace(_grouped(reader, kv_heads=2, bias=bias), window=window)
    activation = reader.activation("hidden_act", "gelu_pytorch_tanh")
    mlp = Mlp(ffn=reader.size("intermediate_size"), gated=False, bias=bias, activation=activation)
    layers = reader.layers("num_hidden_layers")
    return ModelSpec(
        name=name,
        source=reader.source,
        family="starcoder2",
        hidden=reader.size("hidden_size"),
        vocab=reader.size("vocab_size"),
        blocks=(Block(count=layers, attention=attention, mlp=mlp),),
        positions="rotary",
        max_positions=reader.size("max_position_embeddings", 4096),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm="layernorm",
        norm_bias=True,
        embedding_dropout=reader.probability("embedding_dropout", 0.0),
        residual_dropout=reader.probability("residual_dropout", 0.0),
    )


FAMILIES = {
    "gpt2": Family(read=read_gpt2, aliases=GPT2_ALIASES),
    "gpt_neox": Family(read=read_gpt_neox),
    "gptj": Family(read=read_gptj, aliases=GPT2_ALIASES),
    "phi": Family(read=read_phi),
    "starcoder2": Family(read=read_starcoder2),
}

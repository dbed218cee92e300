"""OPT, BLOOM, MPT and Falcon: the open models of 2022 and 2023 that vary the GPT shape.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import Family, head_width, kv_heads_of
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec

OPT_POSITION_OFFSET = 2
"""Rows of OPT's position table before position 0."""


def read_opt(reader: Reader, name: str) -> ModelSpec:
    """With word_embed_proj_dim (350M): a narrower token table, projected in and out."""
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    width = reader.optional_size("word_embed_proj_dim", None) or hidden
    positions = reader.size("max_position_embeddings", 2048)
    bias = reader.flag("enable_bias", True)
    affine = reader.flag("layer_norm_elementwise_affine", True)
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads),
        qkv_bias=bias,
        out_bias=bias,
        dropout=reader.probability("attention_dropout", 0.0),
    )
    activation = reader.activation("activation_function", "relu")
    mlp = Mlp(ffn=reader.size("ffn_dim"), gated=False, bias=bias, activation=activation)
    removed = reader.flag("_remove_final_layer_norm", False)
    projection = width * hidden if width != hidden else 0
    return ModelSpec(
        name=name,
        source=reader.source,
        family="opt",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(Block(count=reader.layers("num_hidden_layers"), attention=attention, mlp=mlp),),
        positions="learned",
        max_positions=positions,
        learned_positions=positions + OPT_POSITION_OFFSET,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm="layernorm",
        norm_weight=affine,
        norm_bias=affine,
        final_norm=reader.flag("do_layer_norm_before", True) and not removed,
        residual_dropout=reader.probability("dropout", 0.1),
        embedding_width=width,
        extra_parameters=projection,
        final_extra_parameters=projection,
    )


def read_bloom(reader: Reader, name: str) -> ModelSpec:
    """A LayerNorm over the embedding; the MLP is always four times as wide as the model."""
    hidden = reader.size("hidden_size")
    heads = reader.size("n_head")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads, heads_key="n_head"),
        qkv_bias=True,
        out_bias=True,
        dropout=reader.probability("attention_dropout", 0.0),
        fused_qkv=True,
    )
    mlp = Mlp(ffn=4 * hidden, gated=False, bias=True, activation="bloom_gelu")
    return ModelSpec(
        name=name,
        source=reader.source,
        family="bloom",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(Block(count=reader.layers("n_layer"), attention=attention, mlp=mlp),),
        positions="alibi",
        max_positions=0,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm="layernorm",
        norm_bias=True,
        residual_dropout=reader.probability("hidden_dropout", 0.0),
        extra_parameters=2 * hidden,
    )


def read_mpt(reader: Reader, name: str) -> ModelSpec:
    """As transformers builds it: never a bias, always alibi, one dropout for all."""
    attn = reader.nested("attn_config")
    kind = attn.text("attn_type", "multihead_attention")
    if kind != "multihead_attention":
        attn.refuse("attn_type", f"{kind!r} is not what transformers' MPT has")
    if attn.flag("qk_ln", False):
        attn.refuse("qk_ln", "is true, which transformers' MPT does not have")
    dropout = attn.probability("attn_pdrop", 0.0)
    hidden = reader.size("d_model")
    heads = reader.size("n_heads")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads, heads_key="n_heads", hidden_key="d_model"),
        dropout=dropout,
        fused_qkv=True,
    )
    ratio = reader.size("expansion_ratio", 4)
    if ratio != 4:
        reader.refuse("expansion_ratio", f"is {ratio}, but transformers' MPT always takes 4")
    mlp = Mlp(ffn=ratio * hidden, gated=False, activation="gelu")
    return ModelSpec(
        name=name,
        source=reader.source,
        family="mpt",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(Block(count=reader.layers("n_layers"), attention=attention, mlp=mlp),),
        positions="alibi",
        max_positions=reader.size("max_seq_len", 2048),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm="layernorm",
        residual_dropout=dropout,
    )


def _falcon_kv_heads(reader: Reader, heads: int, *, new: bool) -> int:
    """The new architecture groups; the old has one kv head, or as many as heads."""
    if new:
        return kv_heads_of(reader, heads, None, key="num_kv_heads")
    if reader.flag("multi_query", True):
        return 1
    kv_heads = reader.optional_size("num_kv_heads", heads)
    if kv_heads not in (None, heads):
        reader.refuse(
            "num_kv_heads",
            f"is {kv_heads}, but multi_query and new_decoder_architecture are both false",
            why=f"each of the {heads} heads then has its own k and v",
        )
    return heads


def read_falcon(reader: Reader, name: str) -> ModelSpec:
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    new = reader.flag("new_decoder_architecture", False)
    parallel = reader.flag("parallel_attn", True)
    in_parallel = reader.optional_size("num_ln_in_parallel_attn", None) or (2 if new else 1)
    bias = reader.flag("bias", False)
    attention = Attention(
        heads=heads,
        kv_heads=_falcon_kv_heads(reader, heads, new=new),
        head_dim=head_width(reader, hidden, heads),
        qkv_bias=bias,
        out_bias=bias,
        dropout=reader.probability("attention_dropout", 0.0),
        fused_qkv=True,
    )
    ffn = reader.optional_size("ffn_hidden_size", None) or 4 * hidden
    mlp = Mlp(ffn=ffn, gated=False, bias=bias, activation=reader.text("activation", "gelu"))
    block = Block(
        count=reader.layers("num_hidden_layers"),
        attention=attention,
        mlp=mlp,
        norms=2 if in_parallel == 2 or not parallel else 1,
        parallel_residual=parallel or new,
    )
    return ModelSpec(
        name=name,
        source=reader.source,
        family="falcon",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(block,),
        positions="alibi" if reader.flag("alibi", False) else "rotary",
        max_positions=reader.size("max_position_embeddings", 2048),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm="layernorm",
        norm_bias=True,
        residual_dropout=reader.probability("hidden_dropout", 0.0),
    )


FAMILIES = {
    "bloom": Family(
        read=read_bloom,
        aliases={
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "hidden_size": "n_embed",
        },
    ),
    "falcon": Family(read=read_falcon, aliases={"hidden_size": "n_embed"}),
    "mpt": Family(
        read=read_mpt,
        aliases={
            "d_model": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_layers": "num_hidden_layers",
        },
    ),
    "opt": Family(read=read_opt),
}

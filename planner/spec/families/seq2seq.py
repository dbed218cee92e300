"""Encoder-decoders: T5, mT5, BART.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import Family, head_width
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec

BART_POSITION_OFFSET = 2
"""Rows of BART's position tables before position 0."""


def _t5_mlp(reader: Reader, *, feed_forward: str, dropout: float) -> Mlp:
    kind = reader.text("feed_forward_proj", feed_forward)
    gated, _, activation = kind.rpartition("-")
    if gated not in ("", "gated"):
        reader.refuse("feed_forward_proj", f"is {kind!r}, expected NAME or gated-NAME")
    return Mlp(
        ffn=reader.size("d_ff"),
        gated=bool(gated),
        activation="gelu_new" if kind == "gated-gelu" else activation,
        dropout=dropout,
    )


def _t5_stack(block: Block, table: int) -> Iterator[Block]:
    """The first block of a stack holds the table of relative positions for all of them."""
    first = replace(block.attention, extra_parameters=table)
    yield replace(block, count=1, attention=first)
    if block.count > 1:
        yield replace(block, count=block.count - 1)


def _read_t5(reader: Reader, name: str, *, feed_forward: str) -> ModelSpec:
    """transformers 5 ties the head whatever tie_word_embeddings says."""
    hidden = reader.size("d_model")
    heads = reader.size("num_heads")
    dropout = reader.probability("dropout_rate", 0.1)
    mlp = _t5_mlp(reader, feed_forward=feed_forward, dropout=dropout)
    table = reader.size("relative_attention_num_buckets", 32) * heads
    attention = Attention(
        heads=heads, kv_heads=heads, head_dim=reader.size("d_kv", 64), dropout=dropout
    )
    both = replace(attention, causal=False)
    layers = reader.layers("num_layers")
    encoder = Block(count=layers, attention=both, mlp=mlp, stack="encoder")
    decoder = Block(
        count=reader.optional_size("num_decoder_layers", None) or layers,
        attention=attention,
        mlp=mlp,
        norms=3,
        cross_attention=both,
    )
    return ModelSpec(
        name=name,
        source=reader.source,
        family=reader.text("model_type", ""),
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(*_t5_stack(encoder, table), *_t5_stack(decoder, table)),
        positions="relative",
        max_positions=0,
        tie_embeddings=True,
        embedding_dropout=dropout,
        residual_dropout=dropout,
        final_extra_parameters=hidden,
    )


def read_t5(reader: Reader, name: str) -> ModelSpec:
    return _read_t5(reader, name, feed_forward="relu")


def read_mt5(reader: Reader, name: str) -> ModelSpec:
    return _read_t5(reader, name, feed_forward="gated-gelu")


def _bart_block(reader: Reader, hidden: int, stack: Literal["encoder", "decoder"]) -> Block:
    heads_key = f"{stack}_attention_heads"
    heads = reader.size(heads_key)
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads, heads_key=heads_key, hidden_key="d_model"),
        qkv_bias=True,
        out_bias=True,
        causal=stack == "decoder",
        dropout=reader.probability("attention_dropout", 0.0),
    )
    mlp = Mlp(
        ffn=reader.size(f"{stack}_ffn_dim"),
        gated=False,
        bias=True,
        activation=reader.activation("activation_function", "gelu"),
        dropout=reader.probability("activation_dropout", 0.0),
    )
    decoder = stack == "decoder"
    return Block(
        count=reader.layers(f"{stack}_layers"),
        attention=attention,
        mlp=mlp,
        norms=3 if decoder else 2,
        stack=stack,
        cross_attention=replace(attention, causal=False) if decoder else None,
    )


def read_bart(reader: Reader, name: str) -> ModelSpec:
    """Two position tables; a norm over each stack's embedding and, being post-norm, none last."""
    hidden = reader.size("d_model")
    positions = reader.size("max_position_embeddings", 1024)
    if not reader.flag("tie_word_embeddings", True):
        reader.refuse("tie_word_embeddings", "is false; BART is known with one tied table only")
    dropout = reader.probability("dropout", 0.1)
    return ModelSpec(
        name=name,
        source=reader.source,
        family="bart",
        hidden=hidden,
        vocab=reader.size("vocab_size"),
        blocks=(
            _bart_block(reader, hidden, "encoder"),
            _bart_block(reader, hidden, "decoder"),
        ),
        positions="learned",
        max_positions=positions,
        learned_positions=2 * (positions + BART_POSITION_OFFSET),
        tie_embeddings=True,
        norm="layernorm",
        norm_bias=True,
        final_norm=False,
        embedding_dropout=dropout,
        residual_dropout=dropout,
        extra_parameters=4 * hidden,
    )


T5_ALIASES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "d_kv": "head_dim",
}

FAMILIES = {
    "bart": Family(
        read=read_bart,
        module="AutoModelForSeq2SeqLM",
        aliases={
            "d_model": "hidden_size",
            "encoder_attention_heads": "num_attention_heads",
            "encoder_layers": "num_hidden_layers",
        },
    ),
    "mt5": Family(read=read_mt5, module="AutoModelForSeq2SeqLM", aliases=T5_ALIASES),
    "t5": Family(read=read_t5, module="AutoModelForSeq2SeqLM", aliases=T5_ALIASES),
}

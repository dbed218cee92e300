"""Encoders with a masked-LM head: BERT, RoBERTa, ELECTRA, DeBERTa-v2.

Defaults are those of the config classes of transformers; a test compares them.
"""

from __future__ import annotations

from dataclasses import replace

from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.families.shared import Family, head_width
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec


def _refuse_decoder(reader: Reader) -> None:
    for key in ("is_decoder", "add_cross_attention"):
        if reader.flag(key, False):
            reader.refuse(key, "is true, but this family is known as an encoder only")
    positions = reader.config.get("position_embedding_type")
    if positions not in (None, "absolute"):
        reader.refuse("position_embedding_type", f"{positions!r} is not what transformers 5 has")


def _encoder_block(reader: Reader, hidden: int) -> Block:
    heads = reader.size("num_attention_heads")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_width(reader, hidden, heads),
        qkv_bias=True,
        out_bias=True,
        causal=False,
        dropout=reader.probability("attention_probs_dropout_prob", 0.1),
    )
    mlp = Mlp(
        ffn=reader.size("intermediate_size"),
        gated=False,
        bias=True,
        activation=reader.activation("hidden_act", "gelu"),
    )
    layers = reader.layers("num_hidden_layers")
    return Block(count=layers, attention=attention, mlp=mlp, stack="encoder")


def _encoder(reader: Reader, name: str, *, width: int, types: int) -> ModelSpec:
    """`width`: that of the tables, of the norm over their sum and of what the head reads.

    `types`: default of type_vocab_size. Post-norm, so no final norm; the head transforms first:
    a dense layer and a norm, both with bias. Untied, the head has a second bias.
    """
    hidden = reader.size("hidden_size")
    vocab = reader.size("vocab_size")
    positions = reader.size("max_position_embeddings", 512)
    dropout = reader.probability("hidden_dropout_prob", 0.1)
    tied = reader.flag("tie_word_embeddings", True)
    return ModelSpec(
        name=name,
        source=reader.source,
        family=reader.text("model_type", ""),
        hidden=hidden,
        vocab=vocab,
        blocks=(_encoder_block(reader, hidden),),
        positions="learned",
        max_positions=positions,
        learned_positions=positions,
        tie_embeddings=tied,
        norm="layernorm",
        norm_bias=True,
        final_norm=False,
        head_bias=True,
        embedding_dropout=dropout,
        residual_dropout=dropout,
        embedding_width=width,
        position_width=width,
        extra_parameters=width * reader.size("type_vocab_size", types, at_least=0) + 2 * width,
        final_extra_parameters=hidden * width + 3 * width + (0 if tied else vocab),
    )


def read_bert(reader: Reader, name: str) -> ModelSpec:
    _refuse_decoder(reader)
    return _encoder(reader, name, width=reader.size("hidden_size"), types=2)


def read_electra(reader: Reader, name: str) -> ModelSpec:
    """The generator: tables of embedding_size, projected to hidden_size where they differ."""
    _refuse_decoder(reader)
    hidden = reader.size("hidden_size")
    width = reader.size("embedding_size", 128)
    spec = _encoder(reader, name, width=width, types=2)
    projection = (width + 1) * hidden if width != hidden else 0
    untied_bias = 0 if spec.tie_embeddings else spec.vocab
    return replace(
        spec,
        extra_parameters=spec.extra_parameters + projection,
        final_extra_parameters=spec.final_extra_parameters - untied_bias,
    )


def _relative_parameters(reader: Reader, spec: ModelSpec) -> tuple[int, int]:
    """(of the model, of one block): the table of relative positions, its norm, the projections.

    arXiv:2006.03654, section 3.1: content-to-position and position-to-content terms.
    """
    terms = reader.config.get("pos_att_type") or []
    terms = [t.strip() for t in terms.lower().split("|")] if isinstance(terms, str) else terms
    if not isinstance(terms, list) or any(t not in ("c2p", "p2c") for t in terms):
        reader.refuse("pos_att_type", f"is {terms!r}, expected a list of c2p and p2c")
    normed = "layer_norm" in reader.text("norm_rel_ebd", "none").lower().split("|")
    norm = 2 * spec.hidden if normed else 0
    if not reader.flag("relative_attention", False):
        return norm, 0
    reach = reader.integer("max_relative_positions", -1)
    buckets = reader.integer("position_buckets", -1)
    rows = 2 * (buckets if buckets > 0 else reach if reach > 0 else spec.max_positions)
    shared = reader.flag("share_att_key", False)
    projections = 0 if shared else len(set(terms)) * (spec.hidden + 1) * spec.hidden
    return rows * spec.hidden + norm, projections


def read_deberta_v2(reader: Reader, name: str) -> ModelSpec:
    """DeBERTa v2 and v3: positions in the attention; the first version is another family."""
    hidden = reader.size("hidden_size")
    width = reader.size("embedding_size", hidden)
    spec = _encoder(reader, name, width=width, types=0)
    absolute = reader.flag("position_biased_input", True)
    model, one = _relative_parameters(reader, spec)
    kernel = reader.size("conv_kernel_size", 0, at_least=0)
    groups = reader.size("conv_groups", 1)
    if hidden % groups:
        reader.refuse("conv_groups", f"{groups} groups do not divide hidden_size {hidden}")
    convolution = hidden * (hidden // groups) * kernel + 3 * hidden if kernel else 0
    tables = width * reader.size("type_vocab_size", 0, at_least=0)
    projection = width * hidden if width != hidden else 0
    legacy = reader.flag("legacy", True)
    final = spec.final_extra_parameters
    if not legacy:
        final = (hidden + 3) * hidden
    block = spec.blocks[0]
    attention = replace(block.attention, extra_parameters=one)
    return replace(
        spec,
        blocks=(replace(block, attention=attention),),
        positions="learned" if absolute else "relative",
        learned_positions=spec.max_positions if absolute else 0,
        tie_embeddings=spec.tie_embeddings or not legacy,
        extra_parameters=tables + projection + 2 * hidden + model + convolution,
        final_extra_parameters=final,
    )


FAMILIES = {
    "bert": Family(read=read_bert, module="AutoModelForMaskedLM"),
    "deberta-v2": Family(read=read_deberta_v2, module="AutoModelForMaskedLM"),
    "electra": Family(read=read_electra, module="AutoModelForMaskedLM"),
    "roberta": Family(read=read_bert, module="AutoModelForMaskedLM"),
    "xlm-roberta": Family(read=read_bert, module="AutoModelForMaskedLM"),
}

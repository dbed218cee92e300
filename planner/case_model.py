"""The model of one row of a cases file: sizes from its columns, and defaults for what it leaves out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from outlay.planner.estimate.software import Software
from outlay.planner.spec.families import preset_names, resolve_model
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec
from outlay.planner.spec.strategy import MOST
from outlay.profiles.errors import UsageError

VOCAB = {"llama": 32000, "moe": 32000, "bert": 30528, "t5": 32128}
"""By architecture where a row says nothing: the original tokenizers' sizes; else GPT-2's, padded."""
GPT_VOCAB = 51200
LONG_SEQ_LEN, LONG_VOCAB = 8192, 128256
"""Grouped-query attention and so long a context came together with vocabularies of Llama 3's size."""
HEAD_DIM = 128
"""Where the heads are not given: the width that most models since GPT-3 have."""
LATENT = {"q_rank": 1536, "kv_rank": 512, "rope_head_dim": 64}
"""Latent attention whose sizes a row does not give: DeepSeek-V3's (arXiv 2412.19437, section 4.2)."""
LATENT_HEAD_DIM, LATENT_VALUE_DIM = 192, 128
_FACT = re.compile(r"\b(seq_parallel|swiglu|mla|untied|method) *= *(\w+)")


def number(row: Mapping[str, str], key: str) -> float | None:
    text = (row.get(key) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{key}: {text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{key}: {text} makes no sense")
    return value


def count(row: Mapping[str, str], key: str, default: int | None = None) -> int | None:
    value = number(row, key)
    if value is None:
        return default
    if value > MOST:
        raise UsageError(f"{key}: {value:g} is more than the largest that makes sense, {MOST:,}")
    if value != int(value) or value < 1:
        raise UsageError(f"{key}: {value:g} is not a positive whole number")
    return int(value)


def facts_of(row: Mapping[str, str]) -> dict[str, str]:
    """What has no column and is stated in `notes` as `key=value`: seq_parallel, swiglu, mla, untied,
    method (of fine-tuning)."""
    return {key: value.lower() for key, value in _FACT.findall(row.get("notes") or "")}


def _is_llama_like(arch: str, facts: Mapping[str, str]) -> bool:
    """Gated MLP, RMSNorm, rotary, no biases, no dropout; else GPT-2's style."""
    return facts["swiglu"] == "true" if "swiglu" in facts else arch in ("llama", "moe")


def _attention_of(
    row: Mapping[str, str], facts: Mapping[str, str], hidden: int, arch: str, software: Software
) -> Attention:
    tp = count(row, "tp", 1) or 1
    heads = count(row, "heads") or _heads(hidden, tp)
    kv_heads = count(row, "kv_heads") or heads
    mixture = bool(count(row, "experts", 0))
    if hidden % heads and not mixture:
        raise UsageError(f"heads {heads} do not divide hidden {hidden}")
    gated = _is_llama_like(arch, facts)
    # Mixtures of experts with a k and v for each of 64 or more heads are DeepSeek-V2's descendants.
    latent = facts.get("mla") == "true" or (
        mixture and heads == count(row, "kv_heads") and heads >= 64
    )
    width = max(hidden // heads, HEAD_DIM) if mixture else hidden // heads
    return Attention(
        heads=heads, kv_heads=heads if latent else kv_heads,
        head_dim=LATENT_HEAD_DIM if latent else width,
        value_head_dim=LATENT_VALUE_DIM if latent else None,
        qkv_bias=not gated, out_bias=not gated, causal=arch != "bert",
        dropout=0.1 if software.dropout and not gated else 0.0,
        fused_qkv=software.family == "single" or "litgpt" in (row.get("framework") or ""),
        **(LATENT if latent else {}),
    )  # fmt: skip


def _heads(hidden: int, tp: int) -> int:
    """Heads of a row that gives none: they divide hidden, tp divides them, each is about HEAD_DIM wide."""
    possible = [hidden // d for d in range(32, 513) if hidden % (d * tp) == 0]
    return min(possible or [1], key=lambda n: abs(math.log(hidden / n / HEAD_DIM)))


def _vocab(row: Mapping[str, str], arch: str, gated: bool) -> int:
    """The vocabulary of a row that gives none."""
    heads, kv_heads, seq_len = (count(row, k) or 0 for k in ("heads", "kv_heads", "seq_len"))
    if arch == "gpt" and 0 < kv_heads < heads and seq_len >= LONG_SEQ_LEN:
        return LONG_VOCAB
    return GPT_VOCAB if arch == "moe" and not gated else VOCAB.get(arch, GPT_VOCAB)


def case_spec(row: Mapping[str, str], software: Software) -> ModelSpec:
    """Sizes from the columns; a row without them may name a preset."""
    name = (row.get("model") or "").strip()
    layers, hidden = count(row, "layers"), count(row, "hidden")
    parameters = number(row, "n_params")
    arch = (row.get("arch") or "gpt").strip()
    if hidden is None:
        if name.lower() in preset_names():
            return resolve_model(name.lower())[0]
        raise UsageError(f"the row gives no hidden size, and {name!r} is no preset")
    facts = facts_of(row)
    gated = _is_llama_like(arch, facts)
    litgpt = "litgpt" in (row.get("framework") or "")
    experts = count(row, "experts", 0) or 0
    ffn = count(row, "ffn") or (4 * hidden if not gated else -(-8 * hidden // 3 // 256) * 256)
    vocab = count(row, "vocab") or _vocab(row, arch, gated)
    attention = _attention_of(row, facts, hidden, arch, software)
    top_k = count(row, "top_k", 1) or 1
    mlp = Mlp(
        ffn=ffn, gated=gated, bias=not gated, activation="silu" if gated else "gelu",
        experts=experts, top_k=min(top_k, experts) if experts else 0,
        router_parameters=hidden * experts, shared_ffn=ffn if experts and attention.kv_rank else 0,
    )  # fmt: skip
    untied = facts["untied"] == "true" if "untied" in facts else gated or litgpt
    if layers is None:
        if parameters is None:
            raise UsageError("the row gives neither layers nor n_params")
        pp = count(row, "pp", 1) or 1
        tables = vocab * hidden * (1 + untied)
        layers = _layers_from_parameters(parameters - tables, hidden, attention, mlp, pp)
    seq_len = count(row, "seq_len", 2048) or 2048
    blocks: tuple[Block, ...] = (Block(count=layers, attention=attention, mlp=mlp),)
    if arch == "t5":
        blocks = _two_stacks(blocks[0], parameters, hidden, vocab, stated="swiglu" in facts)
    rotary = gated or litgpt
    return ModelSpec(
        name=name or "case", source="cases", family=arch, hidden=hidden, vocab=vocab, blocks=blocks,
        positions="rotary" if rotary else "learned", max_positions=seq_len,
        learned_positions=0 if rotary else seq_len, tie_embeddings=not untied,
        norm="rmsnorm" if gated else "layernorm", norm_bias=not gated,
        residual_dropout=attention.dropout, embedding_dropout=attention.dropout,
    )  # fmt: skip


def _two_stacks(
    block: Block, parameters: float | None, hidden: int, vocab: int, *, stated: bool
) -> tuple[Block, ...]:
    """Encoder and decoder of `layers` blocks each, or of half of them where the stated size says that
    both stacks were counted; with a gated MLP where the stated size says so and the row does not.

    The first T5 had a plain MLP (arXiv 1910.10683), those since have a gated one of the same width
    (arXiv 2002.05202), half as large again.
    """

    def stacks(depth: int, gated: bool) -> tuple[Block, ...]:
        mlp = replace(block.mlp, gated=gated)
        whole = replace(block.attention, causal=False)
        encoder = replace(block, count=depth, stack="encoder", attention=whole, mlp=mlp)
        return encoder, replace(block, count=depth, norms=3, cross_attention=whole, mlp=mlp)

    def weights(depth: int, gated: bool) -> float:
        a, matrices = block.attention, 2 * (3 if gated else 2)
        attention = 3 * (a.q_width + a.k_width + a.v_width + a.out_width)
        return depth * hidden * (attention + matrices * block.mlp.ffn) + vocab * hidden

    if parameters is None:
        return stacks(block.count, block.mlp.gated)
    depths = (block.count, block.count // 2) if block.count > 1 else (block.count,)
    gates = (block.mlp.gated,) if stated else (False, True)
    depth, gated = min(product(depths, gates), key=lambda x: abs(weights(*x) - parameters))
    return stacks(depth, gated)


def _layers_from_parameters(inside: float, hidden: int, a: Attention, m: Mlp, pp: int) -> int:
    """Depth that gives about `inside` weights in all blocks, a multiple of pp."""
    up = 3 if m.gated else 2
    block = hidden * (a.q_width + a.k_width + a.v_width + a.out_width)
    block += up * hidden * m.ffn * max(1, m.experts)
    return max(1, round(inside / block / pp)) * pp

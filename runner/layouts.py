"""Where the parts of a transformers decoder are: what a pipeline cuts, by transformers' model_type."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a decoder's parts in its transformers module, in the order in which they run."""

    embedding: str
    project_in: str | None = None
    """From the width of the embedding to the width of the blocks, where they differ."""
    positions: str | None = None
    """Table of learned positions."""
    dropout: str | None = None
    """Module between embedding and first block."""
    dropout_key: str | None = None
    """Or the config key of a dropout there that is no module."""
    multiplier_key: str | None = None
    """Config key of the factor on the embedded tokens."""
    blocks: str
    norm: str
    project_out: str | None = None
    head: str = "lm_head"
    rotary: str | None = None


_LLAMA = Layout(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    rotary="model.rotary_emb",
)
LAYOUTS = {
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Layout(
        embedding="transformer.wte",
        positions="transformer.wpe",
        dropout="transformer.drop",
        blocks="transformer.h",
        norm="transformer.ln_f",
    ),
    "gpt_neox": Layout(
        embedding="gpt_neox.embed_in",
        dropout="gpt_neox.emb_dropout",
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
    ),
    "granite": replace(_LLAMA, multiplier_key="embedding_multiplier"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "opt": Layout(
        embedding="model.decoder.embed_tokens",
        project_in="model.decoder.project_in",
        positions="model.decoder.embed_positions",
        blocks="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        project_out="model.decoder.project_out",
    ),
    "phi": replace(_LLAMA, dropout="model.embed_dropout", norm="model.final_layernorm"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": replace(_LLAMA, dropout_key="embedding_dropout"),
}
"""By transformers' model_type."""

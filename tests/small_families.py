"""Small models of every family that the runner cuts into stages or puts adapters into."""

from __future__ import annotations

import dataclasses
from typing import Any

import ranks as r

PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32},
    "gemma": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "mixtral": {},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8, "pad_token_id": 0},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "olmo": {},
    "olmo2": {},
    "phi": {},
    "phi3": {"pad_token_id": 0, "sliding_window": 8},
    "smollm3": {"pad_token_id": 0},
    "starcoder2": {"sliding_window": 8, "embedding_dropout": 0.0},
}
"""What shows the family's peculiarities, over the small Llama or the family's own small config."""


def plan_of(family: str, changes: dict[str, Any], **strategy: Any) -> Any:
    """A two-stage plan of a small model of the family."""
    # transformers has no sdpa form of Gemma 2's capped scores
    job = {"attention": "eager" if family == "gemma2" else "sdpa"}
    known = family if family in r.CONFIGS else "llama"
    plan = r.tiny_plan(known, dp=1, pp=2, job=job, **strategy)
    config = {**plan.model.config, **changes, "model_type": family}
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, config=config))

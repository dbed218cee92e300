"""Random valid configs of every family, small; each key that has a default may be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from outlay.planner.spec.families import FAMILIES

Config = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

YES_NO = st.booleans()


def maybe(draw: Draw, config: Config, key: str, values: st.SearchStrategy[Any]) -> None:
    """Set the key, or leave it to transformers' default."""
    if draw(YES_NO):
        config[key] = draw(values)


def llama_keys(draw: Draw, *, head_dim: bool = True, layers: int = 4) -> Config:
    heads = draw(st.sampled_from([2, 4, 6, 8]))
    width = draw(st.sampled_from([2, 4, 8]))
    config: Config = {
        "hidden_size": heads * width,
        "num_hidden_layers": draw(st.integers(1, layers)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4, 8) if heads % n == 0])),
        "intermediate_size": draw(st.integers(1, 40)),
        "vocab_size": draw(st.integers(5, 60)),
        "pad_token_id": 0,
    }
    if head_dim:
        maybe(draw, config, "head_dim", st.sampled_from([2, 4, 6, 16]))
    maybe(draw, config, "tie_word_embeddings", YES_NO)
    maybe(draw, config, "attention_dropout", st.sampled_from([0.0, 0.1]))
    return config


def llama(draw: Draw) -> Config:
    config = llama_keys(draw)
    maybe(draw, config, "attention_bias", YES_NO)
    maybe(draw, config, "mlp_bias", YES_NO)
    maybe(draw, config, "num_key_value_heads", st.none())
    return config


def mistral(draw: Draw) -> Config:
    config = llama_keys(draw)
    maybe(draw, config, "sliding_window", st.sampled_from([None, 16]))
    return config


def qwen2(draw: Draw) -> Config:
    config = llama_keys(draw)
    maybe(draw, config, "use_sliding_window", YES_NO)
    maybe(draw, config, "max_window_layers", st.integers(0, 4))
    return config


def qwen3(draw: Draw) -> Config:
    config = qwen2(draw)
    maybe(draw, config, "attention_bias", YES_NO)
    return config


def smollm3(draw: Draw) -> Config:
    config = llama(draw)
    maybe(draw, config, "use_sliding_window", YES_NO)
    maybe(draw, config, "sliding_window", st.sampled_from([None, 16]))
    return config


def plain_bias(draw: Draw) -> Config:
    config = llama_keys(draw)
    maybe(draw, config, "attention_bias", YES_NO)
    return config


def phi3(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    maybe(draw, config, "sliding_window", st.sampled_from([None, 16]))
    maybe(draw, config, "resid_pdrop", st.just(0.1))
    return config


def gemma3(draw: Draw) -> Config:
    config = plain_bias(draw)
    maybe(draw, config, "sliding_window_pattern", st.integers(1, 4))
    maybe(draw, config, "use_bidirectional_attention", st.sampled_from([True, False, None]))
    return config


def cohere(draw: Draw) -> Config:
    config = plain_bias(draw)
    maybe(draw, config, "use_qk_norm", YES_NO)
    return config


def cohere2(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    maybe(draw, config, "attention_bias", YES_NO)
    maybe(draw, config, "sliding_window_pattern", st.integers(1, 4))
    return config


def gpt2(draw: Draw) -> Config:
    config = gptj(draw)
    maybe(draw, config, "n_positions", st.integers(1, 40))
    return config


def gptj(draw: Draw) -> Config:
    heads = draw(st.integers(1, 4))
    config: Config = {
        "n_embd": heads * draw(st.sampled_from([2, 4])),
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(5, 60)),
        "rotary_dim": 2,
    }
    maybe(draw, config, "n_inner", st.one_of(st.none(), st.integers(1, 40)))
    maybe(draw, config, "tie_word_embeddings", YES_NO)
    maybe(draw, config, "attn_pdrop", st.just(0.2))
    maybe(draw, config, "resid_pdrop", st.just(0.2))
    return config


def gpt_neox(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    del config["num_key_value_heads"]
    maybe(draw, config, "attention_bias", YES_NO)
    maybe(draw, config, "use_parallel_residual", YES_NO)
    return config


def phi(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    maybe(draw, config, "qk_layernorm", YES_NO)
    return config


def starcoder2(draw: Draw) -> Config:
    config = llama_keys(draw)
    maybe(draw, config, "use_bias", YES_NO)
    return config


def opt(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    del config["num_key_value_heads"]
    config["ffn_dim"] = config.pop("intermediate_size")
    maybe(draw, config, "word_embed_proj_dim", st.integers(1, 20))
    maybe(draw, config, "max_position_embeddings", st.integers(1, 40))
    for key in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        maybe(draw, config, key, YES_NO)
    maybe(draw, config, "_remove_final_layer_norm", YES_NO)
    return config


def bloom(draw: Draw) -> Config:
    heads = draw(st.integers(1, 4))
    config: Config = {
        "hidden_size": heads * draw(st.integers(1, 8)),
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(5, 60)),
    }
    maybe(draw, config, "tie_word_embeddings", YES_NO)
    maybe(draw, config, "hidden_dropout", st.just(0.1))
    return config


def mpt(draw: Draw) -> Config:
    heads = draw(st.integers(1, 4))
    config: Config = {
        "d_model": heads * draw(st.integers(1, 8)),
        "n_heads": heads,
        "n_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(5, 60)),
    }
    maybe(draw, config, "expansion_ratio", st.just(4))
    maybe(draw, config, "no_bias", YES_NO)
    maybe(draw, config, "attn_config", st.sampled_from([{}, {"attn_pdrop": 0}]))
    return config


def falcon(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    config["num_kv_heads"] = config.pop("num_key_value_heads")
    config["ffn_hidden_size"] = draw(st.sampled_from([None, 11]))
    del config["intermediate_size"]
    for key in ("multi_query", "parallel_attn", "new_decoder_architecture", "bias", "alibi"):
        maybe(draw, config, key, YES_NO)
    maybe(draw, config, "num_ln_in_parallel_attn", st.sampled_from([None, 1, 2]))
    if not config.get("new_decoder_architecture") and not config.get("multi_query", True):
        del config["num_kv_heads"]
    return config


def mixtral(draw: Draw) -> Config:
    config = llama_keys(draw)
    maybe(draw, config, "num_local_experts", st.integers(2, 6))
    return config


def qwen_moe(draw: Draw) -> Config:
    config = llama_keys(draw)
    config["num_experts"] = draw(st.integers(2, 6))
    config["num_experts_per_tok"] = draw(st.integers(1, config["num_experts"]))
    config["moe_intermediate_size"] = draw(st.integers(1, 20))
    maybe(draw, config, "decoder_sparse_step", st.integers(1, 3))
    maybe(draw, config, "mlp_only_layers", st.lists(st.integers(0, 3)))
    maybe(draw, config, "use_sliding_window", YES_NO)
    return config


def qwen2_moe(draw: Draw) -> Config:
    config = qwen_moe(draw)
    maybe(draw, config, "shared_expert_intermediate_size", st.integers(1, 20))
    maybe(draw, config, "qkv_bias", YES_NO)
    return config


def qwen3_moe(draw: Draw) -> Config:
    config = qwen_moe(draw)
    maybe(draw, config, "attention_bias", YES_NO)
    return config


def llama4_text(draw: Draw) -> Config:
    config = llama_keys(draw)
    config["num_local_experts"] = draw(st.integers(1, 6))
    config["intermediate_size_mlp"] = draw(st.integers(1, 40))
    maybe(draw, config, "interleave_moe_layer_step", st.integers(1, 3))
    maybe(draw, config, "moe_layers", st.lists(st.integers(0, 3)))
    maybe(draw, config, "attention_bias", YES_NO)
    maybe(draw, config, "use_qk_norm", YES_NO)
    return config


def gpt_oss(draw: Draw) -> Config:
    config = llama_keys(draw)
    config["num_local_experts"] = draw(st.integers(4, 6))
    maybe(draw, config, "attention_bias", YES_NO)
    return config


def deepseek_v2(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    config["num_key_value_heads"] = config["num_attention_heads"]
    config["n_routed_experts"] = draw(st.sampled_from([8, 16]))
    config["num_experts_per_tok"] = draw(st.integers(1, 4))
    config["moe_intermediate_size"] = draw(st.integers(1, 20))
    config["kv_lora_rank"] = draw(st.integers(1, 12))
    config["qk_rope_head_dim"] = draw(st.sampled_from([2, 4]))
    maybe(draw, config, "q_lora_rank", st.sampled_from([None, 6, 12]))
    maybe(draw, config, "qk_nope_head_dim", st.integers(1, 8))
    maybe(draw, config, "v_head_dim", st.integers(1, 8))
    maybe(draw, config, "n_shared_experts", st.integers(1, 3))
    maybe(draw, config, "first_k_dense_replace", st.integers(0, 4))
    maybe(draw, config, "attention_bias", YES_NO)
    return config


def bert(draw: Draw) -> Config:
    config = llama_keys(draw, head_dim=False)
    for key in ("num_key_value_heads", "attention_dropout"):
        config.pop(key, None)
    maybe(draw, config, "type_vocab_size", st.integers(1, 4))
    maybe(draw, config, "max_position_embeddings", st.integers(2, 40))
    return config


def electra(draw: Draw) -> Config:
    config = bert(draw)
    config["embedding_size"] = draw(st.sampled_from([config["hidden_size"], 6, 10]))
    return config


def deberta_v2(draw: Draw) -> Config:
    config = bert(draw)
    maybe(draw, config, "relative_attention", YES_NO)
    maybe(draw, config, "max_relative_positions", st.sampled_from([-1, 7]))
    maybe(draw, config, "position_buckets", st.sampled_from([-1, 5]))
    maybe(draw, config, "norm_rel_ebd", st.sampled_from(["none", "layer_norm"]))
    maybe(draw, config, "share_att_key", YES_NO)
    maybe(draw, config, "pos_att_type", st.sampled_from([["c2p", "p2c"], ["c2p"], "p2c|c2p", None]))
    maybe(draw, config, "position_biased_input", YES_NO)
    maybe(draw, config, "conv_kernel_size", st.sampled_from([0, 3]))
    maybe(draw, config, "conv_groups", st.sampled_from([1, 2]))
    maybe(draw, config, "embedding_size", st.integers(1, 20))
    maybe(draw, config, "legacy", YES_NO)
    return config


def t5(draw: Draw) -> Config:
    config: Config = {
        "d_model": draw(st.integers(1, 24)),
        "d_kv": draw(st.integers(1, 8)),
        "d_ff": draw(st.integers(1, 40)),
        "num_layers": draw(st.integers(1, 3)),
        "num_heads": draw(st.integers(1, 4)),
        "vocab_size": draw(st.integers(5, 60)),
    }
    maybe(draw, config, "num_decoder_layers", st.one_of(st.none(), st.integers(1, 3)))
    maybe(draw, config, "feed_forward_proj", st.sampled_from(["relu", "gated-gelu", "gated-silu"]))
    maybe(draw, config, "relative_attention_num_buckets", st.integers(1, 40))
    maybe(draw, config, "tie_word_embeddings", YES_NO)
    return config


def bart(draw: Draw) -> Config:
    config: Config = {
        "d_model": 12 * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(5, 60)),
    }
    for stack in ("encoder", "decoder"):
        config[f"{stack}_layers"] = draw(st.integers(1, 3))
        config[f"{stack}_ffn_dim"] = draw(st.integers(1, 40))
        config[f"{stack}_attention_heads"] = draw(st.sampled_from([1, 2, 3, 4]))
    maybe(draw, config, "max_position_embeddings", st.integers(2, 40))
    maybe(draw, config, "activation_dropout", st.just(0.1))
    return config


SHAPES: dict[str, Callable[[Draw], Config]] = {
    "bart": bart,
    "bert": bert,
    "bloom": bloom,
    "cohere": cohere,
    "cohere2": cohere2,
    "deberta-v2": deberta_v2,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v2,
    "electra": electra,
    "falcon": falcon,
    "gemma": plain_bias,
    "gemma2": plain_bias,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "gptj": gptj,
    "granite": llama,
    "llama": llama,
    "llama4_text": llama4_text,
    "mistral": mistral,
    "mixtral": mixtral,
    "mpt": mpt,
    "mt5": t5,
    "olmo": plain_bias,
    "olmo2": plain_bias,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "roberta": bert,
    "smollm3": smollm3,
    "starcoder2": starcoder2,
    "t5": t5,
    "xlm-roberta": bert,
}


def test_every_family_is_tested() -> None:
    assert sorted(SHAPES) == sorted(FAMILIES)

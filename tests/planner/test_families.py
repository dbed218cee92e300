"""Reading a transformers config: what is taken, what is refused and how it is said; presets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.families import (
    FAMILIES,
    preset_config,
    preset_names,
    resolve_model,
    spec_from_config,
)
from outlay.planner.spec.files import parse, to_json
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError, OutlayError, UnknownName

Config = dict[str, Any]

ONE_OF_EACH = {
    "bart": "bart-base",
    "bert": "bert-base-uncased",
    "bloom": "bloom-560m",
    "cohere": "command-r",
    "deberta-v2": "deberta-v3-base",
    "deepseek_v2": "deepseek-v2",
    "deepseek_v3": "deepseek-v3",
    "electra": "electra-base",
    "falcon": "falcon-40b",
    "gemma": "gemma-2b",
    "gemma2": "gemma-2-2b",
    "gemma3_text": "gemma-3-1b",
    "gpt2": "gpt2",
    "gpt_neox": "gpt-neox-20b",
    "gpt_oss": "gpt-oss-20b",
    "gptj": "gpt-j-6b",
    "granite": "granite-3.3-2b",
    "llama": "llama-3-8b",
    "llama4_text": "llama-4-maverick",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "mpt": "mpt-7b",
    "mt5": "mt5-base",
    "olmo": "olmo-1b",
    "olmo2": "olmo-2-7b",
    "opt": "opt-125m",
    "phi": "phi-2",
    "phi3": "phi-4",
    "qwen2": "qwen2.5-7b",
    "qwen2_moe": "qwen1.5-moe-a2.7b",
    "qwen3": "qwen3-4b",
    "qwen3_moe": "qwen3-30b-a3b",
    "roberta": "roberta-base",
    "smollm3": "smollm3-3b",
    "starcoder2": "starcoder2-3b",
    "t5": "t5-base",
    "xlm-roberta": "xlm-roberta-base",
}
LLAMA: Config = preset_config("llama-3-8b")[0]


def read(config: Config) -> ModelSpec:
    return spec_from_config(config, name="test", source="test")


def refused(tmp_path: Path, config: Config) -> str:
    """The message about a config.json, with the file's path cut off."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config, indent=2))
    with pytest.raises(FileError) as caught:
        resolve_model(str(path))
    return str(caught.value).replace(str(path), "config.json")


def changed(**keys: Any) -> Config:
    return {**LLAMA, **keys}


# What is read


def test_llama_3_8b() -> None:
    spec, _ = resolve_model("llama-3-8b")
    assert (spec.hidden, spec.layers, spec.vocab, spec.max_positions) == (4096, 32, 128256, 8192)
    assert spec.source == "preset llama-3-8b"
    attention = spec.blocks[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (32, 8, 128)
    assert not spec.tie_embeddings
    assert spec.norm == "rmsnorm"


def test_gemma_3_alternates_five_windows_and_one_full() -> None:
    spec, _ = resolve_model("gemma-3-27b")
    assert [(b.count, b.attention.window) for b in spec.blocks] == [(52, 1024), (10, None)]


def test_deepseek_v3_has_latent_attention_and_three_dense_layers() -> None:
    spec, _ = resolve_model("deepseek-v3")
    assert [(b.count, b.mlp.experts, b.mlp.top_k) for b in spec.blocks] == [(3, 0, 0), (58, 256, 8)]
    attention = spec.blocks[0].attention
    assert (attention.q_rank, attention.kv_rank, attention.rope_head_dim) == (1536, 512, 64)
    assert (attention.head_dim, attention.value_head_dim) == (192, 128)


def test_t5_is_two_stacks_with_cross_attention() -> None:
    spec, _ = resolve_model("t5-base")
    assert spec.encoder_decoder
    stacks = [(b.stack, b.count, b.cross_attention is not None) for b in spec.blocks]
    assert stacks == [
        ("encoder", 1, False),
        ("encoder", 11, False),
        ("decoder", 1, True),
        ("decoder", 11, True),
    ]
    assert not spec.blocks[0].attention.causal
    assert spec.blocks[2].attention.causal


def test_bert_sees_both_ways_and_drops_out() -> None:
    spec, _ = resolve_model("bert-base-uncased")
    assert not spec.blocks[0].attention.causal
    assert spec.blocks[0].attention.dropout == spec.residual_dropout == 0.1
    assert not spec.encoder_decoder


def test_a_second_name_that_transformers_accepts_is_read() -> None:
    config = preset_config("gpt2")[0]
    renamed = dict(config)
    renamed["hidden_size"] = renamed.pop("n_embd")
    renamed["num_hidden_layers"] = renamed.pop("n_layer")
    assert read(renamed) == read(config)


def test_null_and_missing_kv_heads_differ_where_transformers_says_so() -> None:
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    mistral = {**config, "model_type": "mistral"}
    assert read(mistral).blocks[0].attention.kv_heads == 8
    assert read({**mistral, "num_key_value_heads": None}).blocks[0].attention.kv_heads == 32
    assert read(config).blocks[0].attention.kv_heads == 32


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_a_spec_survives_a_file(family: str) -> None:
    spec, _ = resolve_model(ONE_OF_EACH[family])
    assert parse(ModelSpec, json.loads(to_json(spec)), path="plan.yaml") == spec


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_hidden_layers": 0},
            "num_hidden_layers: is 0, expected a whole number of at least 1",
        ),
        ({"num_hidden_layers": -3}, "num_hidden_layers: is -3, expected"),
        ({"num_hidden_layers": 10**6}, "more than the 10000 layers"),
        ({"hidden_size": "4096"}, "hidden_size: is '4096', expected a whole number"),
        ({"hidden_size": 4096.5}, "hidden_size: is 4096.5, expected a whole number"),
        ({"hidden_size": True}, "hidden_size: is True, expected a whole number"),
        ({"hidden_size": None}, "hidden_size: is null, expected a whole number"),
        ({"hidden_size": 10**30}, "more than the largest size 2147483647"),
        ({"vocab_size": 0}, "vocab_size: is 0, expected"),
        ({"intermediate_size": []}, "intermediate_size: is [], expected a whole number"),
        ({"num_attention_heads": 48}, "48 heads do not divide hidden_size 4096"),
        ({"num_key_value_heads": 5}, "5 kv heads do not divide 32 attention heads"),
        ({"num_key_value_heads": 64}, "64 kv heads do not divide 32 attention heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: is 0, expected"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: is 'yes', expected true or false"),
        ({"attention_dropout": 1.5}, "attention_dropout: is 1.5, expected a probability"),
        ({"hidden_act": 3}, "hidden_act: is 3, expected text"),
    ],
)
def test_a_nonsense_value_is_named_with_its_line(
    tmp_path: Path, keys: Config, message: str
) -> None:
    said = refused(tmp_path, changed(**keys))
    assert message in said
    key = next(iter(keys))
    line = 2 + list(LLAMA).index(key) if key in LLAMA else 2 + len(LLAMA)
    assert said.startswith(f"config.json:{line}: {key}: ")


@pytest.mark.parametrize(
    ("preset", "keys", "message"),
    [
        ("gpt2", {"hidden_size": 1024}, "hidden_size, its other name, is 1024"),
        ("gpt2", {"add_cross_attention": True}, "attends to an encoder"),
        ("gemma-3-1b", {"layer_types": ["full_attention"]}, "has 1 entries for 26 layers"),
        ("gemma-3-1b", {"layer_types": ["odd"] * 26}, "'odd' is not one of full_attention"),
        ("gemma-3-1b", {"sliding_window": None}, "is null, but layer_types has sliding_attention"),
        ("qwen2.5-7b", {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "is 9, but there are 8 experts"),
        ("mpt-7b", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type"),
        ("mpt-7b", {"expansion_ratio": 2}, "always takes 4"),
        ("falcon-7b", {"multi_query": False, "num_kv_heads": 7}, "are both false"),
        ("bert-base-uncased", {"is_decoder": True}, "known as an encoder only"),
        ("deberta-v3-base", {"pos_att_type": ["c2p", ["p2c"]]}, "expected a list of c2p and p2c"),
        ("t5-base", {"feed_forward_proj": "half-gelu"}, "expected NAME or gated-NAME"),
        ("bart-base", {"tie_word_embeddings": False}, "one tied table only"),
        ("llama-4-scout", {"no_rope_layers": [1, 0]}, "has 2 entries for 48 layers"),
        ("deepseek-v2", {"num_experts_per_tok": None}, "num_experts_per_tok: is null"),
    ],
)
def test_a_contradiction_is_refused(
    tmp_path: Path, preset: str, keys: Config, message: str
) -> None:
    said = refused(tmp_path, {**preset_config(preset)[0], **keys})
    assert message in said
    assert re.match(r"config\.json:\d+: ", said)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_asked_for(tmp_path: Path, key: str) -> None:
    said = refused(tmp_path, {k: v for k, v in LLAMA.items() if k != key})
    assert said.startswith(f"config.json: {key}: is missing")
    assert "pass the complete config.json" in said


def test_the_other_name_of_a_missing_size_is_said(tmp_path: Path) -> None:
    config = preset_config("gpt2")[0]
    said = refused(tmp_path, {k: v for k, v in config.items() if k != "n_embd"})
    assert "n_embd (or hidden_size): is missing" in said


def test_the_other_name_of_a_bad_size_is_said_where_the_config_uses_it(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "hidden_size": -1, **preset_config("gpt2")[0]}
    del config["n_embd"]
    assert refused(tmp_path, config).startswith("config.json:3: hidden_size: is -1, expected")


def test_an_unknown_family_is_told_which_work(tmp_path: Path) -> None:
    said = refused(tmp_path, changed(model_type="mamba"))
    assert said.startswith("config.json:2: model_type: 'mamba' is not known in closed form")
    assert all(family in said for family in FAMILIES)


def test_a_missing_family_is_told_which_work(tmp_path: Path) -> None:
    assert "model_type: is missing" in refused(tmp_path, {"hidden_size": 64})


def test_a_wrapper_of_a_text_model_is_told_what_to_pass(tmp_path: Path) -> None:
    wrapper = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    said = refused(tmp_path, wrapper)
    assert "wraps a text model" in said
    assert "gemma3_text" in said


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(0, 3), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["attn_type", "attn_pdrop", "x"]), st.integers(), max_size=2),
)


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_junk_is_read_or_refused_and_never_crashes(family: str, data: st.DataObject) -> None:
    config = preset_config(ONE_OF_EACH[family])[0]
    keys = sorted({*config, *KEYS_WITH_DEFAULTS})
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True)):
        config[key] = data.draw(JUNK)
    try:
        counts = parameter_counts(read(config))
    except OutlayError as error:
        assert str(error)
    else:
        assert counts.total >= counts.active > 0


KEYS_WITH_DEFAULTS = (
    "attention_bias",
    "attention_dropout",
    "attn_config",
    "conv_groups",
    "conv_kernel_size",
    "first_k_dense_replace",
    "head_dim",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_only_layers",
    "moe_layers",
    "no_rope_layers",
    "num_decoder_layers",
    "num_ln_in_parallel_attn",
    "pos_att_type",
    "position_buckets",
    "q_lora_rank",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
)


# Presets, and references to models


def test_every_family_with_a_preset_is_here() -> None:
    families = {preset_config(name)[0]["model_type"] for name in preset_names()}
    assert set(ONE_OF_EACH) == families
    assert set(FAMILIES) - families == {"cohere2"}


def test_there_are_at_least_forty_presets() -> None:
    assert len(preset_names()) >= 40


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_where_it_comes_from(name: str) -> None:
    config, origin = preset_config(name)
    assert re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name)
    assert set(origin) <= {"source", "date", "parameters", "note"}
    assert len(origin["source"]) > 20
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", origin["date"])
    assert parameter_counts(read(config)).total == origin["parameters"]


def test_an_unknown_preset_has_near_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        preset_config("llama-3-9b")
    assert "llama-3-8b" in caught.value.near


def test_a_folder_and_a_file_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for reference in (folder, folder / "config.json"):
        spec, config = resolve_model(str(reference))
        assert (spec.name, spec.source) == ("my-model", str(folder / "config.json"))
        assert config == LLAMA


def test_the_config_of_a_preset_has_no_key_of_ours() -> None:
    assert "_outlay" not in resolve_model("gpt2")[1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("meta-llama/Meta-Llama-3-8B", "download its config.json and pass the path"),
        ("meta-llama/Llama-3-8B", "presets near that name: llama-3-8b"),
        ("my.models:tiny", "tracing a module is not available yet"),
        ("./nowhere", "no such file or folder"),
        ("/no/such/folder", "no such file or folder"),
        ("nowhere.json", "no such file"),
        ("llama3-8b", "nearest: llama-3-8b"),
    ],
)
def test_a_reference_that_is_nothing_is_told_what_would_work(reference: str, message: str) -> None:
    with pytest.raises(OutlayError, match=re.escape(message)):
        resolve_model(reference)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        resolve_model(str(tmp_path))


def test_a_broken_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "llama",\n}')
    with pytest.raises(FileError, match=r"config.json:3: not valid JSON"):
        resolve_model(str(path))


def test_reading_a_preset_imports_nothing_heavy() -> None:
    code = (
        "import sys; from outlay.planner.spec.families import resolve_model; "
        "resolve_model('llama-3-8b'); "
        "print([m for m in ('torch', 'transformers', 'pandas', 'pydantic') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Every family against the module that transformers builds: random configs, and the presets.

The module is built on the meta device; each weight counts once, tied ones too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_families_shapes import SHAPES, Config

from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.spec.families import (
    FAMILIES,
    preset_config,
    preset_names,
    resolve_model,
    spec_from_config,
)
from outlay.planner.spec.model import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


FAST = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def module_of(config: Config) -> Any:
    """The module that transformers builds from the config, without memory."""
    found = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return getattr(transformers, FAMILIES[config["model_type"]].module).from_config(found)


ATTENTION = ("self_attn", "attn", "attention", "self_attention", "encoder_attn")
ATTENTION += ("SelfAttention", "EncDecAttention")
BEFORE = ("embed_tokens", "embed_positions", "wte", "wpe", "embed_in", "word_embeddings", "shared")
BEFORE += ("word_embeddings_layernorm", "layernorm_embedding", "project_in", "embeddings")
BEFORE += ("rel_embeddings", "embeddings_project", "conv")
HEAD = ("lm_head", "embed_out")


def part_in_block(steps: list[str]) -> str:
    """attention, mlp, experts or norms, from the name of a weight within its block."""
    if "experts" in steps:
        return "experts"
    if "LayerNorm" in steps or "layer_norm" in steps:
        return "norms"
    if any(step in ATTENTION for step in steps):
        return "attention"
    return "norms" if "norm" in steps[0] or steps[0].startswith("ln_") else "mlp"


def first_names(module: Any) -> dict[str, Any]:
    """Each weight once, under the name it has in the embedding where it has several."""
    names: dict[int, str] = {}
    weights = dict(module.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        if id(weight) not in names or any(step in BEFORE for step in name.split(".")):
            names[id(weight)] = name
    return {name: weights[name] for name in names.values()}


def counted(module: Any) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """(weights outside blocks by part, block → weights by part), by the names of the weights."""
    outside: Counter[str] = Counter()
    blocks: dict[str, Counter[str]] = defaultdict(Counter)
    for name, weight in first_names(module).items():
        steps = name.split(".")
        index = next((i for i, step in enumerate(steps) if step.isdecimal()), None)
        encoder_norm = steps[:3] == ["deberta", "encoder", "LayerNorm"]
        if index is not None:
            part = part_in_block(steps[index + 1 :])
            blocks[".".join(steps[: index + 1])][part] += weight.numel()
        elif any(step in BEFORE for step in steps) or encoder_norm:
            outside["embedding"] += weight.numel()
        else:
            outside["head" if steps[0] in HEAD else "final"] += weight.numel()
    return outside, blocks


def assert_same(spec: ModelSpec, module: Any) -> None:
    """Total, parts outside the blocks, and the parts of every block."""
    counts = parameter_counts(spec)
    assert counts.total == sum(weight.numel() for weight in module.parameters())
    outside, blocks = counted(module)
    assert counts.embedding == outside["embedding"]
    if FAMILIES[spec.family].module == "AutoModelForCausalLM":
        assert (counts.final, counts.head) == (outside["final"], outside["head"])
    parts = ("attention", "mlp", "experts", "norms")
    ours = Counter({tuple(getattr(one, part) for part in parts): 0 for one in counts.blocks})
    for group, one in zip(spec.blocks, counts.blocks, strict=True):
        ours[tuple(getattr(one, part) for part in parts)] += group.count
    assert ours == Counter(tuple(found[part] for part in parts) for found in blocks.values())


@pytest.mark.parametrize("family", sorted(SHAPES))
@given(data=st.data())
@FAST
def test_random_configs_are_counted_exactly(family: str, data: st.DataObject) -> None:
    config = {"model_type": family, **SHAPES[family](data.draw)}
    spec = spec_from_config(config, name="random", source="test")
    module = module_of(config)
    assert_same(spec, module)
    extras = ("rel_embeddings", "conv", "relative_attention_bias")
    sizes = [
        weight.numel()
        for name, weight in module.named_parameters()
        if not any(step in extras for step in name.split("."))
    ]
    assert largest_matrix(spec) == max(sizes)


@pytest.mark.parametrize("family", sorted(SHAPES))
@given(data=st.data())
@FAST
def test_defaults_are_those_of_transformers(family: str, data: st.DataObject) -> None:
    """A config with keys left out says the same as what transformers makes of it."""
    config = {"model_type": family, **SHAPES[family](data.draw)}
    full = transformers.AutoConfig.for_model(**config).to_dict()
    spec = spec_from_config(config, name="random", source="test")
    assert spec_from_config(full, name="random", source="test") == spec


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_counted_exactly(name: str) -> None:
    spec, config = resolve_model(name)
    _, origin = preset_config(name)
    assert parameter_counts(spec).total == origin["parameters"]
    assert_same(spec, module_of(config))

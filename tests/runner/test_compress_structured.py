"""Structured pruning: tensors that are smaller, a config that says so, the same function where nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks as r
import torch
from click.testing import CliRunner

from outlay.planner.shrink import HEADS_FIXED, SHRINKS
from outlay.planner.spec.compress import Shrink
from outlay.planner.spec.families import spec_from_config
from outlay.profiles.errors import FileError, UsageError
from outlay.runner.cli import cli
from outlay.runner.compress.structured import parts_of_blocks, shrink_model

LLAMA = r.CONFIGS["llama"]
OPT = {
    "model_type": "opt", "vocab_size": 256, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 64,
}  # fmt: skip
CONFIGS = {name: {**LLAMA, "model_type": name, "pad_token_id": 0} for name in SHRINKS} | {
    **r.CONFIGS,
    "opt": OPT,
}


def saved(folder: Path, family: str) -> Any:
    """A random model with large weights, in the folder, and itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[family]))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    return model.eval()


def silence(model: Any, family: str) -> None:
    """Zero every second channel and key group, and all that the middle block adds."""
    spec = spec_from_config(CONFIGS[family], name=family, source="test")
    attention = spec.blocks[0].attention
    with torch.no_grad():
        for index, part in enumerate(parts_of_blocks(model, spec)):
            for name, weight in part.block.named_parameters():
                if index == 1 and "norm" not in name and "ln_" not in name:
                    weight.zero_()
            turned = type(part.down).__name__ == "Conv1D"
            for module in part.up:
                (module.weight.t() if turned else module.weight)[::2].zero_()
                if module.bias is not None:
                    module.bias[::2].zero_()
            (part.down.weight if turned else part.down.weight.t())[::2].zero_()
            if part.query is None:
                continue
            width = attention.head_dim * attention.heads // attention.kv_heads
            part.query.weight[:width].zero_()
            part.out.weight[:, :width].zero_()
            for module in part.keys:
                module.weight[: attention.head_dim].zero_()


@pytest.mark.parametrize("family", SHRINKS)
def test_what_says_nothing_goes_and_nothing_changes(tmp_path: Path, family: str) -> None:
    """Half of the channels, half of the key groups and a block are silent: without them the same logits."""
    from transformers import AutoModelForCausalLM

    model = saved(tmp_path / "dense", family)
    silence(model, family)
    model.save_pretrained(tmp_path / "dense")
    heads = 0.0 if family in HEADS_FIXED else 0.5
    made = shrink_model(
        tmp_path / "dense", tmp_path / "small", Shrink(heads=heads, channels=0.5, layers=1)
    )
    small, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert small.config.use_cache and small.generation_config.use_cache, "else it generates slowly"
    assert made.kept_layers == (0, 2)
    assert made.parameters == sum(p.numel() for p in small.parameters())
    assert made.parameters_before == sum(p.numel() for p in model.parameters())
    assert made.parameters < 0.7 * made.parameters_before
    ids = r.global_batch(0)[:2]
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, small.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_importance_finds_what_matters(tmp_path: Path, importance: Any) -> None:
    """Large weights that nothing reads count by magnitude alone."""
    model = saved(tmp_path / "dense", "llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:64] *= 30
            block.mlp.gate_proj.weight[:64] *= 30
            block.mlp.down_proj.weight[:, :64].zero_()
    model.save_pretrained(tmp_path / "dense")
    batches = [r.global_batch(step)[:4] for step in range(2)]
    last = "model.layers.0.mlp.gate_proj.weight"
    for kind, dead in (("magnitude", 64), (importance, 0)):
        out = tmp_path / kind
        shrink_model(tmp_path / "dense", out, Shrink(channels=0.5, importance=kind), batches)
        from safetensors.torch import load_file

        kept = load_file(out / "model.safetensors")[last]
        assert int((kept.norm(dim=1) > 5).sum()) == dead


def test_the_command(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    base = ["shrink", str(tmp_path / "dense"), "--out", str(tmp_path / "small")]
    for more, says in (
        (["--channels", "50%", "--importance", "taylor"], "--data"),
        ([], "nothing is pruned"),
        (["--heads", "10%"], "whole group"),
        (["--channels", "half"], "number"),
    ):
        assert says in str(CliRunner().invoke(cli, [*base, *more]).exception)
    done = CliRunner().invoke(cli, [*base, "--channels", "50%", "--format", "json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.output)
    assert made["sizes"]["ffn"] == 64
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert spec_from_config(config, name="small", source="test").blocks[0].mlp.ffn == 64
    with pytest.raises(UsageError, match="something already"):
        shrink_model(tmp_path / "dense", tmp_path / "small", Shrink(channels=0.5))
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(FileError, match="no safetensors"):
        shrink_model(tmp_path / "dense", tmp_path / "other", Shrink(channels=0.5))

"""Trained weights → a transformers folder → the same logits, from every parallelism; and back in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r

from outlay.profiles.errors import FileError
from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks
TWO_STAGES: dict[str, Any] = {"dp": 1, "pp": 2, "grad_accum": 4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer of 256 words and more, with `</s>` as number 2."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        ["def f(x): return x"],
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", {"zero": 1}),
        ("llama", {"zero": 3}),
        ("llama", {"zero": 1, **TWO_STAGES}),
        ("gpt2", {"zero": 0}),
        ("gpt2", {"zero": 3}),
        ("gpt2", {"zero": 1, **TWO_STAGES}),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"zero{value['zero']}-pp{value.get('pp', 1)}"
    ),
)
def test_transformers_loads_what_was_trained(
    ranks: RankPool, tmp_path: Path, tokenizer: Path, family: str, strategy: dict[str, Any]
) -> None:
    """Identical logits; a run that starts from the folder starts at the loss where the first ended."""
    folder = tmp_path / "export"
    plan = r.tiny_plan(family, **strategy)
    trained = ranks.call("ranks_saved:train_and_export", plan, 3, str(folder), str(tokenizer))
    logits = next(rank["logits"] for rank in trained if rank["logits"] is not None)
    back = ranks.call("ranks_saved:reloaded", str(folder), plan)[0]
    np.testing.assert_array_equal(back["logits"], logits)
    assert back["missing"] == []
    assert back["tied"] == (family == "gpt2")
    assert back["class"] == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    assert back["tokens"] == ("def f(x): return x", "</s>")
    source = dataclasses.replace(plan.model, weights=str(folder))
    again = ranks.call("ranks_saved:heldout_at_start", dataclasses.replace(plan, model=source))
    assert again == [rank["heldout"] for rank in trained]


def test_the_folder_is_what_transformers_writes(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "older").touch()
    plan = r.tiny_plan("gpt2", zero=1)
    ranks.call("ranks_saved:train_and_export", plan, 1, str(folder), None)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert not (folder / "older").exists()
    assert not (folder / "tokenizer.json").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["model_type"], config["dtype"], config["n_embd"]) == ("gpt2", "float32", 64)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and {p.name for p in folder.glob("*.safetensors")} == shards
    assert "lm_head.weight" not in index["weight_map"], "a tied weight is written once"


def test_problems_are_one_error(ranks: RankPool, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    plan = r.tiny_plan(zero=1)
    with pytest.raises(FileError, match="the export cannot be written"):
        ranks.call("ranks_saved:only_export", plan, str(blocked / "export"), None)
    with pytest.raises(FileError, match=r"no tokenizer\.json"):
        ranks.call(
            "ranks_saved:only_export", plan, str(blocked.with_name("e")), str(tmp_path / "none")
        )
    empty = dataclasses.replace(plan.model, weights=str(tmp_path))
    with pytest.raises(FileError, match=r"no model\.safetensors"):
        ranks.call("ranks_saved:heldout_at_start", dataclasses.replace(plan, model=empty))


def test_weights_of_another_model_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    plan = r.tiny_plan(zero=1)
    ranks.call("ranks_saved:train_and_export", plan, 1, str(tmp_path / "export"), None)
    for change, message in (
        ({"num_hidden_layers": 4}, "the weight model.layers.3.* is not there"),
        ({"intermediate_size": 64}, r"shape \(.*128.*\), the model needs \(.*64.*\)"),
    ):
        other = r.tiny_plan(zero=1, config=change)
        source = dataclasses.replace(other.model, weights=str(tmp_path / "export"))
        with pytest.raises(FileError, match=message):
            ranks.call("ranks_saved:heldout_at_start", dataclasses.replace(other, model=source))

"""`outlay eval`: intervals that cover, units of resampling, sizes, and the format of the result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.profiles.errors import FileError, OutlayError, UsageError
from outlay.runner.cli import cli
from outlay.runner.data.prepare import prepare
from outlay.runner.evaluate.front import Worth, beaten_by
from outlay.runner.evaluate.intervals import loss_difference, mean_loss, median_of, ratio_of
from outlay.runner.evaluate.text import FEWEST_DOCUMENTS, held_out
from outlay.runner.exported.source import training_usd

GOLDEN = Path(__file__).parent.parent / "golden"
SEQ_LEN = 32
AMOUNTS = st.integers(0, 3)
WORTHS = st.builds(
    Worth, weights_bytes=AMOUNTS, loss=AMOUNTS, training_usd=st.one_of(st.none(), AMOUNTS)
)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 80 samples of 40 unequal documents, about 90 % of the intervals hold the true mean."""
    made = np.random.default_rng(0)
    inside = 0
    for trial in range(80):
        counts = made.integers(50, 500, 40).astype(float)
        level = 3.0 + made.normal(0, 0.4, 40)
        m = mean_loss(level * counts, counts, seed=trial)
        inside += m.low <= 3.0 <= m.high
    assert 0.80 <= inside / 80 <= 0.97


def test_a_difference_on_the_same_text_is_known_better_than_either_loss() -> None:
    made = np.random.default_rng(1)
    counts = np.full(30, 100.0)
    before = (3 + made.normal(0, 0.5, 30)) * counts
    after = before + 0.01 * counts
    m, d = mean_loss(before, counts), loss_difference(before, after, counts)
    assert d.value == pytest.approx(0.01) and d.high - d.low < 1e-9 < m.high - m.low
    assert m.map_exp().value == pytest.approx(math.exp(m.value))


@given(models=st.lists(WORTHS, min_size=1, max_size=6))
def test_what_is_beaten_is_no_better_in_anything_known(models: list[Worth]) -> None:
    for worth, i in zip(models, beaten_by(models), strict=True):
        if i is None:
            assert not any(other.beats(worth) for other in models)
            continue
        other = models[i]
        assert other.weights_bytes <= worth.weights_bytes and other.loss <= worth.loss
        if other.training_usd is not None and worth.training_usd is not None:
            assert other.training_usd <= worth.training_usd
    assert None in beaten_by(models)


@pytest.mark.parametrize(
    ("record", "usd"),
    [({"training": {"cost_usd": 1.5}}, 1.5), ({"training": {"cost_usd": None}}, None), ({"training": None}, None)],
)  # fmt: skip
def test_cost_of_training_is_read_or_unknown(
    tmp_path: Path, record: dict[str, Any], usd: float | None
) -> None:
    assert training_usd(tmp_path) is None
    (tmp_path / "outlay.json").write_text(json.dumps(record))
    assert training_usd(tmp_path) == usd
    (tmp_path / "outlay.json").write_text("[]")
    with pytest.raises(FileError, match="no record of an export"):
        training_usd(tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.floats(0.5, 2))
def test_medians_lie_in_their_intervals(values: list[float], factor: float) -> None:
    a = np.array(values)
    m, ratio = median_of(a), ratio_of(a, a * factor)
    assert min(values) <= m.low <= m.value <= m.high <= max(values)
    assert ratio.low == pytest.approx(factor) and ratio.high == pytest.approx(factor)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small files, half of them held out."""
    root = tmp_path_factory.mktemp("text")
    for i in range(40):
        (root / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 8)
    prepare(sorted(root.glob("*.py")), root / "data", seed=0, vocab_size=300, heldout_fraction=0.5)
    return root / "data"


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two untrained models of the data's vocabulary, one with half of its MLP at zero."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    root = tmp_path_factory.mktemp("models")
    model.save_pretrained(root / "a")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:32] = 0
    model.save_pretrained(root / "b")
    for name in ("a", "b"):
        shutil.copy(data / "tokenizer.json", root / name)
    return root / "a", root / "b"


def test_documents_are_resampled_where_there_are_enough(data: Path) -> None:
    many = held_out(data, seq_len=SEQ_LEN, sequences=1000)
    name, unit = many.units
    assert name == "document" and unit.shape == (len(many.tokens), SEQ_LEN - 1)
    files = json.loads((data / "dataset.json").read_text())["heldout"]["files"]
    assert FEWEST_DOCUMENTS <= unit.max() + 1 <= len(files)
    # documents follow each other, and the token that ends one is its last
    flat = many.documents.reshape(-1)
    assert (np.diff(flat) >= 0).all()
    few = held_out(data, seq_len=SEQ_LEN, sequences=4)
    name, unit = few.units
    assert name == "window" and unit.max() + 1 == 4


def key_paths(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from key_paths(inner, f"{prefix}{key}.")
    if isinstance(value, list):
        for inner in value:
            yield from key_paths(inner, f"{prefix[:-1]}[].")


def test_two_models_side_by_side(data: Path, folders: tuple[Path, Path]) -> None:
    """Losses as torch has them; the published keys; equal sizes; zeros counted."""
    import torch
    from transformers import LlamaForCausalLM

    args = ["eval", *map(str, folders), "--data", str(data), "--seq-len", str(SEQ_LEN)]
    result = CliRunner().invoke(cli, [*args, "--repeats", "5", "--format", "json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    expected = set((GOLDEN / "eval.keys").read_text().split())
    # versions of packages are no keys of ours
    assert {k for k in key_paths(made) if not k.startswith("machine.software.")} == expected
    text = held_out(data, seq_len=SEQ_LEN, sequences=256)
    ids = torch.from_numpy(text.tokens)
    losses = []
    for folder, m in zip(folders, made["models"], strict=True):
        model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
        assert m["loss"]["value"] == pytest.approx(losses[-1], abs=1e-5)
        assert m["loss"]["low"] <= m["loss"]["value"] <= m["loss"]["high"]
        assert m["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    a, b = made["models"]
    assert a["nonzero"] == a["parameters"] and b["parameters"] - b["nonzero"] == 32 * 32
    (d,) = made["differences"]
    assert d["loss"]["value"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert d["weights"] == 1
    # of one size, so one of them is on the front alone; nobody knows what either cost
    better, worse = (a, b) if losses[0] < losses[1] else (b, a)
    assert better["beaten_by"] is None and worse["beaten_by"] == better["target"]
    assert a["training_usd"] is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["{a}"], "on what text"),
        (["{root}/none"], "no such folder"),
        (["{root}"], "no config.json"),
        (["{a}", "--data", "{data}", "--seq-len", "65"], "has 64 positions"),
        (["{a}", "--data", "{root}"], "no such file"),
        (["{a}", "--data", "{data}", "--repeats", "2"], "2 repeats have no interval"),
    ],
)
def test_what_cannot_be_evaluated(
    data: Path, folders: tuple[Path, Path], args: list[str], says: str
) -> None:
    names = {"a": folders[0], "root": folders[0].parent, "data": data}
    result = CliRunner().invoke(cli, ["eval", *(arg.format(**names) for arg in args)])
    assert isinstance(result.exception, OutlayError) and says in result.exception.message()


def test_another_tokenizer_is_refused(
    data: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from outlay.runner.evaluate.text import check_tokenizer

    text = held_out(data, seq_len=SEQ_LEN, sequences=4)
    with pytest.raises(UsageError, match="another vocabulary"):
        check_tokenizer(text, folders[0], 299)
    words = json.loads((data / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    one, two = list(vocab)[40:42]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UsageError, match="2 of 300 tokens differ"):
        check_tokenizer(text, tmp_path, 300)
    with pytest.raises(FileError):
        from outlay.runner.evaluate.load import read_folder

        read_folder(tmp_path)

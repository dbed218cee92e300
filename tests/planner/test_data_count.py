"""Rows, tokens and padding of data files: by hand, exactly with a tokenizer, and rubbish refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.amount import Amount, amount_of, data_of, finetune_of, fraction_of
from outlay.planner.bytes_per_token import bytes_per_token
from outlay.planner.data_count import DataCount, count_data, padding, row_text
from outlay.planner.spec.job import Data, Finetune
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError, UsageError

WORDS = "the quick brown fox jumps over the lazy dog and runs home again "


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from outlay.runner.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([WORDS * 50], 300).save(str(path))
    return str(path)


def test_every_format_holds_the_same_rows(tmp_path: Path) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [WORDS, WORDS * 3, "short"]
    jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n")
    with (tmp_path / "a.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerows([["text", "label"], *([t, "x"] for t in texts)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    size = sum(len(t) for t in texts)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        count = count_data(tmp_path / name)
        assert (count.rows, count.text_bytes, count.read_fraction) == (3, size, 1.0)
    assert count_data(tmp_path / "a.txt").rows == 3
    assert count_data(tmp_path).rows == 12


def test_an_estimate_holds_the_interval_that_was_measured(tmp_path: Path) -> None:
    known = bytes_per_token()
    assert known.low < known.expected < known.high
    count = count_data(jsonl(tmp_path / "a.jsonl", ["x" * 9_999] * 10))
    assert count.tokens == pytest.approx(99_990 / known.expected + 10, abs=1)
    assert count.tokens_low < count.tokens < count.tokens_high
    assert not count.exact
    assert "2407.21783" in count.source
    assert "--tokenizer" in count.source


def test_a_tokenizer_counts_exactly(tmp_path: Path, tokenizer: str) -> None:
    from tokenizers import Tokenizer

    texts = [WORDS, WORDS * 2, "Ünïcode, 日本語"]
    count = count_data(jsonl(tmp_path / "a.jsonl", texts), tokenizer=tokenizer)
    by_hand = [len(Tokenizer.from_file(tokenizer).encode(t).ids) + 1 for t in texts]
    assert count.exact
    assert count.tokens == sum(by_hand)
    assert count.row_tokens.tolist() == by_hand
    folder = str(Path(tokenizer).parent)
    assert count_data(tmp_path / "a.jsonl", tokenizer=folder).tokens == count.tokens


def test_text_of_another_script_has_no_interval(tmp_path: Path) -> None:
    assert "does not hold" in count_data(jsonl(tmp_path / "a.jsonl", ["日本語" * 50])).source
    assert "does not hold" not in count_data(jsonl(tmp_path / "b.jsonl", [WORDS])).source


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv"])
def test_a_large_file_is_sampled_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("outlay.planner.data_count.PIECE_BYTES", 4096)
    path = tmp_path / f"big{suffix}"
    lengths = np.random.default_rng(0).integers(20, 200, 20_000)
    if suffix == ".jsonl":
        jsonl(path, ["x" * n for n in lengths])
    else:
        head = "text\n" if suffix == ".csv" else ""
        path.write_text(head + "".join("x" * n + "\n" for n in lengths))
    whole = count_data(path)
    part = count_data(path, whole_bytes=1000)
    assert whole.rows == 20_000
    assert part.read_fraction < 0.5
    assert "was read, in pieces" in part.source
    assert part.rows == pytest.approx(whole.rows, rel=0.05)
    assert part.tokens_low <= whole.tokens <= part.tokens_high


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "no text"),
        ("a.txt", b"fine\n\0\1\2", "binary"),
        ("a.jsonl", b'{"text": "x"}\n{broken\n', "a.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"foo": 1}\n', "a.jsonl:3: the row has no text"),
        ("a.jsonl", b"[1]\n", "has to be an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n", "a.csv:2: the row has no text"),
        ("a.parquet", b"PAR1 but not", "not a parquet file"),
    ],
)
def test_rubbish_is_one_clear_error(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=says) as caught:
        count_data(tmp_path / name)
    assert caught.value.exit_code == 2
    with pytest.raises(FileError, match="no such file"):
        count_data(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("package", "name", "says"),
    [("tokenizers", "a.jsonl", "pip install tokenizers"), ("pyarrow", "a.parquet", "pip install pyarrow")],
)  # fmt: skip
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, says: str
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any, **more: Any) -> Any:
        if wanted.split(".")[0] == package:
            raise ImportError(wanted)
        return real(wanted, *rest, **more)

    jsonl(tmp_path / name, ["x"])
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=says):
        count_data(tmp_path / name, tokenizer="t.json" if package == "tokenizers" else None)


def test_pictures_in_a_folder_are_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    count = count_data(tmp_path)
    assert count.rows == 1
    assert "1 of 2 files are not text and left out (b.png)" in count.source


def test_chats_and_pairs_are_text() -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"content": "yes"}]}
    assert row_text(chat, "") == "hi\nyes"
    assert row_text({"instruction": "do", "output": "done"}, "") == "do\ndone"
    assert row_text({"instruction": "do", "input": "it", "output": "done"}, "") == "do\nit\ndone"
    assert row_text({"content": "a", "prompt": "b", "completion": "c"}, "") == "a"


def counted(lengths: list[float]) -> DataCount:
    total = round(sum(lengths))
    return DataCount(
        rows=len(lengths), text_bytes=4 * total, tokens=total, tokens_low=total, tokens_high=total,
        row_tokens=np.array(lengths), read_fraction=1.0, source="test",
    )  # fmt: skip


def test_padding_by_hand() -> None:
    p = padding(counted([10, 50, 130]), 100)
    assert (p.computed, p.trained, p.truncated, p.rows_cut) == (300, 160, 30, 1)


@given(
    st.lists(st.integers(1, 5000).map(float), min_size=1, max_size=50), st.integers(1, 4096)
)  # fmt: skip
def test_padding_loses_nothing_unsaid(lengths: list[float], seq_len: int) -> None:
    p = padding(counted(lengths), seq_len)
    assert p.trained + p.truncated == sum(lengths)
    assert p.trained <= p.computed == len(lengths) * seq_len


def test_packing_decides_the_steps(tmp_path: Path, tokenizer: str) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", [WORDS] * 64))
    data = data_of(path, tokenizer)
    assert data == Data(path=path, format="text", tokenizer=tokenizer)
    tokens = count_data(path, tokenizer=tokenizer).tokens
    packed, notes = amount_of(data, 3, packing=True, seq_len=256)
    assert packed is not None
    assert packed.steps(4)[0] == max(1, 3 * tokens // (4 * 256))
    assert [n["what"] for n in notes] == ["data", "packing"]
    padded, notes = amount_of(data, 3, packing=False, seq_len=256)
    assert padded is not None
    assert padded.steps(4) == (48, "3 epochs of 64 rows")
    assert "times the tokens of packed rows" in notes[1]["source"]
    _, cut = amount_of(data, None, packing=False, seq_len=8)
    assert "64 rows are longer" in cut[1]["source"]


def test_the_interval_of_tokens_is_one_of_steps() -> None:
    amount = Amount(sequences=100.0, low=90.0, high=120.0, epochs=1.0, says="x")
    assert amount.steps(10) == (10, "one epoch of x; 9 to 12 steps")


@pytest.mark.parametrize(
    ("data", "epochs", "packing", "says"),
    [
        (None, 3.0, True, "epochs of what"),
        (None, None, False, "how long the rows are"),
        (Data(path="x"), None, False, "prepared tokens are packed"),
        (Data(path="x"), 2.0, True, "does not say"),
        (Data(path="x"), -1.0, True, "make no sense"),
        (Data(path="x"), float("nan"), True, "make no sense"),
    ],
)
def test_nonsense_amounts(
    data: Data | None, epochs: float | None, packing: bool, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        amount_of(data, epochs, packing=packing, seq_len=128)


def test_methods_are_read() -> None:
    assert Finetune.parse("full") is None
    assert Finetune.parse("lora") == Finetune()
    assert Finetune.parse("dora:r16") == Finetune(method="dora", rank=16)
    assert Finetune.parse("qlora:r16") == Finetune(rank=16, quant="nf4-dq")
    assert Finetune.parse("adapter_v2") == Finetune(method="adapter_v2")


@pytest.mark.parametrize(
    "text", ["freeze:head", "lora:16", "lora:r0", "lora:rx", "full:r8", "", "peft"]
)
def test_methods_without_a_formula_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Finetune.parse(text)


def test_a_rank_fits_the_model(tiny_spec: ModelSpec) -> None:
    found, notes = finetune_of("qlora:r8", tiny_spec)
    assert found is not None
    assert "q and v" in notes[0]["source"]
    with pytest.raises(UsageError, match="exceeds the model's width"):
        finetune_of("lora:r100000", tiny_spec)


def test_pilots_are_parts_of_a_run() -> None:
    assert fraction_of(None) == 0.0
    assert fraction_of("2%") == fraction_of(0.02) == fraction_of("0.02") == 0.02
    for text in ("200%", "-1%", "2x", "much"):
        with pytest.raises(UsageError):
            fraction_of(text)

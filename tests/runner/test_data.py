"""Corpus, tokenizer, prepared datasets and the order in which a run reads them."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.profiles.errors import FileError, UsageError
from outlay.runner.data import corpus
from outlay.runner.data.corpus import examine, pieces, standard_library_files, text_files
from outlay.runner.data.dataset import TokenDataset
from outlay.runner.data.prepare import prepare, unigram_nats
from outlay.runner.data.tokenizer import END_OF_TEXT, read_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small files of real text, in two folders."""
    folder = tmp_path_factory.mktemp("texts")
    chosen = [f for f in standard_library_files() if 2_000 < f.stat().st_size < 12_000][:40]
    for index, path in enumerate(chosen):
        below = folder / ("a" if index % 2 else "b")
        below.mkdir(exist_ok=True)
        (below / f"{index:02}.txt").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(text_files(texts), out, vocab_size=600, heldout_fraction=0.2, seed=3)
    return out


def test_the_standard_library_is_found_without_tests_and_installed_packages() -> None:
    files = standard_library_files()
    names = {f.name for f in files}
    assert files == sorted(files)
    assert {"argparse.py", "dataclasses.py"} <= names
    assert len(files) > 300
    folders = {part for f in files for part in f.parts[-3:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        (b"plain\n", "text"),
        ("żółw".encode(), "text"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"ab\0cd", "binary"),
        (b"caf\xe9", "undecodable"),
        ("ż".encode()[:1], "undecodable"),
    ],
)
def test_files_are_judged_by_what_is_in_them(tmp_path, content, verdict) -> None:
    (tmp_path / "f").write_bytes(content)
    assert examine(tmp_path / "f") == verdict


def test_a_character_across_two_pieces_is_no_fault(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", 7)
    text = "zażółć gęślą jaźń\nsecond line\n" * 5 + "no end"
    path = tmp_path / "f"
    path.write_text(text, encoding="utf-8")
    assert examine(path) == "text"
    assert "".join(pieces(path)) == text
    cut = corpus.line_start_at(path, len(text) // 2)
    assert "".join(pieces(path, stop=cut)) + "".join(pieces(path, start=cut)) == text
    assert "".join(pieces(path, stop=cut)).endswith("\n")


def test_training_a_tokenizer_twice_gives_the_same_and_loses_no_byte() -> None:
    corpus_text = [p.read_text() for p in standard_library_files()[:30]]
    first, second = (train_tokenizer(corpus_text, 800) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 800
    odd = "tab\tżółw 🐢\x07 " + END_OF_TEXT[:-1]
    assert first.decode(first.encode(odd).ids) == odd


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="257"):
        train_tokenizer(["abc"], 256)


def test_a_dataset_says_what_is_in_it(prepared: Path, texts: Path) -> None:
    info = json.loads((prepared / "dataset.json").read_text())
    assert info["schema"] == "outlay/dataset@1"
    assert info["dtype"] == "uint16"
    every = sorted(f.relative_to(texts).as_posix() for f in text_files(texts))
    assert sorted(info["train"]["files"] + info["heldout"]["files"]) == every
    counts = {}
    for part in ("train", "heldout"):
        content = (prepared / f"{part}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == info[part]["sha256"]
        tokens = np.frombuffer(content, dtype="<u2")
        assert len(tokens) == info[part]["tokens"]
        assert (tokens == info["end_of_text"]).sum() == len(info[part]["files"])
        counts[part] = np.bincount(tokens, minlength=info["vocab_size"])
    total = counts["train"].sum() + info["vocab_size"]
    by_hand = -sum(
        n * np.log((counts["train"][t] + 1) / total) for t, n in enumerate(counts["heldout"])
    )
    assert info["heldout_unigram_nats"] == pytest.approx(by_hand / counts["heldout"].sum())


def test_tokens_decode_to_the_files(prepared: Path, texts: Path) -> None:
    info = json.loads((prepared / "dataset.json").read_text())
    tokenizer = read_tokenizer(prepared)
    ids = np.frombuffer((prepared / "heldout.bin").read_bytes(), dtype="<u2")
    documents = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
    expected = [(texts / name).read_text(encoding="utf-8") for name in info["heldout"]["files"]]
    assert documents[-1] == ""
    assert sorted(documents[:-1]) == sorted(expected)


def test_preparing_again_gives_the_same_bytes_wherever_the_files_lie(
    texts: Path, prepared: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    for path in text_files(texts):
        target = moved / path.relative_to(texts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out = tmp_path / "again"
    prepare(text_files(moved)[::-1], out, vocab_size=600, heldout_fraction=0.2, seed=3)
    for name in ("train.bin", "heldout.bin", "tokenizer.json", "dataset.json", "train_counts.bin"):
        assert (out / name).read_bytes() == (prepared / name).read_bytes(), name
    prepare(text_files(moved), tmp_path / "seed", vocab_size=600, heldout_fraction=0.2, seed=4)
    seed = (tmp_path / "seed" / "dataset.json").read_bytes()
    assert seed != (prepared / "dataset.json").read_bytes()


def test_an_own_tokenizer_is_kept_and_used(prepared: Path, texts: Path, tmp_path: Path) -> None:
    info = prepare(text_files(texts), tmp_path / "d", tokenizer_path=prepared, seed=3)
    assert info.vocab_size == 600
    kept = read_tokenizer(tmp_path / "d")
    assert kept.to_str() == read_tokenizer(prepared).to_str()


def test_files_that_are_no_text_are_counted_and_left_out(texts: Path, tmp_path: Path) -> None:
    files = text_files(texts)
    for name, content in {"x": b"a\0b", "y": b"\xff\xfe\xff", "z": b""}.items():
        (tmp_path / name).write_bytes(content)
        files.append(tmp_path / name)
    info = prepare(files, tmp_path / "d", vocab_size=300, seed=0)
    assert info.skipped == {"binary": 1, "empty": 1, "undecodable": 1}
    capped = prepare(files, tmp_path / "e", vocab_size=300, seed=0, max_bytes=60_000)
    assert capped.train.text_bytes + capped.heldout.text_bytes <= 60_000
    assert capped.skipped["over max_bytes"] > 0


def test_one_file_holds_out_its_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of the book\n" for i in range(2000)))
    info = prepare([path], tmp_path / "d", vocab_size=300, seed=0)
    assert info.heldout_by == "tail"
    assert info.train.text_bytes + info.heldout.text_bytes == path.stat().st_size
    assert info.heldout.text_bytes == pytest.approx(0.05 * path.stat().st_size, rel=0.05)


def test_an_empty_corpus_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0")
    with pytest.raises(FileError, match=r"(?s)empty.*1 binary"):
        prepare([tmp_path / "x"], tmp_path / "d", vocab_size=300, seed=0)
    with pytest.raises(FileError):
        prepare([], tmp_path / "d", vocab_size=300, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failure_on_the_way_leaves_nothing(texts: Path, tmp_path: Path, monkeypatch) -> None:
    from outlay.runner.data import prepare as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "unigram_nats", full)
    with pytest.raises(FileError, match="No space left"):
        prepare(text_files(texts), tmp_path / "d", vocab_size=300, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_written_to(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UsageError, match="not an empty folder"):
        prepare(text_files(texts), tmp_path, vocab_size=300, seed=0)


@pytest.mark.parametrize("wrong", [{}, {"vocab_size": 300, "tokenizer_path": "t.json"}])
def test_exactly_one_way_to_a_tokenizer(texts: Path, tmp_path: Path, wrong) -> None:
    with pytest.raises(UsageError, match="either"):
        prepare(text_files(texts), tmp_path / "d", seed=0, **wrong)


def test_a_tokenizer_without_end_of_text_is_refused(texts: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "t.json"))
    with pytest.raises(FileError, match="no end-of-text token"):
        prepare(text_files(texts), tmp_path / "d", tokenizer_path=tmp_path / "t.json", seed=0)
    (tmp_path / "u.json").write_text("{}")
    with pytest.raises(FileError, match=r"not a tokenizer\.json"):
        prepare(text_files(texts), tmp_path / "d", tokenizer_path=tmp_path / "u.json", seed=0)


def test_every_split_of_a_step_reads_the_same_samples(prepared: Path) -> None:
    data = TokenDataset(prepared, seq_len=64, seed=5)
    for step in (0, 3, data.windows // 24, 2 * data.windows // 24 + 1):
        seen = []
        for dp, micro in product((1, 2, 3), (1, 2, 4)):
            accum = 24 // (dp * micro)
            rows = [
                data.batch(step, a, r, dp_size=dp, micro_batch=micro, grad_accum=accum)
                for a in range(accum)
                for r in range(dp)
            ]
            assert all(b.shape == (micro, 64) and b.dtype == np.int64 for b in rows)
            seen.append(np.concatenate(rows))
        assert all(np.array_equal(seen[0], other) for other in seen[1:])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10), st.integers(0, 2**31))
def test_an_epoch_reads_every_window_once_in_an_order_of_its_own(prepared, epoch, seed) -> None:
    data = TokenDataset(prepared, seq_len=128, seed=seed)
    order = data.order(epoch, seed)
    assert sorted(order) == list(range(data.windows))
    assert not np.array_equal(order, data.order(epoch + 1, seed))
    first = epoch * data.windows
    train = np.fromfile(prepared / "train.bin", dtype="<u2")
    for position in (0, data.windows - 1):
        start = order[position] * 128
        assert np.array_equal(data.sample(first + position), train[start : start + 128])


def test_heldout_batches_are_equal_and_together_the_first_windows(prepared: Path) -> None:
    data = TokenDataset(prepared, seq_len=32, seed=0)
    ranks = [data.heldout_batches(r, dp_size=2, micro_batch=4, sequences=20) for r in (0, 1)]
    assert [len(r) for r in ranks] == [2, 2]
    together = np.concatenate([b for pair in zip(*ranks, strict=True) for b in pair])
    heldout = np.fromfile(prepared / "heldout.bin", dtype="<u2")[: 16 * 32].reshape(16, 32)
    assert np.array_equal(together, heldout)
    small = data.heldout_batches(1, dp_size=2, micro_batch=4, sequences=2)
    assert [b.shape for b in small] == [(1, 32)]
    with pytest.raises(UsageError, match="too short to evaluate"):
        data.heldout_batches(0, dp_size=2, micro_batch=1, sequences=1)


def test_the_unigram_baseline_is_of_the_predicted_tokens(prepared: Path) -> None:
    data = TokenDataset(prepared, seq_len=32, seed=0)
    grid = {"dp_size": 2, "micro_batch": 4, "sequences": 20}
    predicted = np.concatenate(
        [b[:, 1:].ravel() for r in (0, 1) for b in data.heldout_batches(r, **grid)]
    )
    train = np.bincount(np.fromfile(prepared / "train.bin", dtype="<u2"), minlength=600)
    expected = unigram_nats(train, np.bincount(predicted, minlength=600))
    assert data.heldout_unigram_nats(**grid) == pytest.approx(expected)


def test_files_that_do_not_match_are_named(prepared: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    with (copy / "train.bin").open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(
        FileError, match=r"(?s)train\.bin.*not the file that dataset\.json describes"
    ):
        TokenDataset(copy, seq_len=32, seed=0)
    (copy / "dataset.json").write_text('{"schema": "outlay/dataset@9"}')
    with pytest.raises(FileError, match="schema"):
        TokenDataset(copy, seq_len=32, seed=0)


def test_less_than_one_window_is_an_error(prepared: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)shorter than one window.*seq_len 10000000"):
        TokenDataset(prepared, seq_len=10_000_000, seed=0)

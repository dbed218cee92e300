"""Files of text → a dataset folder, whole or not at all.

It holds `train.bin`, `heldout.bin`, `train_counts.bin` (int64, how often each token came in
training: a unigram model), `tokenizer.json` and `dataset.json`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from outlay.planner.spec.files import to_json
from outlay.profiles.errors import FileError, UsageError
from outlay.profiles.units import format_bytes
from outlay.runner.data.corpus import Source, examine, line_start_at, name_sources, pieces
from outlay.runner.data.tokenizer import end_of_text_id, read_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCHEMA_DATASET = "outlay/dataset@1"
PARTS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """One .bin file: token ids, little-endian, no header, each document ended by end of text."""

    tokens: int
    text_bytes: int
    """UTF-8 bytes of the text that these tokens stand for."""
    files: tuple[str, ...]
    sha256: str
    """Of the .bin file."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """`dataset.json`."""

    train: PartInfo
    heldout: PartInfo
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    end_of_text: int
    heldout_by: Literal["file", "tail"]
    """`tail`: a corpus of one file, whose end is held out from a line start on."""
    seed: int
    skipped: dict[str, int]
    """Files left out by reason: empty, binary, undecodable, unreadable, over max_bytes."""
    heldout_unigram_nats: float
    """Cross-entropy of the held-out tokens under the add-one-smoothed training unigram, a token."""
    tokenizer_sha256: str
    schema: str = field(default=SCHEMA_DATASET)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A file, or a byte range of it, that goes into one part."""

    source: Source
    start: int = 0
    stop: int | None = None

    @property
    def size_bytes(self) -> int:
        return (self.source.size_bytes if self.stop is None else self.stop) - self.start


def prepare(
    files: list[Path],
    out: Path,
    *,
    seed: int,
    vocab_size: int | None = None,
    tokenizer_path: str | Path | None = None,
    heldout_fraction: float = 0.05,
    max_bytes: int | None = None,
) -> DatasetInfo:
    """Write a dataset folder. `vocab_size` trains a tokenizer, `tokenizer_path` uses one."""
    if (vocab_size is None) == (tokenizer_path is None):
        raise UsageError("give either a vocabulary size or a tokenizer, not both or neither")
    if not 0 < heldout_fraction < 1:
        raise UsageError(f"heldout_fraction must lie between 0 and 1, not {heldout_fraction:g}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "already there, and not an empty folder", where=str(out), do="choose another folder"
        )
    chosen, skipped = _choose(files, seed, max_bytes)
    parts, heldout_by = _split(chosen, heldout_fraction, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        if tokenizer_path is not None:
            tokenizer = read_tokenizer(tokenizer_path)
        else:
            assert vocab_size is not None
            tokenizer = train_tokenizer(_texts(parts["train"]), vocab_size)
        info = _write(tokenizer, parts, partial, heldout_by=heldout_by, seed=seed, skipped=skipped)
        partial.chmod(0o755)
        partial.replace(out)
        _sync(out.parent)
    except OSError as error:
        raise FileError("the dataset cannot be written", where=str(out), why=str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def _choose(
    files: list[Path], seed: int, max_bytes: int | None
) -> tuple[list[Source], dict[str, int]]:
    """The files that are text, up to max_bytes, in an order of names and seed alone."""
    verdicts = [(source, examine(source.path)) for source in name_sources(files)]
    skipped = Counter(str(v) for _, v in verdicts if v != "text")
    texts = [source for source, verdict in verdicts if verdict == "text"]
    texts.sort(key=lambda source: _draw(source.name, seed, "order"))
    if max_bytes is not None:
        kept, total = [], 0
        for source in texts:
            if total + source.size_bytes <= max_bytes:
                kept.append(source)
                total += source.size_bytes
        skipped.update({"over max_bytes": len(texts) - len(kept)} if len(kept) < len(texts) else {})
        texts = kept
    if not texts:
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        raise FileError("the corpus is empty: no file of text is left", why=why)
    return texts, dict(sorted(skipped.items()))


def _draw(name: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that is the same for the same name and seed, on every machine."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _split(
    chosen: list[Source], fraction: float, seed: int
) -> tuple[dict[str, list[Slice]], Literal["file", "tail"]]:
    """Whole files are held out, so that no held-out text has a neighbour in training."""
    if len(chosen) == 1:
        return _split_one(chosen[0], fraction), "tail"
    draws = {s.name: _draw(s.name, seed, "heldout") for s in chosen}
    held = {name for name, draw in draws.items() if draw < fraction}
    if not held:
        held = {min(draws, key=lambda name: draws[name])}
    if len(held) == len(chosen):
        held.discard(max(draws, key=lambda name: draws[name]))
    return {
        "train": [Slice(source=s) for s in chosen if s.name not in held],
        "heldout": [Slice(source=s) for s in chosen if s.name in held],
    }, "file"


def _split_one(source: Source, fraction: float) -> dict[str, list[Slice]]:
    cut = line_start_at(source.path, int(source.size_bytes * (1 - fraction)))
    if not 0 < cut < source.size_bytes:
        raise FileError(
            "a corpus of one file, and nothing of it can be held out",
            where=str(source.path),
            why=f"of {format_bytes(source.size_bytes)} no line starts in the last {fraction:.0%}",
            do="give more files, or a file with more lines",
        )
    return {
        "train": [Slice(source=source, stop=cut)],
        "heldout": [Slice(source=source, start=cut)],
    }


def _texts(slices: list[Slice]) -> Iterator[str]:
    for piece in slices:
        yield from pieces(piece.source.path, start=piece.start, stop=piece.stop)


def _write(
    tokenizer: Tokenizer, parts: dict[str, list[Slice]], folder: Path, **facts: Any
) -> DatasetInfo:
    vocab = tokenizer.get_vocab_size()
    end = end_of_text_id(tokenizer, where=str(folder))
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab <= 2**16 else "uint32"
    counts = {}
    infos = {}
    for part in PARTS:
        path = folder / f"{part}.bin"
        counts[part] = _write_tokens(tokenizer, parts[part], path, np.dtype(dtype), end, vocab)
        infos[part] = PartInfo(
            tokens=int(counts[part].sum()),
            text_bytes=sum(s.size_bytes for s in parts[part]),
            files=tuple(sorted(s.source.name for s in parts[part])),
            sha256=_sha256(path),
        )
    (folder / "train_counts.bin").write_bytes(counts["train"].astype("<i8").tobytes())
    tokenizer.save(str(folder / "tokenizer.json"))
    info = DatasetInfo(
        train=infos["train"],
        heldout=infos["heldout"],
        **facts,
        dtype=dtype,
        vocab_size=vocab,
        end_of_text=end,
        heldout_unigram_nats=unigram_nats(counts["train"], counts["heldout"]),
        tokenizer_sha256=_sha256(folder / "tokenizer.json"),
    )
    (folder / "dataset.json").write_text(to_json(info), encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    return info


def _write_tokens(
    tokenizer: Tokenizer,
    slices: list[Slice],
    path: Path,
    dtype: np.dtype[Any],
    end: int,
    vocab: int,
) -> np.ndarray:
    """Append each document's tokens and the end of text; return how often each token came."""
    counts = np.zeros(vocab, dtype=np.int64)
    with path.open("wb") as handle:
        for batch in _in_batches(slices, 64):
            texts = [text for text, _ in batch]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                ids = np.asarray(encoding.ids + ([end] if last else []), dtype=np.int64)
                counts += np.bincount(ids, minlength=vocab)
                handle.write(ids.astype(dtype.newbyteorder("<")).tobytes())
    return counts


def _in_batches(slices: list[Slice], size: int) -> Iterator[list[tuple[str, bool]]]:
    """(text, whether it ends its document), some at a time so that the tokenizer uses all cores."""
    batch: list[tuple[str, bool]] = []
    for piece in slices:
        texts = list(pieces(piece.source.path, start=piece.start, stop=piece.stop))
        for index, text in enumerate(texts):
            batch.append((text, index == len(texts) - 1))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def unigram_nats(train_counts: np.ndarray, other_counts: np.ndarray) -> float:
    """Cross-entropy −Σ q·ln p with p = (count + 1)/(total + vocabulary); nats a token."""
    p = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-(other_counts * np.log(p)).sum() / other_counts.sum())


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

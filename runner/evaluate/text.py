"""The held-out tokens that models are scored on: windows of a prepared dataset, with their documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from outlay.profiles.errors import UsageError
from outlay.runner.data.dataset import TokenDataset

FEWEST_DOCUMENTS = 10
"""Below this, windows are resampled: an interval from a handful of documents says little."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Tokens [n, seq_len]; of each position the document that it belongs to, counted from 0."""

    path: str
    tokens: Integers
    documents: Integers
    vocab_size: int
    tokenizer: Path
    tokens_per_byte: float
    """Over the whole held-out part: turns nats a token into bits a byte."""

    @property
    def units(self) -> tuple[str, Integers]:
        """What is resampled (document or window), and the unit of each predicted token [n, s-1]."""
        documents = self.documents[:, 1:]
        _, unit = np.unique(documents, return_inverse=True)
        if unit.max() + 1 >= FEWEST_DOCUMENTS:
            return "document", unit.reshape(documents.shape)
        rows = np.arange(len(documents))[:, None]
        return "window", np.broadcast_to(rows, documents.shape).copy()


def held_out(folder: Path, *, seq_len: int, sequences: int) -> HeldOut:
    """The first `sequences` windows of the held-out part, as training evaluates on."""
    data = TokenDataset(folder, seq_len=seq_len, seed=0)
    count = min(sequences, data.heldout_windows)
    if count < 1:
        raise UsageError("there is not one window to evaluate on", where=str(folder))
    rows = data.heldout_batches(0, dp_size=1, micro_batch=1, sequences=count)
    tokens = np.concatenate(rows)
    # the token that ends a document belongs to it
    ends = (tokens.reshape(-1) == data.info.end_of_text).astype(np.int64)
    documents = (np.cumsum(ends) - ends).reshape(tokens.shape)
    part = data.info.heldout
    return HeldOut(
        path=str(folder),
        tokens=tokens,
        documents=documents,
        vocab_size=data.info.vocab_size,
        tokenizer=data.tokenizer_path,
        tokens_per_byte=part.tokens / max(1, part.text_bytes),
    )


def check_tokenizer(text: HeldOut, folder: Path, vocab_size: int) -> None:
    """Refuse text that was made for another vocabulary than the model in `folder` reads."""
    if text.vocab_size > vocab_size:
        raise UsageError(
            "the data has another vocabulary than the model", where=text.path,
            why=f"{text.vocab_size} tokens, {folder} has {vocab_size}",
            do="prepare the data with the model's tokenizer: outlay data prepare --tokenizer",
        )  # fmt: skip
    own = folder / "tokenizer.json"
    if not own.is_file() or own.read_bytes() == text.tokenizer.read_bytes():
        return
    from tokenizers import Tokenizer

    known, used = (Tokenizer.from_file(str(p)).get_vocab() for p in (own, text.tokenizer))
    different = sorted(word for word, number in used.items() if known.get(word) != number)
    if different:
        raise UsageError(
            "the data was made with another tokenizer than the model's", where=text.path,
            why=f"{len(different)} of {len(used)} tokens differ, such as {different[0]!r}",
            do=f"prepare the data with --tokenizer {own}",
        )  # fmt: skip

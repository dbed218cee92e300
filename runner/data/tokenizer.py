"""Byte-level BPE: train one, or read somebody's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from outlay.profiles.errors import FileError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
"""What published tokenizers call the end of a document, looked for in this order."""

TRAINING_BYTES = 6 * 2**20
"""Text that training reads. More gains little for vocabularies of this size and costs time."""

SMALLEST_VOCAB = 257
"""256 bytes and the end of text."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, limit_bytes: int = TRAINING_BYTES
) -> Tokenizer:
    """A byte-level BPE from the first `limit_bytes` of the texts; deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCAB:
        raise UsageError(
            f"a vocabulary of {vocab_size} is too small",
            why=f"256 bytes and {END_OF_TEXT} make {SMALLEST_VOCAB}",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_at_most(texts, limit_bytes), trainer)
    return tokenizer


def _at_most(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    left = limit_bytes
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text.encode("utf-8"))


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A `tokenizer.json`, or the folder that holds one."""
    from tokenizers import Tokenizer

    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileError("no such tokenizer", where=str(path), do="pass a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    # the library raises plain Exception for every kind of bad file
    except Exception as error:
        raise FileError("not a tokenizer.json", where=str(path), why=str(error)) from None


def end_of_text_id(tokenizer: Tokenizer, *, where: str) -> int:
    """The token that separates documents; an error where the tokenizer has none that we know."""
    for name in KNOWN_ENDS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return int(token)
    raise FileError(
        "the tokenizer has no end-of-text token",
        where=where,
        why=f"looked for {', '.join(KNOWN_ENDS)}",
        do="add one of them to the tokenizer's special tokens",
    )

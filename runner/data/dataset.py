"""A prepared dataset, memory-mapped, as windows in an order that any resume can take up again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from outlay.planner.spec.files import check_schema, parse, read_mapping
from outlay.profiles.errors import FileError, UsageError
from outlay.runner.data.prepare import SCHEMA_DATASET, DatasetInfo, unigram_nats

Tokens = npt.NDArray[np.int64]


class TokenDataset:
    """Windows of `seq_len` tokens that do not overlap; sample i of a run is the same tokens
    whatever the number of ranks, the micro-batch or the accumulation.
    """

    def __init__(self, folder: str | Path, *, seq_len: int, seed: int) -> None:
        self.folder = Path(folder)
        self.seq_len = seq_len
        self.seed = seed
        path = self.folder / "dataset.json"
        mapping = read_mapping(path)
        check_schema(mapping, SCHEMA_DATASET, path)
        self.info: DatasetInfo = parse(DatasetInfo, mapping, path=path)
        self._train = self._map("train", self.info.train.tokens)
        self._heldout = self._map("heldout", self.info.heldout.tokens)
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def _map(self, part: str, tokens: int) -> npt.NDArray[np.integer]:
        path = self.folder / f"{part}.bin"
        dtype = np.dtype(self.info.dtype).newbyteorder("<")
        expected = tokens * dtype.itemsize
        try:
            found = path.stat().st_size
        except OSError as error:
            raise FileError("cannot be read", where=str(path), why=str(error)) from None
        if found != expected:
            raise FileError(
                "not the file that dataset.json describes",
                where=str(path),
                why=f"{found} bytes, expected {tokens} tokens of {dtype.itemsize} = {expected}",
                do="prepare the dataset again",
            )
        if tokens < self.seq_len:
            raise UsageError(
                f"the {part} part is shorter than one window",
                where=str(path),
                why=f"{tokens} tokens, seq_len {self.seq_len}",
                do="use more text, a shorter seq_len"
                + (" or a larger held-out fraction" if part == "heldout" else ""),
            )
        return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def windows(self) -> int:
        """Training windows in one epoch."""
        return len(self._train) // self.seq_len

    @property
    def heldout_windows(self) -> int:
        return len(self._heldout) // self.seq_len

    def order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """The permutation in which an epoch reads the windows."""
        return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(self.windows)

    def sample(self, index: int) -> Tokens:
        """Sample `index` of the run, counted from 0 over all epochs."""
        epoch, position = divmod(index, self.windows)
        if epoch not in self._orders:
            self._orders = {epoch: self.order(epoch, self.seed)}
        start = int(self._orders[epoch][position]) * self.seq_len
        return self._train[start : start + self.seq_len].astype(np.int64)

    def batch(
        self,
        step: int,
        accum_index: int,
        dp_rank: int,
        *,
        dp_size: int,
        micro_batch: int,
        grad_accum: int,
    ) -> Tokens:
        """One micro-batch [micro_batch, seq_len] of one rank; `step` is counted from 0."""
        first = ((step * grad_accum + accum_index) * dp_size + dp_rank) * micro_batch
        return np.stack([self.sample(first + row) for row in range(micro_batch)])

    def heldout_batches(
        self, dp_rank: int, *, dp_size: int, micro_batch: int, sequences: int
    ) -> list[Tokens]:
        """The same windows at each evaluation, the same number of equal batches on every rank."""
        rows, count = self._heldout_grid(dp_size, micro_batch, sequences)
        return [
            np.stack(
                [self._heldout_window((i * dp_size + dp_rank) * rows + row) for row in range(rows)]
            )
            for i in range(count)
        ]

    def heldout_unigram_nats(self, *, dp_size: int, micro_batch: int, sequences: int) -> float:
        """Cross-entropy of the very tokens that a model predicts in `heldout_batches`, under the
        add-one-smoothed unigram of the training part; nats/token."""
        rows, count = self._heldout_grid(dp_size, micro_batch, sequences)
        predicted = np.concatenate(
            [self._heldout_window(i)[1:] for i in range(rows * count * dp_size)]
        )
        vocab = self.info.vocab_size
        train = np.fromfile(self.folder / "train_counts.bin", dtype="<i8")
        if len(train) != vocab or train.sum() != self.info.train.tokens:
            raise FileError(
                "not the counts that dataset.json describes",
                where=str(self.folder / "train_counts.bin"),
                do="prepare the dataset again",
            )
        return unigram_nats(train, np.bincount(predicted, minlength=vocab))

    def _heldout_grid(self, dp_size: int, micro_batch: int, sequences: int) -> tuple[int, int]:
        """(rows of a batch, batches a rank): whole batches only, since ranks must stay in step."""
        usable = min(sequences, self.heldout_windows)
        rows = min(micro_batch, usable // dp_size)
        if rows < 1:
            raise UsageError(
                "the held-out part is too short to evaluate on",
                where=str(self.folder / "heldout.bin"),
                why=f"{self.heldout_windows} windows of {self.seq_len} tokens, "
                f"{usable} to be used, for {dp_size} data-parallel ranks",
                do="use more text, a larger held-out fraction, or fewer ranks",
            )
        return rows, usable // (dp_size * rows)

    def _heldout_window(self, index: int) -> Tokens:
        start = index * self.seq_len
        return self._heldout[start : start + self.seq_len].astype(np.int64)

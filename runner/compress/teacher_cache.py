"""A teacher's top k log-probabilities of every token of a run, computed once and kept on disk.

    FOLDER/cache.json                     what they are of; written last
    FOLDER/{values,numbers,keys}-R.bin    of rank R: float16 [n, s, k], token numbers [n, s, k], uint64 [n]

A window is found by a hash of its tokens, so that the order of training, the number of ranks and a resume do not
matter. Each rank computes its share and reads all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outlay.planner.spec.files import check_schema, parse, read_mapping, to_json, write_text
from outlay.profiles.errors import OutlayError

SCHEMA_CACHE = "outlay/teacher-logits@1"


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """`cache.json`."""

    teacher: str
    """Name and size of its safetensors: another teacher is not taken for this one."""
    temperature: float
    top_k: int
    seq_len: int
    vocab_size: int
    train_sha256: str
    windows: tuple[int, ...]
    """By rank that wrote them."""
    schema: str = field(default=SCHEMA_CACHE)

    @property
    def number_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")


def teacher_name(folder: Path) -> str:
    """Name, bytes and newest change of the weights."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(p.stat().st_size for p in files)
    newest = max((p.stat().st_mtime_ns for p in files), default=0)
    return f"{folder.name}:{size}:{newest}"


def key_of(window: npt.NDArray[np.int64]) -> int:
    """64 bits that stand for the tokens of a window."""
    digest = hashlib.blake2b(np.ascontiguousarray(window, dtype="<i8").tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Cache:
    """Opened for reading; the files stay on disk and are mapped."""

    def __init__(self, folder: Path, info: CacheInfo) -> None:
        self.info = info
        shape = (info.seq_len, info.top_k)
        self._values, self._numbers = [], []
        self._row: dict[int, tuple[int, int]] = {}
        for rank, count in enumerate(info.windows):
            if count == 0:
                continue
            keys = np.fromfile(folder / f"keys-{rank}.bin", dtype="<u8")
            self._row |= {int(key): (len(self._values), row) for row, key in enumerate(keys)}
            for name, kept, dtype in (
                ("values", self._values, np.dtype("<f2")),
                ("numbers", self._numbers, info.number_dtype),
            ):
                path = folder / f"{name}-{rank}.bin"
                kept.append(np.memmap(path, dtype=dtype, mode="r", shape=(count, *shape)))

    def of(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities, token numbers) [b, s, k] of these windows [b, s]."""
        values, numbers = [], []
        for window in ids.cpu().numpy():
            found = self._row.get(key_of(window))
            if found is None:
                raise OutlayError("a window of the training data is not in the teacher's cache")
            part, row = found
            values.append(np.array(self._values[part][row]))
            numbers.append(self._numbers[part][row].astype(np.int64))
        device = ids.device
        return (
            torch.from_numpy(np.stack(values)).to(device),
            torch.from_numpy(np.stack(numbers)).to(device),
        )


class Pretended:
    """Answers any window with the same even distribution: the sizes and the work of a cache, no teacher."""

    def __init__(self, top_k: int, vocab_size: int) -> None:
        self.top_k, self.vocab_size = top_k, vocab_size

    def of(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.of`."""
        shape = (*ids.shape, self.top_k)
        values = torch.full(shape, -float(np.log(self.vocab_size)), dtype=torch.float16)
        numbers = torch.arange(self.top_k).expand(shape).contiguous()
        return values.to(ids.device), numbers.to(ids.device)


def open_cache(folder: Path, expected: CacheInfo) -> Cache | None:
    """The cache of exactly this teacher, text and k; null where there is none of it (yet)."""
    path = folder / "cache.json"
    if not path.is_file():
        return None
    mapping = read_mapping(path)
    check_schema(mapping, SCHEMA_CACHE, path)
    info = parse(CacheInfo, mapping, path=path)
    same = CacheInfo(**{**info.__dict__, "windows": expected.windows}) == expected
    covers = sum(info.windows) >= sum(expected.windows)
    return Cache(folder, info) if same and covers else None


def write_share(
    folder: Path, info: CacheInfo, rank: int, windows: Iterable[npt.NDArray[np.int64]],
    says: Callable[[torch.Tensor], torch.Tensor], device: torch.device, *, batch: int,
    may_go_on: Callable[[], bool],
) -> bool:  # fmt: skip
    """One rank's windows. `says`: ids [b, s] → logits [b, s, v]; every rank calls it equally often, with
    equal batches, where the teacher is split. False where `may_go_on` said so; then nothing is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"values": np.dtype("<f2"), "numbers": info.number_dtype, "keys": np.dtype("<u8")}
    files = {name: (folder / f"{name}-{rank}.bin").open("wb") for name in names}
    try:
        for group in _groups(windows, batch):
            if not may_go_on():
                return False
            ids = torch.from_numpy(np.stack(group)).to(device)
            p = torch.log_softmax(says(ids).float() / info.temperature, dim=-1)
            top = p.topk(info.top_k, dim=-1)
            # a log-probability below fp16's range is nothing that a student could learn from
            values = top.values.clamp(min=-60000.0).cpu().numpy()
            files["values"].write(values.astype(names["values"]).tobytes())
            files["numbers"].write(top.indices.cpu().numpy().astype(names["numbers"]).tobytes())
            keys = np.array([key_of(window) for window in group], dtype="<u8")
            files["keys"].write(keys.tobytes())
    finally:
        for opened in files.values():
            opened.close()
    return True


def _groups(
    windows: Iterable[npt.NDArray[np.int64]], size: int
) -> Iterable[list[npt.NDArray[np.int64]]]:
    group: list[npt.NDArray[np.int64]] = []
    for window in windows:
        group.append(window)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def seal(folder: Path, info: CacheInfo) -> None:
    """All shares are written: say so."""
    write_text(folder / "cache.json", to_json(info))

"""Candidates: many strategies as a struct of arrays, one element a candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outlay.planner.spec.strategy import Strategy

Array = NDArray[Any]

CHECKPOINTING = ("none", "selective", "full")
OFFLOAD = ("none", "cpu", "nvme")
LOSS = ("plain", "fused", "chunked")

_WORDS = {
    "activation_checkpointing": CHECKPOINTING,
    "offload_optimizer": OFFLOAD,
    "offload_param": OFFLOAD,
    "loss": LOSS,
}
_NULL = -1
"""Stands for null in the integer arrays."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Fields as in Strategy, each an integer array [n]; words are their index in the tuples above."""

    zero: Array
    dp: Array
    tp: Array
    pp: Array
    vpp: Array
    cp: Array
    sp: Array
    ep: Array
    micro_batch: Array
    grad_accum: Array
    activation_checkpointing: Array
    recompute_layers: Array
    sequence_parallel: Array
    offload_optimizer: Array
    offload_param: Array
    loss: Array
    reduce_bucket_size: Array
    allgather_bucket_size: Array
    overlap_comm: Array

    def __len__(self) -> int:
        return int(self.zero.shape[0])

    def take(self, index: Array | slice) -> Candidates:
        """The candidates that a mask, an index array or a slice selects."""
        if not isinstance(index, slice) and index.dtype == bool:
            index = np.flatnonzero(index)
        return Candidates(
            **{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)}
        )

    def joined(self, other: Candidates) -> Candidates:
        """These, then the others."""
        return Candidates(**{
            f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)])
            for f in dataclasses.fields(self)
        })  # fmt: skip

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Candidates:
        """One element a strategy."""
        columns: dict[str, Array] = {}
        for f in dataclasses.fields(cls):
            words = _WORDS.get(f.name)
            values = [getattr(s, f.name) for s in strategies]
            if words:
                values = [words.index(v) for v in values]
            columns[f.name] = np.array([_NULL if v is None else int(v) for v in values], np.int64)
        return cls(**columns)

    @classmethod
    def grid(cls, **axes: Sequence[int]) -> Candidates:
        """The cartesian product of the axes given; the other fields take Strategy's defaults."""
        names = list(axes)
        mesh = np.meshgrid(*(np.asarray(axes[n], np.int64) for n in names), indexing="ij")
        size = int(mesh[0].size) if mesh else 1
        base = cls.of([Strategy()])
        columns = {
            f.name: np.full(size, int(getattr(base, f.name)[0]), np.int64)
            for f in dataclasses.fields(cls)
        }
        columns |= {n: m.reshape(-1) for n, m in zip(names, mesh, strict=True)}
        return cls(**columns)

    def strategy(self, i: int) -> Strategy:
        """Candidate `i` as a Strategy."""
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = int(getattr(self, f.name)[i])
            if f.name in _WORDS:
                values[f.name] = _WORDS[f.name][value]
            elif f.name in ("sequence_parallel", "overlap_comm"):
                values[f.name] = bool(value)
            else:
                values[f.name] = None if value == _NULL else value
        return Strategy(**values)

"""Compute once for each distinct tuple of fields, then spread over the candidates.

A search of a million candidates has a few thousand distinct (tp, pp, micro-batch …): what depends on
those alone is computed on the distinct ones and gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates

T = TypeVar("T")

_FEW = 8
"""Candidates up to which each is its own kind: to look for equal ones costs more than it saves."""

_LARGEST = 1 << 20
"""Values up to this are numbered by a table of that size; larger ones by sorting."""

_ROOM = 1 << 14
"""Numbers that a tuple may take before they are numbered anew: a table of that size stays in the cache."""


def _numbered(values: Array) -> tuple[Array, int]:
    """(number of each value among the distinct ones, how many there are)."""
    low = int(values.min())
    span = int(values.max()) - low + 1
    if span == 1:
        return np.zeros(values.shape, np.int64), 1
    if span > _LARGEST:
        unique, number = np.unique(values, return_inverse=True)
        return number.reshape(-1), len(unique)
    shifted = values - low
    present = np.zeros(span, bool)
    present[shifted] = True
    return (np.cumsum(present) - 1)[shifted], int(present.sum())


def distinct(c: Candidates, names: Sequence[str], *more: Array) -> tuple[Array, Array]:
    """(index of one candidate of each distinct tuple, which of them each candidate is); the tuple is
    the fields `names` and the whole numbers `more`.

    A tuple is numbered by mixed radix, and numbered anew when that leaves the size of the table.
    """
    if len(c) <= _FEW:
        return np.arange(len(c)), np.arange(len(c))
    number, room = np.zeros(len(c), np.int64), 1
    for values in (*(getattr(c, name) for name in names), *more):
        low = int(values.min())
        span = int(values.max()) - low + 1
        if span == 1:
            continue
        shifted = values - low if low else values
        if room * span > _ROOM:
            number, room = _numbered(number)
        if room * span > _ROOM:
            shifted, span = _numbered(values)
        number, room = number * span + shifted, room * span
    number, count = _numbered(number)
    first = np.zeros(count, np.int64)
    first[number] = np.arange(len(c))
    return first, number


def gather(record: T, index: Array) -> T:
    """A dataclass of arrays (last axis: candidates) with the elements that `index` selects."""
    taken = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray) and value.ndim:
            value = value[..., index]
        elif dataclasses.is_dataclass(value):
            value = gather(value, index)
        taken[field.name] = value
    return type(record)(**taken)

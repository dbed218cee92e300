"""Bytes a token, for counting without a tokenizer: what was measured and published, as data."""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np

from outlay.profiles.offers import package_text


@dataclass(frozen=True, kw_only=True)
class BytesPerToken:
    """Measured: profiles/bytes_per_token.csv."""

    low: float
    expected: float
    high: float
    source: str


def bytes_per_token() -> BytesPerToken:
    """Expected: the geometric mean of what was measured; ends: its extremes."""
    table = list(csv.DictReader(_no_comments(package_text("bytes_per_token.csv"))))
    values = np.array([float(r["bytes_per_token"]) for r in table])
    sources = sorted({f"{r['source']}, {r['date']}" for r in table})
    return BytesPerToken(
        low=float(values.min()), high=float(values.max()),
        expected=float(np.exp(np.log(values).mean())), source="; ".join(sources),
    )  # fmt: skip


def _no_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]

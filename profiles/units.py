"""Numbers with units as people write them: `20B`, `80GiB`, `3d`, `5000usd`.

Inside, everything is bytes, seconds, FLOPs and USD; this is the one place that parses.
"""

from __future__ import annotations

import math
import re

from outlay.profiles.errors import UsageError
from outlay.profiles.money import format_money, shown

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

COUNT_SUFFIX = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
BYTE_SUFFIX = {
    "": 1.0, "b": 1.0,
    "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
}  # fmt: skip
SECOND_SUFFIX = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_NUMBER = re.compile(
    r"^\s*([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%/]*\d?[a-z]*)\s*$",
    re.I,
)
"""Commas only between groups of three: `1,5B` is refused, not read as fifteen."""


def split_number(text: str, *, where: str = "") -> tuple[float, str]:
    """`"5000usd"` → `(5000.0, "usd")`; the unit is lower case and may be empty."""
    match = _NUMBER.match(str(text))
    if not match:
        raise UsageError(f"{text!r} is not a number with a unit", where=where)
    value = float(match.group(1).replace(",", "").replace("_", ""))
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is not a finite number", where=where)
    return value, match.group(2).lower()


def _parse(text: str, suffixes: dict[str, float], what: str, where: str) -> float:
    value, unit = split_number(text, where=where)
    if unit not in suffixes:
        known = ", ".join(s for s in suffixes if s)
        raise UsageError(
            f"{text!r}: {unit!r} is not a unit of {what}", where=where, do=f"use {known}"
        )
    if value < 0:
        raise UsageError(f"{text!r}: {what} cannot be negative", where=where)
    scaled = value * suffixes[unit]
    if not math.isfinite(scaled):
        raise UsageError(f"{text!r} is not a finite number", where=where)
    return scaled


def parse_count(text: str | float, *, where: str = "") -> int:
    """`"20B"` → 20_000_000_000. Fractions are allowed only where the product is whole."""
    value = _parse(str(text), COUNT_SUFFIX, "a count", where)
    if abs(value - round(value)) > 1e-6 * max(1.0, value):
        raise UsageError(f"{text!r} is not a whole number", where=where)
    return round(value)


def parse_bytes(text: str | float, *, where: str = "") -> int:
    """`"80GiB"` → bytes. `GB` is 1e9, `GiB` is 2**30."""
    return round(_parse(str(text), BYTE_SUFFIX, "bytes", where))


def parse_seconds(text: str | float, *, where: str = "") -> float:
    """`"3d"` → 259200.0. A bare number is refused: seconds, minutes and hours are too easily mixed."""
    return _parse(str(text), SECOND_SUFFIX, "time", where)


def format_bytes(value_bytes: float) -> str:
    """`3221225472` → `"3.00 GiB"`."""
    for size, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(value_bytes) >= size:
            return (
                f"{value_bytes / size:.2f} {name}"
                if size >= GIB
                else f"{value_bytes / size:.0f} {name}"
            )
    return f"{value_bytes:.0f} B"


def format_seconds(value_s: float) -> str:
    """`5400` → `"1.5 h"`; `0.0123` → `"12 ms"`."""
    if value_s >= 2 * 86400:
        return f"{value_s / 86400:.1f} d"
    if value_s >= 3600:
        return f"{value_s / 3600:.1f} h"
    if value_s >= 120:
        return f"{value_s / 60:.1f} min"
    if value_s >= 1:
        return f"{value_s:.1f} s" if value_s >= 10 else f"{value_s:.2f} s"
    return f"{value_s * 1e3:.0f} ms" if value_s >= 1e-3 else f"{value_s * 1e6:.0f} µs"


def format_count(value: float) -> str:
    """`8030261248` → `"8.03B"`."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:,.0f}{name}" if abs(scaled) >= 999.5 else f"{scaled:.3g}{name}"
    return f"{value:.3g}"


def format_usd(value_usd: float) -> str:
    """`1234.5` → `"1,234 USD"`, or in the currency that is shown; small amounts keep their cents and below."""
    currency = shown()
    return format_money(value_usd / currency.usd, currency.name)

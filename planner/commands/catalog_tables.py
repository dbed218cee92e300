"""Tables of `outlay catalog list`: what can be bought, what totals take for granted, what electricity is."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Each column as wide as its widest cell, the last as it is."""
    last = len(rows[0]) - 1
    wide = [max(len(row[k]) for row in rows) for k in range(last)]
    return [
        "  ".join([*(row[k].ljust(wide[k]) for k in range(last)), row[last]]).rstrip()
        for row in rows
    ]


def purchases() -> list[tuple[str, ...]]:
    """Accelerator, price, what it is of, date, source."""
    from outlay.profiles.purchase import shipped_purchases

    of = {"accelerator": "alone", "server": "with its share of the server"}
    rows: list[tuple[str, ...]] = []
    for name, p in sorted(shipped_purchases().items()):
        rows.append((name, f"{p.usd:,.0f} USD", of[p.includes], p.date or "", p.source))
    return rows


def assumptions() -> list[tuple[str, ...]]:
    """Name, expected value, ends from cheap to dear, meaning, source."""
    from outlay.planner.assumed import figures

    rows: list[tuple[str, ...]] = []
    for name, f in figures().items():
        a = f.assumption
        rows.append((name, f"{a.expected:.6g}", f"{a.low:.6g} to {a.high:.6g}", f.says, a.source))
    return rows


def regions() -> list[tuple[str, ...]]:
    """Region, place, what a kWh emits on what basis and costs."""
    from outlay.profiles.offers import carbon_intensities, electricity_prices

    carbon, price = carbon_intensities(), electricity_prices()
    rows: list[tuple[str, ...]] = []
    for name in sorted({*carbon, *price}):
        c, e = carbon.get(name), price.get(name)
        emitted = "unknown" if c is None else f"{c.gco2e_per_kwh:g} g CO2e/kWh, {c.basis}, {c.year}"
        paid = "" if e is None else f"{e.industrial_usd_per_kwh:g} USD/kWh, industry, {e.year}"
        rows.append((name, "" if c is None else c.place, emitted, paid))
    return rows


TABLES: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "purchases": purchases, "assumptions": assumptions, "regions": regions,
}  # fmt: skip

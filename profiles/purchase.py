"""What accelerators cost to buy: `purchase.csv`, and prices that a person states."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from outlay.profiles.errors import FileError, UnknownName, UsageError
from outlay.profiles.loader import accelerators, aliases
from outlay.profiles.offers import package_text
from outlay.profiles.rows import Row, read_rows

STATED = "--purchase-usd"


@dataclass(frozen=True, kw_only=True)
class Purchase:
    """A price of one accelerator, new."""

    accelerator: str
    usd: float
    includes: Literal["accelerator", "server"]
    """accelerator = the card, module or board share alone; server = its share of a whole server."""
    date: str | None
    """ISO, a day or a month; null = stated by the person."""
    source: str


def _purchase(row: Row) -> Purchase:
    name, includes, date = row.text("accelerator"), row.text("includes"), row.text("date")
    if name not in accelerators():
        raise UnknownName("accelerator", name, accelerators(), where=row.at("accelerator"))
    if includes not in ("accelerator", "server"):
        raise FileError(f"{includes!r} is neither accelerator nor server", where=row.at("includes"))
    try:
        datetime.date.fromisoformat(date if len(date) > 7 else f"{date}-01")
    except ValueError:
        raise FileError(f"{date!r} is not a date", where=row.at("date")) from None
    return Purchase(
        accelerator=name, usd=row.need("usd"), includes=includes,  # type: ignore[arg-type]
        date=date, source=row.text("source"),
    )  # fmt: skip


@cache
def shipped_purchases() -> dict[str, Purchase]:
    """By accelerator."""
    rows = read_rows(package_text("purchase.csv"), "purchase.csv", _purchase)
    return {row.accelerator: row for row in rows}


def stated_purchases(texts: Iterable[str]) -> dict[str, Purchase]:
    """`["h100-sxm=31000"]`: USD for one accelerator with its share of the server."""
    found = {}
    for text in texts:
        name, sign, number = text.strip().lower().partition("=")
        name = aliases().get(name, name)
        try:
            usd = float(number.replace(",", ""))
        except ValueError:
            usd = math.nan
        if not sign or not 0 < usd < math.inf:
            raise UsageError(
                f"{text!r} is not a price", where=STATED,
                do="give USD for one accelerator with its share of the server: h100-sxm=31000",
            )  # fmt: skip
        if name not in accelerators():
            raise UnknownName("accelerator", name, accelerators(), where=STATED)
        found[name] = Purchase(
            accelerator=name, usd=usd, includes="server", date=None, source=STATED
        )
    return found

"""Currencies at a stated rate. Inside, all money is USD; this is where another currency comes in and goes out.

There is no built-in rate: rates change daily, and a price that was converted at an old one is a wrong price.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass

from outlay.profiles.errors import UsageError

_CODE = re.compile(r"[a-z]{3}")
_MOST = 1e6
"""USD for one unit of any currency, and units for one USD; beyond, it is a slip."""


@dataclass(frozen=True, kw_only=True)
class Currency:
    """What money is shown in."""

    code: str = "usd"
    """Three letters, lower case."""
    usd: float = 1.0
    """USD for one of it, as stated with --rate."""

    def __post_init__(self) -> None:
        if not _CODE.fullmatch(self.code):
            raise UsageError(
                f"{self.code!r} is not a currency", where="--currency",
                do="give its three letters: eur, gbp, cny",
            )  # fmt: skip
        if not 1 / _MOST <= self.usd <= _MOST:
            raise UsageError(f"{self.usd:g} USD for one {self.code.upper()} makes no sense",
                             where="--rate", do="give USD for one: --rate eur=1.08")  # fmt: skip
        if self.code == "usd" and self.usd != 1.0:
            raise UsageError("1 USD is 1 USD", where="--rate", why=f"usd={self.usd:g} was given")

    @property
    def name(self) -> str:
        return self.code.upper()

    def note(self) -> dict[str, object]:
        """The line among the assumptions."""
        source = f"1 {self.name} = {self.usd:g} USD, stated with --rate; prices of the catalog are in USD"
        return {"what": "currency", "value": self.name, "source": source}


USD = Currency()
_shown: ContextVar[Currency] = ContextVar("shown", default=USD)


def shown() -> Currency:
    """What money is shown in now."""
    return _shown.get()


def show_in(currency: Currency | None) -> Token[Currency]:
    """From here on; `unshow` ends it."""
    return _shown.set(currency or USD)


def unshow(token: Token[Currency]) -> None:
    _shown.reset(token)


@contextmanager
def showing(currency: Currency | None) -> Iterator[None]:
    """Within."""
    token = show_in(currency)
    try:
        yield
    finally:
        unshow(token)


def parse_rates(texts: Iterable[str] | str | Mapping[str, float] | None) -> dict[str, float]:
    """`["eur=1.08", "cny=0.14"]` → USD for one of each; usd is always 1."""
    if isinstance(texts, Mapping):
        texts = [f"{k}={v}" for k, v in texts.items()]
    rates = {"usd": 1.0}
    rates = {"usd": 1.0}
    for text in (texts,) if isinstance(texts, str) else texts or ():
        code, sign, number = text.strip().lower().partition("=")
        try:
            usd = float(number)
        except ValueError:
            usd = math.nan
        if not sign or not math.isfinite(usd):
            raise UsageError(f"{text!r} is not a rate", where="--rate",
                             do="give USD for one of the currency: --rate eur=1.08")  # fmt: skip
        code = code.strip()
        if code != "usd" and rates.get(code, usd) != usd:
            raise UsageError(
                f"two rates for {code.upper()}: {rates[code]:g} and {usd:g}", where="--rate"
            )
        rates[code] = Currency(code=code, usd=usd).usd
    return rates


def no_rate(code: str, *, where: str) -> UsageError:
    """What is said where a currency has no rate."""
    return UsageError(
        f"no rate for {code.upper()} is known", where=where,
        why="none is built in: rates change daily",
        do=f"state it, USD for one {code.upper()}: --rate {code}=1.08 (with your figure)",
    )  # fmt: skip


def currency_of(code: str | None, rates: Mapping[str, float]) -> Currency | None:
    """The currency that was asked for; null = USD."""
    if code is None:
        return None
    code = code.strip().lower()
    if code not in rates:
        Currency(code=code)  # what is no currency is said first
        raise no_rate(code, where="--currency")
    return None if code == "usd" else Currency(code=code, usd=rates[code])


def format_money(value: float, name: str) -> str:
    """`1234.5, "EUR"` → `"1,234 EUR"`; small amounts keep their cents and below."""
    if abs(value) >= 100:
        return f"{value:,.0f} {name}"
    return f"{value:.2f} {name}" if abs(value) >= 1 else f"{value:.4f} {name}"

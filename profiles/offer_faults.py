"""What cannot be meant in a row of prices; the same checks for ours and for a person's own."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

from outlay.profiles.offers import Instance

DEAREST_USD_PER_H = 200.0
"""For one accelerator; catalogs write 700 and the like where there is no price."""
CHEAPEST_USD_PER_H = 0.01
"""For one accelerator; below it a price is a count of cents or of seconds that lost its unit."""
MOST_IN_A_NODE = 1024
"""Accelerators that are rented out as one node; slices of a TPU (`ici`) are larger."""
MOST_IN_A_SLICE = 10_000
OLDEST = "2010-01-01"

PRICES = (
    ("on_demand_usd_per_h", "price_date"),
    ("spot_usd_per_h", "spot_date"),
    ("spot_least_usd_per_h", "spot_date"),
    ("reserved_1y_usd_per_h", "reserved_date"),
)
"""Column of a price → the column of its date."""


def faults_of(node: Instance, today: datetime.date | None = None) -> Iterator[tuple[str, str]]:
    """(column, what is wrong) for each thing that is."""
    if not re.fullmatch(r"[a-z0-9-]+", node.provider):
        yield "provider", f"{node.provider!r} is not made of lower-case letters, digits and -"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", node.name):
        yield "name", f"{node.name!r} is not made of letters, digits, dots, - and _"
    most = MOST_IN_A_SLICE if node.interconnect == "ici" else MOST_IN_A_NODE
    if node.count > most:
        yield "count", f"{node.count} accelerators in one node; at most {most}"
    if node.interconnect is not None and (node.interconnect == "none") != (node.count == 1):
        yield "interconnect", f"{node.interconnect!r} cannot join {node.count} accelerators"
    yield from _price_faults(node)
    yield from _date_faults(node, today or datetime.date.today())


def _price_faults(node: Instance) -> Iterator[tuple[str, str]]:
    for column, _ in PRICES:
        usd = getattr(node, column)
        if usd is None:
            continue
        least, most = CHEAPEST_USD_PER_H * node.count, DEAREST_USD_PER_H * node.count
        if usd <= 0:
            yield column, f"a price of {usd:g} USD/h; leave it empty where it is not known"
        elif not least <= usd <= most:
            yield (
                column,
                f"{usd:g} USD/h is no plausible price of {node.count} {node.accelerator} "
                f"({least:g} to {most:g} USD/h for the whole node)",
            )
    listed = node.on_demand_usd_per_h
    for column in ("spot_usd_per_h", "reserved_1y_usd_per_h"):
        usd = getattr(node, column)
        if listed is not None and usd is not None and usd >= listed:
            yield column, f"{usd:g} USD/h is not below the price on demand, {listed:g} USD/h"
    least_spot, spot = node.spot_least_usd_per_h, node.spot_usd_per_h
    if least_spot is not None and (spot is None or least_spot > spot):
        yield "spot_least_usd_per_h", f"{least_spot:g} USD/h is above spot_usd_per_h ({spot})"


def _date_faults(node: Instance, today: datetime.date) -> Iterator[tuple[str, str]]:
    for price, column in PRICES:
        date = getattr(node, column)
        if date is None or price == "spot_least_usd_per_h":
            continue
        try:
            day = datetime.date.fromisoformat(date)
        except ValueError:
            yield column, f"{date!r} is not a date as 2026-01-31"
            continue
        if day.isoformat() != date:
            yield column, f"{date!r} is not a date as 2026-01-31"
        elif day > today + datetime.timedelta(days=1):  # elsewhere it is tomorrow already
            yield column, f"{date} is in the future (today is {today})"
        elif date < OLDEST:
            yield column, f"{date} is before {OLDEST}"
        elif getattr(node, price) is None:
            yield column, f"dates a price that is not there ({price})"

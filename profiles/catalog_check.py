"""`outlay catalog check`: is every row of ours and of the person's layer what it can be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from outlay.profiles.errors import OutlayError, UsageError
from outlay.profiles.loader import Accelerator, accelerator, accelerators
from outlay.profiles.offer_faults import faults_of
from outlay.profiles.offers import (
    Instance,
    carbon_intensities,
    electricity_prices,
    instance_of,
    package_files,
    package_text,
)
from outlay.profiles.own_offers import layer_files, own_instance, own_rows
from outlay.profiles.rows import Row, csv_rows

NUMBERS = (
    "memory_bytes", "usable_bytes", "memory_bytes_per_s", "sm_count", "tdp_w",
    "pcie_bytes_per_s", "nvlink_bytes_per_s", "nvlink_domain",
)  # fmt: skip
"""Figures of an accelerator that are sourced, or null with the reason."""


def shipped_faults() -> tuple[dict[str, int], list[str]]:
    """How many of each kind were looked at, and what is wrong with them."""
    rows = [
        (name, row)
        for name in package_files("instances", ".csv")
        for row in csv_rows(package_text(name), name)
    ]
    found = list(_rows_faults([row for _, row in rows], _shipped))
    cards = accelerators()
    for card in cards.values():
        found += [f"accelerators: {card.name}: {fault}" for fault in accelerator_faults(card)]
    for name, read in (("carbon.csv", carbon_intensities), ("electricity.csv", electricity_prices)):
        try:
            read()
        except OutlayError as error:
            found.append(f"{name}: {_line(error)}")
    return {"accelerators": len(cards), "instances": len(rows)}, found


def own_faults() -> tuple[int, list[str]]:
    """How many rows the person's layer has, and what is wrong with them, file by file."""
    rows: list[Row] = []
    written: list[Row] = []
    found: list[str] = []
    for path, _, _ in layer_files():
        try:
            of_file = list(own_rows(path))
        except OutlayError as error:
            found.append(_line(error))
            continue
        rows += of_file
        if path.name.startswith("refreshed-"):
            found += _rows_faults(of_file, _own(path))
        else:
            written += of_file
    # What a person wrote may replace what was fetched, but not what the same person wrote elsewhere.
    return len(rows), found + list(_rows_faults(written, _own_of_any))


def _own(path: Path) -> Callable[[Row], Instance]:
    return lambda row: own_instance(row, path.name)


def _own_of_any(row: Row) -> Instance:
    return own_instance(row, Path(row.where.rpartition(":")[0]).name)


def _shipped(row: Row) -> Instance:
    node = instance_of(row)
    if accelerator(node.accelerator).name != node.accelerator:
        raise UsageError(f"{node.accelerator!r} is an alias", where=row.at("accelerator"))
    return node


def _line(error: OutlayError) -> str:
    return error.message().replace("\n", ";")


def _rows_faults(rows: Iterable[Row], build: Callable[[Row], Instance]) -> Iterator[str]:
    first: dict[tuple[str, str, str | None], str] = {}
    for row in rows:
        try:
            node = build(row)
        except OutlayError as error:
            text = _line(error)
            yield text if text.startswith(row.where) else f"{row.where}: {text}"
            continue
        for column, fault in faults_of(node):
            yield f"{row.at(column)}: {fault}"
        if node.key in first:
            yield (
                f"{row.where}: {node.provider}/{node.name} in {node.region or 'no region'} "
                f"is at {first[node.key]} too"
            )
        first.setdefault(node.key, row.where)


def accelerator_faults(card: Accelerator) -> Iterator[str]:
    """Every figure positive, with its source; every gap with its reason."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.name):
        yield "the name is not lower case with dashes"
    for field in NUMBERS:
        value = getattr(card, field)
        if value is None:
            if not card.unknown.get(field):
                yield f"{field} is null without a reason"
            continue
        if not card.sources.get(field):
            yield f"{field} has no source"
        if value < 0 or (value == 0 and field != "nvlink_bytes_per_s"):
            yield f"{field} = {value}"
    for precision, rate in card.flops.items():
        if rate <= 0:
            yield f"flops.{precision} = {rate}"
        if not card.sources.get(f"flops.{precision}"):
            yield f"flops.{precision} has no source"
    usable, marketed = card.usable_bytes, card.memory_bytes
    if usable and marketed and not 0.9 <= usable / marketed <= 1.074:
        yield f"usable memory is {usable / marketed:.2f} of what is marketed"

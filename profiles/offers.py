"""What is for rent, at what price; what electricity costs and emits. Files are read once.

    instances/*.csv     one file a provider, one row a node that can be rented
    carbon.csv, electricity.csv

Prices age: each row has its date, and `read_instances` takes a person's own in the same columns.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from outlay.profiles.errors import FileError, UnknownName, UsageError
from outlay.profiles.units import GIB

T = TypeVar("T")

INTERCONNECTS = (
    "none", "pcie", "nvlink", "nvlink-pairs", "nvswitch", "xgmi", "ici", "neuronlink",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One kind of node that somebody rents out. Prices are of the whole node; null = unknown."""

    provider: str
    name: str
    region: str | None
    accelerator: str
    """Catalog name."""
    count: int
    """Accelerators in the node."""
    vcpus: int | None
    ram_bytes: int | None
    nvme_bytes: int | None
    """Local disks; 0 = none."""
    interconnect: str | None
    """One of INTERCONNECTS: `nvlink` = direct links or a mesh, `nvlink-pairs` = bridges of two."""
    inter_node_bytes_per_s: float | None
    """Of the node, one direction."""
    on_demand_usd_per_h: float | None
    price_date: str | None
    """Of the on-demand price, ISO; null = the source is not dated."""
    spot_usd_per_h: float | None
    """Median over zones where the source has several, else its only figure."""
    spot_least_usd_per_h: float | None
    spot_date: str | None
    reserved_1y_usd_per_h: float | None
    reserved_date: str | None
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class CarbonIntensity:
    """What a kWh of electricity emits in one region."""

    region: str
    """A cloud's region (`us-central1`), a US state (`US-Texas`) or a country (`FRA`)."""
    scope: str
    provider: str | None
    place: str
    gco2e_per_kwh: float
    basis: str
    """operational | lifecycle; the two are not comparable."""
    year: int
    source: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class ElectricityPrice:
    """What a kWh costs in one region."""

    region: str
    industrial_usd_per_kwh: float
    commercial_usd_per_kwh: float | None
    all_sectors_usd_per_kwh: float | None
    year: int
    source: str
    licence: str


def package_text(name: str) -> str:
    """A file of this package; `name` is relative to `profiles/`."""
    return (files("outlay.profiles") / name).read_text(encoding="utf-8")


def package_files(folder: str, ending: str) -> list[str]:
    """The files of one folder of this package, sorted."""
    found = (files("outlay.profiles") / folder).iterdir()
    return sorted(f"{folder}/{f.name}" for f in found if f.name.endswith(ending))


@dataclass(frozen=True)
class _Row:
    """One row of a CSV file; empty = null, and an error names file, line and column."""

    cells: dict[str, str | None]
    where: str

    def maybe(self, column: str) -> str | None:
        if column not in self.cells:
            raise FileError(f"there is no column {column}", where=self.where)
        return self.cells[column] or None

    def text(self, column: str) -> str:
        value = self.maybe(column)
        if value is None:
            raise FileError("is empty", where=f"{self.where}: {column}")
        return value

    def number(self, column: str, unit: float = 1.0) -> float | None:
        value = self.maybe(column)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise FileError(
                f"{value!r} is not a number of at least 0", where=f"{self.where}: {column}"
            )
        return number * unit

    def whole(self, column: str, unit: float = 1.0) -> int | None:
        number = self.number(column, unit)
        return None if number is None else round(number)

    def need(self, column: str) -> float:
        self.text(column)
        return self.number(column) or 0.0


def _read_rows(text: str, where: str, build: Callable[[_Row], T]) -> tuple[T, ...]:
    """CSV with `#` comment lines at its head."""
    lines = text.splitlines()
    skip = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    reader = csv.DictReader(lines[skip:])
    return tuple(build(_Row(row, f"{where}:{skip + reader.line_num}")) for row in reader)


def _instance(row: _Row) -> Instance:
    link = row.maybe("interconnect")
    if link is not None and link not in INTERCONNECTS:
        raise UnknownName("interconnect", link, INTERCONNECTS, where=row.where)
    return Instance(
        provider=row.text("provider"),
        name=row.text("name"),
        region=row.maybe("region"),
        accelerator=row.text("accelerator"),
        count=round(row.need("count")),
        vcpus=row.whole("vcpus"),
        ram_bytes=row.whole("ram_gib", GIB),
        nvme_bytes=row.whole("nvme_gb", 1e9),
        interconnect=link,
        inter_node_bytes_per_s=row.number("inter_node_gbps", 1e9 / 8),
        on_demand_usd_per_h=row.number("on_demand_usd_per_h"),
        price_date=row.maybe("price_date"),
        spot_usd_per_h=row.number("spot_usd_per_h"),
        spot_least_usd_per_h=row.number("spot_least_usd_per_h"),
        spot_date=row.maybe("spot_date"),
        reserved_1y_usd_per_h=row.number("reserved_1y_usd_per_h"),
        reserved_date=row.maybe("reserved_date"),
        source=row.text("source"),
        note=row.maybe("note") or "",
    )


def read_instances(path: Path) -> tuple[Instance, ...]:
    """Prices of one's own: a CSV file with the columns of `profiles/instances/*.csv`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError("cannot be read", where=str(path), why=str(error)) from None
    return _read_rows(text, str(path), _instance)


@cache
def instances() -> tuple[Instance, ...]:
    """Every node of the catalog, by provider."""
    return tuple(
        node
        for name in package_files("instances", ".csv")
        for node in _read_rows(package_text(name), name, _instance)
    )


def instance(provider: str, name: str, region: str | None = None) -> Instance:
    """That node; UnknownName with the nearest, UsageError where several regions have it."""
    providers = {node.provider for node in instances()}
    if provider.lower() not in providers:
        raise UnknownName("provider", provider, providers)
    offered = [node for node in instances() if node.provider == provider.lower()]
    found = [node for node in offered if node.name.lower() == name.lower()]
    if not found:
        raise UnknownName(f"{provider.lower()} instance", name, {node.name for node in offered})
    if region is not None:
        here = [node for node in found if node.region == region]
        if not here:
            regions = {node.region or "(no region)" for node in found}
            raise UnknownName(f"region of {provider.lower()}/{name}", region, regions)
        found = here
    if len(found) > 1:
        raise UsageError(
            f"{provider}/{name} is priced in several regions",
            do="choose one of " + ", ".join(str(node.region) for node in found),
        )
    return found[0]


@cache
def carbon_intensities() -> dict[str, CarbonIntensity]:
    """By region."""
    rows = _read_rows(package_text("carbon.csv"), "carbon.csv", _carbon_intensity)
    return {row.region: row for row in rows}


@cache
def electricity_prices() -> dict[str, ElectricityPrice]:
    """By region."""
    rows = _read_rows(package_text("electricity.csv"), "electricity.csv", _electricity_price)
    return {row.region: row for row in rows}


def _carbon_intensity(row: _Row) -> CarbonIntensity:
    return CarbonIntensity(
        region=row.text("region"),
        scope=row.text("scope"),
        provider=row.maybe("provider"),
        place=row.text("place"),
        gco2e_per_kwh=row.need("gco2e_per_kwh"),
        basis=row.text("basis"),
        year=round(row.need("year")),
        source=row.text("source"),
        licence=row.text("licence"),
    )


def _electricity_price(row: _Row) -> ElectricityPrice:
    return ElectricityPrice(
        region=row.text("region"),
        industrial_usd_per_kwh=row.need("industrial_usd_per_kwh"),
        commercial_usd_per_kwh=row.number("commercial_usd_per_kwh"),
        all_sectors_usd_per_kwh=row.number("all_sectors_usd_per_kwh"),
        year=round(row.need("year")),
        source=row.text("source"),
        licence=row.text("licence"),
    )

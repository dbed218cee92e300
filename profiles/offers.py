"""What is for rent, at what price; what electricity costs and emits. Files are read once.

    instances/*.csv     one file a provider, one row a node that can be rented
    carbon.csv, electricity.csv

Prices age: each row has its date. A person's own rows, in the same columns, lie over ours
(`own_offers`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from outlay.profiles.errors import UnknownName, UsageError
from outlay.profiles.rows import Row, read_rows
from outlay.profiles.units import GIB

OURS = "outlay"
"""Origin of the rows that are shipped."""

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
    origin: str = OURS
    """Which catalog the row is from: OURS, or the name of a file in the person's own layer."""

    @property
    def key(self) -> tuple[str, str, str | None]:
        """What makes a row the same as another: the later one replaces it."""
        return self.provider, self.name.lower(), self.region


@dataclass(frozen=True, kw_only=True)
class CarbonIntensity:
    """What a kWh of electricity emits in one region."""

    region: str
    """A cloud's region (`us-central1`), a US state (`TX`) or a country (`FRA`)."""
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


def instance_of(row: Row) -> Instance:
    """A row of `instances/*.csv`."""
    link = row.maybe("interconnect")
    if link is not None and link not in INTERCONNECTS:
        raise UnknownName("interconnect", link, INTERCONNECTS, where=row.where)
    return Instance(
        provider=row.text("provider"),
        name=row.text("name"),
        region=row.maybe("region"),
        accelerator=row.text("accelerator"),
        count=row.count("count"),
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
    """Prices of one's own: a CSV or YAML file with the columns of `instances/*.csv`."""
    from outlay.profiles.own_offers import read_own

    return read_own(path)


@cache
def shipped_instances() -> tuple[Instance, ...]:
    """Every node of the catalog that is shipped, by provider."""
    return tuple(
        node
        for name in package_files("instances", ".csv")
        for node in read_rows(package_text(name), name, instance_of)
    )


def instances() -> tuple[Instance, ...]:
    """Every node for rent: what is shipped, with the person's own layer over it.

    A row of the layer replaces ours of that provider, name and region; one without a region
    replaces ours in every region.
    """
    # Imported here: the layer's rows are checked against the accelerators, whose module needs this.
    from outlay.profiles.own_offers import layer_files

    return _layered(layer_files())


@cache
def _layered(layer: tuple[tuple[Path, int, int], ...]) -> tuple[Instance, ...]:
    """Keyed by the layer's files with their times and sizes, so that a new import is seen."""
    if not layer:
        return shipped_instances()
    from outlay.profiles.own_offers import read_own

    found = {node.key: node for node in shipped_instances()}
    shapes = {node.key[:2]: node for node in shipped_instances()}
    for path, _, _ in layer:
        for node in read_own(path, origin=path.name):
            if node.region is None:
                replaced = [
                    k for k, n in found.items() if n.origin == OURS and k[:2] == node.key[:2]
                ]
                for key in replaced:
                    del found[key]
            shape = shapes.get(node.key[:2])
            found[node.key] = node if shape is None else _with_shape(node, shape)
    return tuple(found.values())


def _with_shape(own: Instance, shape: Instance) -> Instance:
    """A price of one's own for a node that is known: what it leaves out of the shape is filled in."""
    if (own.accelerator, own.count) != (shape.accelerator, shape.count):
        return own
    fields = ("vcpus", "ram_bytes", "nvme_bytes", "interconnect", "inter_node_bytes_per_s")
    gaps = {name: getattr(shape, name) for name in fields if getattr(own, name) is None}
    return dataclasses.replace(own, **gaps)


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
    # A person's own price is meant before one of ours in another region.
    found = [node for node in found if node.origin != OURS] or found
    if len(found) > 1:
        raise UsageError(
            f"{provider}/{name} is priced in several regions",
            do="choose one of " + ", ".join(str(node.region) for node in found),
        )
    return found[0]


@cache
def carbon_intensities() -> dict[str, CarbonIntensity]:
    """By region."""
    rows = read_rows(package_text("carbon.csv"), "carbon.csv", _carbon_intensity)
    return {row.region: row for row in rows}


@cache
def electricity_prices() -> dict[str, ElectricityPrice]:
    """By region."""
    rows = read_rows(package_text("electricity.csv"), "electricity.csv", _electricity_price)
    return {row.region: row for row in rows}


def carbon_in(region: str) -> CarbonIntensity | None:
    """That region's, a state by either of its names (`TX`, `US-Texas`); null where there is none."""
    wanted = region.casefold()
    rows = carbon_intensities().values()
    return next((r for r in rows if r.region.casefold() == wanted), None) or next(
        (r for r in rows if r.scope == "us_state" and f"us-{r.place}".casefold() == wanted), None
    )


def electricity_in(region: str) -> ElectricityPrice | None:
    """That region's, a state by either of its names; null where there is none."""
    found = carbon_in(region)
    names = {region.casefold()} | ({f"us-{found.place}".casefold()} if found else set())
    rows = electricity_prices().values()
    return next((r for r in rows if r.region.casefold() in names), None)


def _carbon_intensity(row: Row) -> CarbonIntensity:
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


def _electricity_price(row: Row) -> ElectricityPrice:
    return ElectricityPrice(
        region=row.text("region"),
        industrial_usd_per_kwh=row.need("industrial_usd_per_kwh"),
        commercial_usd_per_kwh=row.number("commercial_usd_per_kwh"),
        all_sectors_usd_per_kwh=row.number("all_sectors_usd_per_kwh"),
        year=round(row.need("year")),
        source=row.text("source"),
        licence=row.text("licence"),
    )

"""gpuhunt's offers → rows of the catalog: whose accelerator is known, and one region a node."""

from __future__ import annotations

import dataclasses
import datetime
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from outlay.profiles.loader import Accelerator, accelerator, accelerators
from outlay.profiles.offer_faults import faults_of
from outlay.profiles.offers import Instance, package_files, package_text, shipped_instances
from outlay.profiles.rows import Row, read_rows

MEMORY_TOLERANCE = 0.08
"""GB and GiB are mixed in the offers: 80 GB is 74.5 GiB, B200's 192 GB are sold as 180."""


class Item(Protocol):
    """What is read of a gpuhunt.CatalogItem."""

    instance_name: str
    location: str
    price: float
    cpu: int
    memory: float
    gpu_count: int
    gpu_name: str | None
    gpu_memory: float | None
    spot: bool


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What a provider's offers came to."""

    nodes: tuple[Instance, ...]
    unmatched: dict[str, int]
    """Accelerator as the provider calls it → offers that were left out, the catalog not knowing it."""
    implausible: int
    """Offers whose price or count cannot be meant."""


@dataclass(frozen=True, kw_only=True)
class _Name:
    gpu: str
    memory_gb: float
    word: str
    accelerator: str


@cache
def _names() -> tuple[_Name, ...]:
    def build(row: Row) -> _Name:
        return _Name(
            gpu=row.text("gpu_name").lower(),
            memory_gb=row.need("memory_gb"),
            word=row.maybe("word") or "",
            accelerator=row.text("accelerator"),
        )

    return read_rows(package_text("gpuhunt_names.csv"), "gpuhunt_names.csv", build)


@cache
def _nvml() -> dict[str, list[Accelerator]]:
    found: dict[str, list[Accelerator]] = defaultdict(list)
    for card in accelerators().values():
        for name in card.nvml_names:
            found[name.lower()].append(card)
    return found


@cache
def _left_out_on_purpose() -> frozenset[str]:
    """Parts of a GPU and the like: the heads of our files say what was left out, and why."""
    heads = "".join(package_text(name) for name in package_files("instances", ".csv"))
    listed = re.findall(r"^# Left out, .*: ([^:]+)\.$", heads, re.MULTILINE)
    return frozenset(name for names in listed for name in names.split(", "))


def _near(gb: float | None, card: Accelerator) -> bool:
    if not gb or not card.memory_bytes:
        return gb is None
    return abs(gb * 1e9 / card.memory_bytes - 1) <= MEMORY_TOLERANCE


def _known(provider: str, name: str, count: int) -> Instance | None:
    """Our row of that node, in any region."""
    wanted = (provider, name.lower())
    return next((n for n in shipped_instances() if n.key[:2] == wanted and n.count == count), None)


def accelerator_of(provider: str, item: Item) -> str | None:
    """Catalog name; null where what is said does not decide between two (A100: SXM or PCIe?).

    In this order: the node is one of ours; its name is what NVML calls the GPU; the table of
    names, which may ask for a word (`sxm`) in the node's own name.
    """
    gpu = (item.gpu_name or "").lower()
    if plain_name(item.instance_name) in _left_out_on_purpose():
        return None
    ours = _known(provider, plain_name(item.instance_name), item.gpu_count)
    if ours is not None:
        card = accelerator(ours.accelerator)
        bare = re.sub(r"[^a-z0-9]", "", card.name)
        return card.name if bare.startswith(gpu) and _near(item.gpu_memory, card) else None
    for card in _nvml().get(item.instance_name.lower(), []):
        if _near(item.gpu_memory, card):
            return card.name
    for name in _names():
        same_size = abs((item.gpu_memory or 0) / name.memory_gb - 1) <= MEMORY_TOLERANCE
        if name.gpu == gpu and same_size and name.word in item.instance_name.lower():
            return name.accelerator
    return None


def plain_name(text: str) -> str:
    """As `--hardware PROVIDER/INSTANCE` takes it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.strip()).strip("_")


def region_of(provider: str, location: str) -> str:
    """Google's offers name the zone (`us-central1-a`)."""
    return re.sub(r"-[a-z]$", "", location) if provider == "gcp" else location


def rows_of(
    provider: str, items: Iterable[Item], *, date: str, source: str, today: datetime.date
) -> Fetched:
    """One row a node and count, in our region where we have one, else where it is cheapest."""
    grouped: dict[tuple[str, int, str], list[Item]] = defaultdict(list)
    unmatched: Counter[str] = Counter()
    implausible = 0
    for item in items:
        if not item.gpu_count:
            continue
        card = accelerator_of(provider, item)
        if card is None:
            unmatched[f"{item.gpu_name} {item.gpu_memory or 0:g} GB"] += 1
            continue
        grouped[plain_name(item.instance_name), item.gpu_count, card].append(item)
    counts = Counter(name for name, _, _ in grouped)
    cards = Counter((name, count) for name, count, _ in grouped)
    nodes = []
    for (name, count, card), offers in grouped.items():
        longer = f"{count}x_{name}" if cards[name, count] == 1 else f"{count}x_{card}_{name}"
        node = _row(
            provider, name if counts[name] == 1 else longer, card, offers,
            date=date, source=source,
        )  # fmt: skip
        if node is None or any(faults_of(node, today)):
            implausible += 1
        else:
            nodes.append(node)
    nodes.sort(key=lambda node: node.name)
    return Fetched(nodes=tuple(nodes), unmatched=dict(unmatched), implausible=implausible)


def _row(
    provider: str, name: str, card: str, offers: Sequence[Item], *, date: str, source: str
) -> Instance | None:
    by_region: dict[str, list[Item]] = defaultdict(list)
    for item in offers:
        by_region[region_of(provider, item.location)].append(item)
    ours = _known(provider, name, offers[0].gpu_count)
    region = ours.region if ours is not None and ours.region in by_region else None
    if region is None:
        listed = {r: [i.price for i in rows if not i.spot] for r, rows in by_region.items()}
        region = min(by_region, key=lambda r: (min(listed[r], default=float("inf")), r))
    here = by_region[region]
    usd = min((i.price for i in here if not i.spot), default=None)
    spots = sorted(i.price for i in here if i.spot)
    if spots and usd is not None and statistics.median(spots) >= usd:
        spots = []  # catalogs repeat the list price as spot
    if usd is None and not spots:
        return None
    first = here[0]
    return Instance(
        provider=provider, name=name, region=region, accelerator=card, count=first.gpu_count,
        vcpus=None if ours is not None else first.cpu or None,
        ram_bytes=None if ours is not None or not first.memory else round(first.memory * 1e9),
        nvme_bytes=None, interconnect="none" if first.gpu_count == 1 else None,
        inter_node_bytes_per_s=None,
        on_demand_usd_per_h=usd, price_date=None if usd is None else date,
        spot_usd_per_h=statistics.median(spots) if spots else None,
        spot_least_usd_per_h=spots[0] if spots else None, spot_date=date if spots else None,
        reserved_1y_usd_per_h=None, reserved_date=None, source=source,
        note=f"priced in {len(by_region)} regions; this one is "
        + ("the catalog's" if ours is not None and ours.region == region else "the cheapest"),
    )  # fmt: skip


def keep_terms(new: Instance, old: Instance) -> Instance:
    """Spot and reserved prices that were not offered this time stay as they were, with their dates."""
    most, kept = new.on_demand_usd_per_h, new
    if new.spot_usd_per_h is None and _below(old.spot_usd_per_h, most):
        kept = dataclasses.replace(
            kept, spot_usd_per_h=old.spot_usd_per_h, spot_date=old.spot_date,
            spot_least_usd_per_h=old.spot_least_usd_per_h,
        )  # fmt: skip
    if new.reserved_1y_usd_per_h is None and _below(old.reserved_1y_usd_per_h, most):
        kept = dataclasses.replace(
            kept, reserved_1y_usd_per_h=old.reserved_1y_usd_per_h, reserved_date=old.reserved_date
        )
    if kept is new or old.source in new.note:
        return kept
    note = f"{new.note}; spot or reserved from before: {old.source}"
    return dataclasses.replace(kept, note=note)


def _below(usd: float | None, most: float | None) -> bool:
    return usd is not None and (most is None or usd < most)

"""What can be had: rows of the catalog, one's own machine, a bare accelerator at a price one knows.

An offer is a node at a price an hour; `shape_of` is its hardware without the price, so that nodes which
differ in price alone are planned once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from outlay.planner.assumed import END, Assumption
from outlay.planner.cost import Range
from outlay.planner.hardware import DEFAULT_PER_NODE, resolve_hardware
from outlay.planner.ownership import Owned, owned, times
from outlay.planner.spec.cluster import Cluster
from outlay.profiles.errors import UnknownName, UsageError
from outlay.profiles.loader import Accelerator, accelerator, accelerators, aliases
from outlay.profiles.offers import Instance, instances
from outlay.profiles.purchase import Purchase, shipped_purchases, stated_purchases

MOST_RANKS = 16_384


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One kind of node and what it costs."""

    name: str
    """`aws/p5.48xlarge`, or what was typed."""
    provider: str
    accelerator: Accelerator
    per_node: int
    gbps: float | None
    """Network of one node, gigabits a second; null = unknown, then one node only."""
    most_nodes: int | None = None
    """Null = as many as the limit on accelerators allows."""
    node: Instance | None = None
    """The catalog's row."""
    cluster: Cluster | None = None
    """One's own machine, as probed or from a file: it is what it is."""
    usd_per_h: dict[str, float] = field(default_factory=dict)
    """Of one node, by terms: on_demand, spot, reserved, owned, buy."""
    dates: dict[str, str | None] = field(default_factory=dict)
    """Of the prices, ISO; null = the source is not dated."""
    notes: tuple[str, ...] = ()
    bought: Owned | None = None
    """Of one node, where it is bought."""
    purchase: Purchase | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """Kinds of price it has; `owned` or `unpriced` where there is none."""
        return tuple(self.usd_per_h) or ("unpriced" if self.cluster is None else "owned",)

    def price(self, terms: str, nodes: int) -> Range | None:
        """USD an hour of so many nodes; an interval where it is bought; null = no price."""
        if terms == "buy" and self.bought is not None:
            return times(self.bought.usd_per_h, nodes)
        usd = self.usd_per_h.get(terms)
        return None if usd is None else Range(**dict.fromkeys(END, usd * nodes))

    def fixed(self, terms: str, nodes: int) -> Range | None:
        """USD a year at any use, of a machine that is bought for the project alone."""
        own = self.bought.own_usd_a_year if terms == "buy" and self.bought is not None else None
        return None if own is None else times(own, nodes)

    @property
    def ram_bytes(self) -> int | None:
        if self.cluster is not None:
            return self.cluster.host.ram_bytes if self.cluster.host else None
        return self.node.ram_bytes if self.node else None


TERMS = ("on_demand", "spot", "reserved")
PER_GPU = "per-gpu-"


def _prices(node: Instance) -> tuple[dict[str, float], dict[str, str | None]]:
    found = {
        "on_demand": (node.on_demand_usd_per_h, node.price_date),
        "spot": (node.spot_usd_per_h, node.spot_date),
        "reserved": (node.reserved_1y_usd_per_h, node.reserved_date),
    }
    usd = {k: price for k, (price, _) in found.items() if price is not None}
    return usd, {k: date for k, (_, date) in found.items() if k in usd}


def offer_of(node: Instance, gbps: float | None) -> list[Offer]:
    """The node as it stands; a rate of one accelerator also as nodes of 2, 4 and 8 of them."""
    a = accelerator(node.accelerator)
    usd, dates = _prices(node)
    network = node.inter_node_bytes_per_s
    known = network * 8 / 1e9 if network is not None else gbps
    one = Offer(
        name=f"{node.provider}/{node.name}", provider=node.provider, accelerator=a, per_node=node.count,
        gbps=known, node=node, usd_per_h=usd, dates=dates,
    )  # fmt: skip
    if not node.name.startswith(PER_GPU):
        return [one]
    rows = [one]
    for count in (2, 4, DEFAULT_PER_NODE):
        rows.append(
            dataclasses.replace(
                one, per_node=count, usd_per_h={k: v * count for k, v in usd.items()},
                notes=(f"priced by the accelerator; a node of {count} assumed",),
            )
        )  # fmt: skip
    return rows


def _matching(reference: str) -> list[Instance]:
    """Rows of the catalog that a reference names: an accelerator, a provider, or provider/instance."""
    name = reference.lower()
    rows = instances()
    if "/" in name:
        provider, _, kind = name.partition("/")
        found = [r for r in rows if r.provider == provider and r.name.lower() == kind]
        if not found:
            raise UnknownName("instance", reference, [f"{r.provider}/{r.name}" for r in rows])
        return found
    wanted = aliases().get(name, name)
    if wanted in accelerators():
        return [r for r in rows if r.accelerator == wanted]
    found = [r for r in rows if r.provider == name]
    if not found:
        known = [*accelerators(), *(r.provider for r in rows)]
        raise UnknownName("accelerator or provider", reference, known)
    return found


def _own(reference: str, price: float | None, gbps: float | None) -> Offer:
    """Hardware that is there: probed, from a file, or a stated count of an accelerator."""
    cluster = resolve_hardware(reference, inter_node_gbps=gbps, price_usd_per_h=price)
    usd = cluster.price_usd_per_h
    terms = "owned" if price is None and usd is None else "on_demand"
    return Offer(
        name=reference, provider="own" if usd is None else (cluster.price_source or "own"),
        accelerator=cluster.accelerator, per_node=cluster.ranks_per_node, gbps=None,
        most_nodes=cluster.nodes, cluster=cluster,
        usd_per_h={} if usd is None else {terms: usd / cluster.nodes}, dates={terms: None},
        notes=cluster.notes,
    )  # fmt: skip


def _is_own(reference: str) -> bool:
    return (
        reference == "probe" or ":" in reference or reference.endswith((".yaml", ".yml", ".json"))
    )


def offers_of(
    references: Sequence[str], *, gbps: float | None, price_usd_per_h: float | None
) -> list[Offer]:
    """Every offer that the references name; all of the catalog where there is none."""
    if price_usd_per_h is not None and len(references) != 1:
        raise UsageError(
            "--price-usd-per-h is the price of one piece of hardware",
            do="name it with one --hardware",
        )
    rows: list[Instance] = []
    own: list[Offer] = []
    for reference in references:
        if _is_own(reference):
            own.append(_own(reference, price_usd_per_h, gbps))
        else:
            rows += _matching(reference)
    if not references:
        rows = list(instances())
    seen: dict[tuple[str, str | None], Instance] = {
        (f"{r.provider}/{r.name}", r.region): r for r in rows
    }
    listed = [o for r in seen.values() for o in offer_of(r, gbps)]
    if price_usd_per_h is not None and not own:
        raise UsageError(
            "--price-usd-per-h is of all the hardware, and the catalog's rows have prices",
            do="give a count: --hardware h100-sxm:8 --price-usd-per-h 24",
        )
    named = bool(references)
    return own + [o for o in listed if o.accelerator.memory_bytes and (named or o.usd_per_h)]


LINKED = 8
"""Accelerators that one link domain joins at least, where they are bought as whole nodes with a network."""


def bought_offers(
    offers: Sequence[Offer],
    stated: Sequence[str],
    taken: dict[str, Assumption],
    *,
    gbps: float | None,
    everything: bool,
) -> list[Offer]:
    """The same accelerators, bought: `everything` that has a price, or those that are among the offers."""
    prices = shipped_purchases() | stated_purchases(stated)
    wanted = set(prices) if everything else {o.accelerator.name for o in offers}
    rows = [
        o for name in sorted(wanted & set(prices))
        for o in _bought(accelerator(name), prices[name], taken, gbps)
    ]  # fmt: skip
    if not rows:
        raise UsageError(
            f"no purchase price of {', '.join(sorted(wanted))} is known", where="--buy",
            do="state it: --purchase-usd h100-sxm=31000, of one with its share of the server",
        )  # fmt: skip
    return rows


def _bought(
    a: Accelerator, purchase: Purchase, taken: dict[str, Assumption], gbps: float | None
) -> list[Offer]:
    """Nodes of whole link domains, alone and with a network; cards in nodes of 1 to 8."""
    if a.tdp_w is None:
        return []
    linked = (a.nvlink_domain or 1) >= LINKED
    port_gbps = taken["network_gbps_an_accelerator"].expected
    rows = []
    for count in (DEFAULT_PER_NODE,) if linked else (1, 2, 4, DEFAULT_PER_NODE):
        networks = [None, gbps or (port_gbps * count if linked else None)]
        for network in dict.fromkeys(networks):
            one = owned(purchase, count, tdp_w=a.tdp_w, network=network is not None, taken=taken)
            rows.append(
                Offer(
                    name=f"buy/{count}x{a.name}", provider=purchase.source, accelerator=a, per_node=count,
                    gbps=network, usd_per_h={"buy": one.usd_per_h.expected},
                    dates={"buy": purchase.date}, bought=one, purchase=purchase,
                )
            )  # fmt: skip
    return rows


def unpriced(references: Sequence[str]) -> list[str]:
    """Accelerators of the catalog that nobody rents out at a known price."""
    if references:
        return []
    sold = {r.accelerator for r in instances()}
    return sorted(n for n, a in accelerators().items() if n not in sold and a.kind != "cpu")


def node_counts(offer: Offer, most_ranks: int) -> list[int]:
    """1, 2, 4 … nodes, up to the limit; one where no network is known."""
    if offer.cluster is not None:
        return [offer.cluster.nodes]
    if offer.gbps is None or offer.gbps == 0:
        return [1] if offer.per_node <= most_ranks else []
    counts, n = [], 1
    while n * offer.per_node <= most_ranks and n <= (offer.most_nodes or n):
        counts.append(n)
        n *= 2
    return counts


def cluster_of_offer(offer: Offer, nodes: int) -> Cluster | str:
    """The cluster of so many nodes, without price; or why there is none."""
    if offer.cluster is not None:
        return offer.cluster
    a = offer.accelerator
    try:
        one = resolve_hardware(f"{a.name}:{offer.per_node * nodes}/{offer.per_node}",
                               inter_node_gbps=offer.gbps if nodes > 1 else None)  # fmt: skip
    except UsageError as error:
        return error.what
    notes = tuple(n for n in one.notes if "a node assumed" not in n) + offer.notes
    node = offer.node
    return dataclasses.replace(
        one, source=f"offer:{offer.name} x{nodes}", notes=notes,
        node_ram_bytes=None if node is None else node.ram_bytes,
        node_nvme_bytes=None if node is None else node.nvme_bytes,
    )  # fmt: skip


def shape_of(offer: Offer) -> tuple[object, ...]:
    """What decides speed and memory; the last tells one's own machines apart."""
    own = 0 if offer.cluster is None else id(offer.cluster)
    node = offer.node
    host = (node.ram_bytes, node.nvme_bytes) if node and own == 0 else (None, None)
    return (offer.accelerator.name, offer.per_node, offer.gbps, *host, own)

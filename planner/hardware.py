"""`--hardware`: probe | ACCELERATOR:COUNT[/PER_NODE] | PROVIDER/INSTANCE:COUNT | cluster.yaml → Cluster."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

from outlay.planner.spec.cluster import SCHEMA_CLUSTER, Cluster, Link
from outlay.planner.spec.files import check_schema, parse, read_mapping
from outlay.profiles.errors import UsageError
from outlay.profiles.loader import Accelerator, accelerator, instance, read_yaml
from outlay.profiles.units import parse_count

_CATALOG = re.compile(
    r"^(?P<name>[a-z0-9][a-z0-9._-]*):(?P<count>[\d_,]+)(?:/(?P<per_node>\d+))?$", re.I
)
_INSTANCE = re.compile(r"^(?P<provider>[a-z0-9-]+)/(?P<name>[A-Za-z0-9._-]+)(?::(?P<count>\d+))?$")

MOST_ACCELERATORS = 10_000_000
DEFAULT_PER_NODE = 8
"""Accelerators a node where the reference does not say: the size of an HGX board and of most servers."""


@cache
def _links() -> dict[str, Any]:
    links: dict[str, Any] = read_yaml("efficiency/links.yaml")
    return links


def _latency_s(kind: str) -> float:
    return float(_links()[kind]["latency_s"]["value"])


def _intra_link(a: Accelerator, per_node: int) -> Link:
    """NVLink or xGMI where it joins all accelerators of a node; what all exchange goes by PCIe otherwise.

    Where links are point to point (`nvlink_pair_bytes_per_s`), a group of two has one pair's share.
    """
    rate = a.nvlink_bytes_per_s
    if rate and per_node == 2 and a.nvlink_pair_bytes_per_s:
        rate = a.nvlink_pair_bytes_per_s
    if rate and 1 < per_node <= (a.nvlink_domain or per_node):
        return Link(
            kind="nvlink",
            bytes_per_s=rate,
            latency_s=_latency_s("nvlink"),
            source=a.sources.get("nvlink_bytes_per_s", "catalog"),
        )
    if a.pcie_bytes_per_s is None:
        raise UsageError(
            f"the catalog knows no link between {a.name} accelerators",
            do="describe the machine in a cluster file and pass it to --hardware",
        )
    return Link(
        kind="pcie",
        bytes_per_s=a.pcie_bytes_per_s,
        latency_s=_latency_s("pcie"),
        source=a.sources.get("pcie_bytes_per_s", "catalog"),
    )


def _inter_link(gbps: float | None, per_node: int, nodes: int, source: str) -> Link | None:
    """A rank's share of the node's network, `gbps` gigabits a second for the node."""
    if nodes == 1:
        return None
    if gbps is None:
        raise UsageError(
            f"the network between {nodes} nodes is unknown, and so is what crosses it",
            where="--hardware",
            do="pass --inter-node-gbps, gigabits a second of one node (8 adapters of 400 Gb/s: 3200)",
        )
    return Link(
        kind="network",
        bytes_per_s=gbps * 1e9 / 8 / per_node,
        latency_s=_latency_s("network"),
        source=source,
    )


def _usable(a: Accelerator) -> tuple[int, tuple[str, ...]]:
    if a.usable_bytes is not None:
        return a.usable_bytes, ()
    if a.memory_bytes is not None:
        return a.memory_bytes, (
            f"usable memory of {a.name} is unknown: the marketed size is taken",
        )
    do = "use --hardware probe" if a.kind == "cpu" else "describe the machine in a cluster file"
    raise UsageError(f"the catalog does not know how much memory {a.name} has", do=do)


def _from_catalog(match: re.Match[str], gbps: float | None, price: float | None) -> Cluster:
    a = accelerator(match["name"].lower())
    count = parse_count(match["count"], where="--hardware")
    if not 1 <= count <= MOST_ACCELERATORS:
        raise UsageError(
            f"{count:,} accelerators: at least one accelerator is needed, at most "
            f"{MOST_ACCELERATORS:,} make sense",
            where="--hardware",
        )
    per_node = int(match["per_node"] or min(count, DEFAULT_PER_NODE))
    if per_node < 1 or count % per_node:
        raise UsageError(
            f"{count} accelerators do not fill whole nodes of {per_node}", where="--hardware",
            do=f"write {a.name}:COUNT/PER_NODE with a PER_NODE that divides COUNT",
        )  # fmt: skip
    usable, notes = _usable(a)
    nodes = count // per_node
    if match["per_node"] is None and count > DEFAULT_PER_NODE:
        notes += (f"{DEFAULT_PER_NODE} accelerators a node assumed",)
    return Cluster(
        accelerator=a,
        nodes=nodes,
        ranks_per_node=per_node,
        usable_bytes=usable,
        intra=_intra_link(a, per_node),
        inter=_inter_link(gbps, per_node, nodes, "--inter-node-gbps"),
        source=f"catalog:{match.string}",
        price_usd_per_h=price,
        price_source=None if price is None else "--price-usd-per-h",
        notes=notes,
    )


def _from_instance(match: re.Match[str], gbps: float | None, price: float | None) -> Cluster:
    node = instance(match["provider"].lower(), match["name"])
    count = int(match["count"] or 1)
    if count < 1:
        raise UsageError("at least one instance is needed", where="--hardware")
    a = accelerator(node.accelerator)
    usable, notes = _usable(a)
    if gbps is None and node.inter_node_bytes_per_s is not None:
        gbps = node.inter_node_bytes_per_s * 8 / 1e9
    on_demand = node.on_demand_usd_per_h
    source = None
    if price is not None:
        source = "--price-usd-per-h"
    elif on_demand is not None:
        price = on_demand * count
        source = (
            f"{node.provider} {node.name} on demand, {node.price_date or 'undated'}: {node.source}"
        )
    return Cluster(
        accelerator=a,
        nodes=count,
        ranks_per_node=node.count,
        usable_bytes=usable,
        intra=_intra_link(a, node.count),
        inter=_inter_link(gbps, node.count, count, f"{node.provider} {node.name}"),
        source=f"instance:{match.string}",
        node_ram_bytes=node.ram_bytes,
        node_nvme_bytes=node.nvme_bytes,
        price_usd_per_h=price,
        price_source=source,
        notes=notes,
    )


_NETWORK = re.compile(r"(?:(\d+)x)?\s*(\d+)\s*gb(?:ps|/s)(\s*(?:/node|per node))?", re.I)


def cluster_of(a: Accelerator, *, gpus: int, per_node: int, interconnect: str) -> Cluster:
    """A cluster from what a published measurement says: a count, and words on the interconnect.

    `8x200Gb` and `1600Gbps/node` are the node's; a bare `400Gb/s` is one accelerator's; Omni-Path
    has its ports. Where nothing is said, `network.assumed_gbps_per_accelerator` of links.yaml is
    taken by the generation of the host link, and said so.
    """
    usable, notes = _usable(a)
    nodes = -(-gpus // per_node)
    network = _links()["network"]
    assumed, port = network["assumed_gbps_per_accelerator"], network["omni_path"]
    each = float(assumed["value"])
    for rate, known in assumed["by_pcie_bytes_per_s"].items():
        if a.pcie_bytes_per_s and a.pcie_bytes_per_s >= float(rate):
            each = float(known)
    gbps, source = each * per_node, f"guess: {assumed['source']}"
    omni_path = "omni-path" in interconnect.lower()
    if omni_path:
        gbps, source = float(port["gbps_a_port"] * port["ports_a_node"]), str(port["source"])
    elif match := _NETWORK.search(interconnect):
        each = float(match[2])
        node_total = each * int(match[1]) if match[1] else each * (1 if match[3] else per_node)
        gbps, source = node_total, interconnect
    inter = _inter_link(gbps, per_node, nodes, source)
    if inter is not None and omni_path:
        inter = dataclasses.replace(inter, kind="omni-path")
    return Cluster(
        accelerator=a,
        nodes=nodes,
        ranks_per_node=per_node,
        usable_bytes=usable,
        intra=_intra_link(a, per_node),
        inter=inter,
        source="case",
        notes=notes,
    )


def read_cluster(path: str | Path) -> Cluster:
    """A cluster file, as `outlay probe --out` writes it."""
    value = read_mapping(path)
    check_schema(value, SCHEMA_CLUSTER, path)
    return parse(Cluster, value, path=path)


def _said_of_network(cluster: Cluster, gbps: float | None) -> Cluster:
    """A network that was stated for one node changes nothing: a note says so."""
    if gbps is None or cluster.nodes > 1:
        return cluster
    note = f"--inter-node-gbps {gbps:g} changes nothing: one node, nothing crosses its network"
    return dataclasses.replace(cluster, notes=(*cluster.notes, note))


def resolve_hardware(
    reference: str,
    *,
    inter_node_gbps: float | None = None,
    price_usd_per_h: float | None = None,
    ranks: int | None = None,
) -> Cluster:
    """The cluster that `--hardware` means. Raises UsageError or UnknownName."""
    for flag, value in (
        ("--inter-node-gbps", inter_node_gbps),
        ("--price-usd-per-h", price_usd_per_h),
    ):
        if value is not None and not 0 <= value < 1e12:
            raise UsageError(f"{value} makes no sense", where=flag)
    if reference == "probe":
        from outlay.planner.probe import probe

        probed = probe(ranks=ranks, price_usd_per_h=price_usd_per_h)
        return _said_of_network(probed, inter_node_gbps)
    if reference.endswith((".yaml", ".yml", ".json")):
        cluster = read_cluster(reference)
        if price_usd_per_h is not None:
            cluster = dataclasses.replace(
                cluster, price_usd_per_h=price_usd_per_h, price_source="--price-usd-per-h"
            )
        if inter_node_gbps is not None and cluster.nodes > 1:
            link = _inter_link(
                inter_node_gbps, cluster.ranks_per_node, cluster.nodes, "--inter-node-gbps"
            )
            cluster = dataclasses.replace(cluster, inter=link)
        return _said_of_network(cluster, inter_node_gbps)
    if match := _CATALOG.match(reference):
        found = _from_catalog(match, inter_node_gbps, price_usd_per_h)
        return _said_of_network(found, inter_node_gbps)
    if match := _INSTANCE.match(reference):
        found = _from_instance(match, inter_node_gbps, price_usd_per_h)
        return _said_of_network(found, inter_node_gbps)
    raise UsageError(
        f"{reference!r} names no hardware", where="--hardware",
        do="write probe, ACCELERATOR:COUNT[/PER_NODE] (h100-sxm:8), PROVIDER/INSTANCE:COUNT "
        "(aws/p5.48xlarge:1), or the path of a cluster.yaml",
    )  # fmt: skip

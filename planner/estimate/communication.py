"""Seconds of a collective: latency + volume/bandwidth, or this machine's own measured table.

Volumes are those of the ring algorithm (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002):
all-reduce moves 2(n−1)/n of the buffer through each rank, all-gather and reduce-scatter (n−1)/n.
Across nodes NCCL runs one ring a network adapter, so a group uses the adapters of all its members in
a node at once, and the slower of the two links bounds it. Small messages go along a tree: the
latency grows with the ranks in a node and with the logarithm of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array
from outlay.planner.spec.cluster import Cluster

Figures = Mapping[str, "float | Array"]

_VOLUME = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}
DIRECT_LINKS = ("nvlink", "nvswitch", "xgmi")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Where a group of ranks lies; arrays [n]."""

    ranks: Array
    inside: Array
    """Members that share the fast links of a domain."""
    domains: Array
    """How many such domains the group spans."""


def link_domain(cluster: Cluster) -> int:
    """Ranks that the intra-node link joins: a node, or the whole NVLink domain where that is larger."""
    a = cluster.accelerator
    if cluster.intra.kind in DIRECT_LINKS and a.nvlink_domain:
        return max(cluster.ranks_per_node, a.nvlink_domain)
    return cluster.ranks_per_node


def group_of(cluster: Cluster, ranks: Array, stride: Array) -> Group:
    """A group of `ranks` whose members are `stride` ranks apart."""
    ranks, stride = np.asarray(ranks, float), np.asarray(stride, float)
    inside = np.clip(np.floor(link_domain(cluster) / stride), 1.0, ranks)
    return Group(ranks=ranks, inside=inside, domains=np.ceil(ranks / inside))


def intra_bytes_per_s(cluster: Cluster, inside: Array, figures: Figures) -> Array:
    """One rank's rate to the others of its domain.

    Point-to-point links (xGMI) give a group of m ranks only m−1 of a rank's links. Bridges that
    join fewer ranks than the group has leave PCIe to the rest.
    """
    a, rate = cluster.accelerator, np.full(np.shape(inside), float(cluster.intra.bytes_per_s))
    if cluster.intra.kind in DIRECT_LINKS:
        if a.nvlink_pair_bytes_per_s:
            rate = np.minimum(rate, a.nvlink_pair_bytes_per_s * np.maximum(inside - 1, 1))
        if a.nvlink_domain and a.pcie_bytes_per_s and a.nvlink_domain < cluster.ranks_per_node:
            rate = np.where(
                inside > a.nvlink_domain,
                a.pcie_bytes_per_s * figures["communication.pcie_fraction"],
                rate,
            )
        return np.asarray(rate * figures["communication.intra_fraction"])
    if cluster.intra.kind == "pcie":
        return np.asarray(rate * figures["communication.pcie_fraction"])
    return np.asarray(rate * figures["communication.intra_fraction"])


def inter_bytes_per_s(cluster: Cluster, figures: Figures) -> float | Array:
    """One rank's share of the network, as collectives reach it; nan where the network is unknown."""
    if cluster.inter is None:
        return float("nan")
    name = "omni_path_fraction" if cluster.inter.kind == "omni-path" else "inter_fraction"
    return cluster.inter.bytes_per_s * figures[f"communication.{name}"]


def group_bandwidth(cluster: Cluster, group: Group, figures: Figures) -> Array:
    """Bytes/s one way through each rank of the group; nan where the network is unknown."""
    intra = intra_bytes_per_s(cluster, group.inside, figures)
    if cluster.inter is None:
        return np.where(group.domains > 1, np.nan, intra)
    inter = inter_bytes_per_s(cluster, figures)
    per_node = np.minimum(group.inside, cluster.ranks_per_node)
    return np.where(group.domains > 1, np.minimum(intra, inter * per_node), intra)


def _latency_s(cluster: Cluster, group: Group, figures: Figures, *, ring: bool = False) -> Array:
    """Of one pass over the group: the ranks of a domain in a ring, the domains in a tree. A `ring` goes
    through all ranks: NCCL has trees for all-reduce only (src/graph/tuning.cc, before 2.23)."""
    factor = figures["communication.latency_factor"]
    inside = (group.inside - 1) * cluster.intra.latency_s
    if cluster.inter is None:
        return np.asarray(factor * inside)
    if ring:
        across = np.where(group.domains > 1, group.domains * cluster.inter.latency_s, 0.0)
        return np.asarray(factor * (group.domains * inside + across))
    across = np.ceil(np.log2(group.domains)) * cluster.inter.latency_s
    return np.asarray(factor * (inside + across))


def _measured_s(size: Array, cluster: Cluster) -> Array:
    """All-reduce over the local ranks, interpolated in log-log in the machine's own table."""
    assert cluster.rates is not None
    table = np.array(cluster.rates.all_reduce, float)
    sizes, times = table[:, 0], table[:, 1]
    clipped = np.clip(size, sizes[0], sizes[-1])
    seconds = np.exp(np.interp(np.log(clipped), np.log(sizes), np.log(times)))
    return np.asarray(np.where(size > sizes[-1], seconds * size / sizes[-1], seconds))


def collective_s(
    kind: str, size_bytes: Array, ranks: Array, stride: Array, cluster: Cluster, figures: Figures
) -> Array:
    """Seconds of one collective over a buffer of `size_bytes` (the whole, gathered size) [n].

    Where this machine's all-reduce was measured and the group is inside the node, its table is
    used; beyond the largest size at its bandwidth.
    """
    ranks, stride, size = np.broadcast_arrays(
        np.asarray(ranks, float), np.asarray(stride, float), np.asarray(size_bytes, float)
    )
    busy = (ranks > 1) & (size > 0)
    if cluster.rates is not None and cluster.rates.all_reduce and cluster.nodes == 1:
        return np.where(busy, _VOLUME[kind] / 2.0 * _measured_s(size, cluster), 0.0)
    group = group_of(cluster, ranks, stride)
    volume = _VOLUME[kind] * (ranks - 1) / np.maximum(ranks, 1) * size
    seconds = volume / group_bandwidth(cluster, group, figures)
    latency = _latency_s(cluster, group, figures, ring=kind in ("all_gather", "reduce_scatter"))
    return np.where(busy, seconds + _VOLUME[kind] * latency, 0.0)


def all_to_all_s(
    size_bytes: Array,
    ranks: Array,
    stride: Array,
    cluster: Cluster,
    figures: Figures,
    *,
    copies: int = 1,
) -> Array:
    """Each rank sends `size_bytes` in all, an equal part to each rank of its group [n].

    What stays in the domain goes by its link, the rest by the rank's own share of the network. Where
    a token has `copies` for as many random ranks, one copy crosses to each domain and is spread there
    (DeepSeek-V3, arXiv 2412.19437, section 3.2.2): d domains get d·(1 − (1 − 1/d)^copies) of them.
    """
    ranks, stride, size = np.broadcast_arrays(
        np.asarray(ranks, float), np.asarray(stride, float), np.asarray(size_bytes, float)
    )
    busy = (ranks > 1) & (size > 0)
    if cluster.rates is not None and cluster.rates.all_reduce and cluster.nodes == 1:
        return np.where(busy, _measured_s(size, cluster) / 2.0, 0.0)
    group = group_of(cluster, ranks, stride)
    near = size * (group.inside - 1) / ranks / intra_bytes_per_s(cluster, group.inside, figures)
    far = np.zeros(size.shape)
    if cluster.inter is not None:
        rate = inter_bytes_per_s(cluster, figures)
        d = group.domains
        once = d * (1.0 - (1.0 - 1.0 / d) ** copies) / copies
        far = size * (ranks - group.inside) / ranks * once / rate
    return np.where(busy, np.maximum(near, far) + _latency_s(cluster, group, figures), 0.0)


def transfer_s(size_bytes: Array, cluster: Cluster, across: Array, figures: Figures) -> Array:
    """Seconds of one point-to-point message; `across` is True where it leaves the domain."""
    near = (
        size_bytes / intra_bytes_per_s(cluster, np.full(np.shape(across), 2.0), figures)
        + cluster.intra.latency_s
    )
    if cluster.inter is None:
        return np.asarray(near)
    far = size_bytes / inter_bytes_per_s(cluster, figures)
    return np.where(across, far + cluster.inter.latency_s, near)

"""Seconds of a collective: α·messages + volume/bandwidth, or this machine's own measured table.

Volumes are those of the ring algorithm (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002):
all-reduce moves 2(n−1)/n of the buffer through each rank, all-gather and reduce-scatter (n−1)/n,
in 2(n−1) and n−1 messages.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from outlay.planner.estimate.candidates import Array
from outlay.planner.spec.cluster import Cluster

_VOLUME = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}


def group_bandwidth(cluster: Cluster, ranks: Array, stride: Array, figures: Mapping[str, float]) -> tuple[Array, Array]:
    """(bytes/s one way, latency s) for groups of `ranks` whose members are `stride` ranks apart.

    A group inside a node uses the intra-node link; one that crosses nodes is bound by each rank's
    share of the node's network.
    """
    span = np.asarray(ranks) * np.asarray(stride)
    inside = span <= cluster.ranks_per_node
    intra = cluster.intra.bytes_per_s * figures["communication.intra_fraction"]
    if cluster.inter is None:
        return np.where(inside, intra, np.nan), np.full(span.shape, cluster.intra.latency_s)
    inter = cluster.inter.bytes_per_s * figures["communication.inter_fraction"]
    return (
        np.where(inside, intra, inter),
        np.where(inside, cluster.intra.latency_s, cluster.inter.latency_s),
    )


def collective_s(
    kind: str,
    size_bytes: Array,
    ranks: Array,
    stride: Array,
    cluster: Cluster,
    figures: Mapping[str, float],
) -> Array:
    """Seconds of one collective over a buffer of `size_bytes` (the whole, gathered size) [n].

    Where this machine's all-reduce was measured and the group is inside the node, its table is
    used (interpolated in log-log; beyond the largest size at its bandwidth).
    """
    ranks, size = np.broadcast_arrays(np.asarray(ranks, float), np.asarray(size_bytes, float))
    rates = cluster.rates
    share = _VOLUME[kind] / 2.0
    if rates is not None and rates.all_reduce and cluster.nodes == 1:
        sizes = np.array([b for b, _ in rates.all_reduce], float)
        times = np.array([s for _, s in rates.all_reduce], float)
        clipped = np.clip(size, sizes[0], sizes[-1])
        seconds = np.exp(np.interp(np.log(clipped), np.log(sizes), np.log(times)))
        seconds = np.where(size > sizes[-1], seconds * size / sizes[-1], seconds)
        return np.where((ranks > 1) & (size > 0), share * seconds, 0.0)
    bandwidth, latency = group_bandwidth(cluster, ranks, stride, figures)
    volume = _VOLUME[kind] * (ranks - 1) / np.maximum(ranks, 1) * size
    messages = _VOLUME[kind] * (ranks - 1)
    return np.where((ranks > 1) & (size > 0), volume / bandwidth + messages * latency, 0.0)


def transfer_s(size_bytes: Array, cluster: Cluster, across: Array, figures: Mapping[str, float]) -> Array:
    """Seconds of one point-to-point message; `across` is True where it leaves the node."""
    bandwidth, latency = group_bandwidth(
        cluster, np.where(across, cluster.ranks_per_node + 1, 2), np.ones_like(across, int), figures
    )
    return size_bytes / bandwidth + latency

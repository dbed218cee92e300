"""Collectives: published bandwidths are met, and what must hold holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.estimate.communication import (
    all_to_all_s,
    collective_s,
    group_of,
    link_domain,
    transfer_s,
)
from outlay.planner.estimate.efficiency import efficiency_for
from outlay.planner.hardware import resolve_hardware
from outlay.planner.spec.cluster import Cluster


def seconds(kind: str, size: float, ranks: int, stride: int, cluster: Cluster) -> float:
    figures = efficiency_for(cluster.accelerator)
    return float(
        collective_s(kind, np.array(size), np.array(ranks), np.array(stride), cluster, figures)
    )


def bus_bytes_per_s(size: float, ranks: int, stride: int, cluster: Cluster) -> float:
    return 2 * (ranks - 1) / ranks * size / seconds("all_reduce", size, ranks, stride, cluster)


H200 = resolve_hardware("h200-sxm:8")
B200 = resolve_hardware("b200:32/8", inter_node_gbps=3200)


def test_rings_in_a_node_reach_what_was_measured() -> None:
    """8 H200, ring, 8 GiB: 365.6 GB/s (stas00/ml-engineering, network/README.md, 2026-08)."""
    assert bus_bytes_per_s(8 * 2**30, 8, 1, H200) == pytest.approx(365.6e9, rel=0.15)


def test_a_ring_over_nodes_uses_the_adapters_of_all_its_members() -> None:
    """4 nodes of 8 B200, EFA 400 GB/s a node, 16 GiB: 382 GB/s (the same)."""
    assert bus_bytes_per_s(16 * 2**30, 32, 1, B200) == pytest.approx(382e9, rel=0.30)
    one_a_node = bus_bytes_per_s(16 * 2**30, 4, 8, B200)
    assert one_a_node == pytest.approx(bus_bytes_per_s(16 * 2**30, 32, 1, B200) / 8, rel=0.05)


def test_point_to_point_links_give_two_ranks_one_link() -> None:
    """MI300X: 2 of them 47.7 GB/s, 8 of them 312.9, 4 GiB (the same)."""
    mi300x = resolve_hardware("mi300x:8")
    two, eight = (bus_bytes_per_s(4 * 2**30, n, 1, mi300x) for n in (2, 8))
    assert two == pytest.approx(47.7e9, rel=0.3)
    assert eight == pytest.approx(312.9e9, rel=0.3)


def test_cards_without_nvlink_reduce_over_pcie() -> None:
    cluster = resolve_hardware("rtx-4090:8")
    pcie = cluster.accelerator.pcie_bytes_per_s
    assert pcie is not None
    assert bus_bytes_per_s(2**30, 8, 1, cluster) < pcie


def test_a_rack_of_nvlink_is_one_domain() -> None:
    rack = resolve_hardware("gb200:64/4", inter_node_gbps=1600)
    assert link_domain(rack) == 72
    group = group_of(rack, np.array([64]), np.array([1]))
    assert group.domains == 1
    assert link_domain(B200) == 8


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
    st.floats(1, 1e10),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.sampled_from([1, 2, 8]),
)
def test_more_bytes_never_take_less_and_one_rank_takes_nothing(
    kind: str, size: float, ranks: int, stride: int
) -> None:
    assert (
        0 < seconds(kind, size, ranks, stride, B200) <= seconds(kind, 2 * size, ranks, stride, B200)
    )
    assert seconds(kind, size, 1, stride, B200) == 0
    assert seconds(kind, 0, ranks, stride, B200) == 0


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for ranks, tolerance in ((8, 1e-9), (32, 0.1)):  # across nodes only all-reduce has trees
        whole = seconds("all_reduce", 1e9, ranks, 1, B200)
        halves = [seconds(k, 1e9, ranks, 1, B200) for k in ("reduce_scatter", "all_gather")]
        assert whole == pytest.approx(sum(halves), rel=tolerance)
        assert whole <= sum(halves) * (1 + 1e-9)


def test_an_unknown_network_is_not_guessed() -> None:
    unknown = dataclasses.replace(B200, inter=None)
    assert np.isnan(seconds("all_reduce", 1e9, 32, 1, unknown))


def test_a_token_for_many_experts_of_a_node_crosses_once() -> None:
    figures = efficiency_for(B200.accelerator)
    size, ranks, one = np.array(8e9), np.array(32), np.array(1)
    once, each = (float(all_to_all_s(size, ranks, one, B200, figures, copies=n)) for n in (8, 1))
    assert once < each
    # Of 8 copies to 4 nodes, 4·(1 − (3/4)^8) = 3.6 cross.
    assert once / each == pytest.approx(4 * (1 - 0.75**8) / 8, rel=0.02)


def test_the_machines_own_table_is_used_where_there_is_one(cpu_cluster: Cluster) -> None:
    figures = efficiency_for(cpu_cluster.accelerator)
    two, one = np.array(2), np.array(1)

    def measured(size: float) -> float:
        return float(collective_s("all_reduce", np.array(size), two, one, cpu_cluster, figures))

    assert measured(4096) == pytest.approx(1e-4)
    assert measured(2**26) == pytest.approx(6e-2)
    assert measured(2**27) == pytest.approx(12e-2)
    assert 1e-4 < measured(2**16) < 1e-3


def test_a_message_to_the_next_node_takes_longer() -> None:
    figures = efficiency_for(B200.accelerator)
    near, far = transfer_s(np.array(1e8), B200, np.array([False, True]), figures)
    assert near < far

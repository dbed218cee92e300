"""Cluster: machines with accelerators, the links in and between them, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from outlay.profiles.errors import UsageError
from outlay.profiles.loader import Accelerator

SCHEMA_CLUSTER = "outlay/cluster@1"


def _require_positive(owner: str, **values: float | None) -> None:
    """Figures that divide: zero, negative and not-a-number are refused, with their name."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{owner}.{name} must be positive and finite, not {value}")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One kind of connection between two ranks."""

    kind: str
    """nvlink, nvswitch, pcie, xgmi, shm (same host, through memory), infiniband, ethernet, efa, roce, omni-path."""
    bytes_per_s: float
    """What one rank can send in one direction, datasheet; bytes/s."""
    latency_s: float
    """Start of one message; seconds."""
    source: str

    def __post_init__(self) -> None:
        _require_positive("link", bytes_per_s=self.bytes_per_s, latency_s=self.latency_s)


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine around the accelerators, as this process may use it."""

    cpu_model: str
    cores: int
    """Cores that this process may use (affinity and cgroup quota)."""
    sockets: int
    ram_bytes: int
    """Installed, or the cgroup limit where that is lower."""
    available_bytes: int
    """Free for new processes at the time of the probe."""
    disk_free_bytes: int
    """In the folder where the probe ran."""
    flags: tuple[str, ...] = ()
    """Of avx2, avx512f, avx512_bf16, amx_bf16, amx_tile, asimd, sve, bf16: those present."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that NVML reports."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    power_limit_w: float | None
    pcie_generation: int | None
    """As negotiated now, not as the slot could."""
    pcie_width: int | None
    nvlink_peers: tuple[int, ...]
    """Indices of the GPUs that an active NVLink reaches, directly or through a switch."""
    mig: bool = False
    reserved_bytes: int = 0
    """Of total_bytes, what the driver keeps for itself; 0 where the driver does not say."""
    pcie_max_generation: int | None = None
    """What GPU and slot can negotiate; an idle GPU may run below it to save power."""
    pcie_max_width: int | None = None
    nvlink_active: int = 0
    """Active NVLinks of this GPU."""
    nvlink_switch: bool = False
    """At least one of them ends at an NVSwitch."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured on this machine (`outlay probe --measure`), for one rank while all ranks work."""

    ranks: int
    threads_per_rank: int
    gemm_flops: dict[str, float]
    """Sustained matrix-multiply rate of one rank by precision; FLOP/s."""
    memory_bytes_per_s: float
    """Read + written, of one rank."""
    all_reduce: tuple[tuple[int, float], ...]
    """(message bytes, seconds) between the local ranks; empty for one rank."""
    measured_at: str
    source: str
    gemm_by_size: tuple[tuple[str, int, float], ...] = ()
    """(precision, n, FLOP/s) of an n×n by n×n product, one rank while all ranks work."""
    pinned_copy_bytes_per_s: float | None = None
    """Host to GPU from page-locked memory, all ranks at once; null on CPU."""
    pageable_copy_bytes_per_s: float | None = None
    """Host to GPU from ordinary memory, all ranks at once; null on CPU."""

    def __post_init__(self) -> None:
        _require_positive("rates", memory_bytes_per_s=self.memory_bytes_per_s, **self.gemm_flops)
        for size, seconds in self.all_reduce:
            _require_positive("rates.all_reduce", bytes=size, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hardware as the planner sees it. `ranks_per_node` processes on each of `nodes` nodes."""

    accelerator: Accelerator
    nodes: int
    ranks_per_node: int
    """One rank an accelerator; on CPU, processes that share the sockets' cores and memory."""
    usable_bytes: int
    """Memory that one rank may fill; bytes."""
    intra: Link
    inter: Link | None
    """None: one node, or unknown (then a plan over several nodes is refused)."""
    source: str
    """probe | catalog:<what> | file:<path>."""
    host: Host | None = None
    node_ram_bytes: int | None = None
    """Of a rented node as its provider states it; null = unknown, or probed (then `host` has it)."""
    node_nvme_bytes: int | None = None
    """Its local disks; 0 = none, null = unknown."""
    gpus: tuple[Gpu, ...] = ()
    rates: Rates | None = None
    price_usd_per_h: float | None = None
    """Of all the hardware together; null where no price is known."""
    price_source: str | None = None
    driver: str | None = None
    cuda: str | None = None
    notes: tuple[str, ...] = ()
    """What the probe could not find out, one sentence each."""
    schema: str = field(default=SCHEMA_CLUSTER)

    @property
    def ram_bytes(self) -> int | None:
        """Host memory of one node; null = unknown."""
        return self.node_ram_bytes if self.host is None else self.host.ram_bytes

    def __post_init__(self) -> None:
        _require_positive(
            "cluster",
            nodes=self.nodes,
            ranks_per_node=self.ranks_per_node,
            usable_bytes=self.usable_bytes,
        )
        price = self.price_usd_per_h
        if price is not None and not 0 <= price < math.inf:
            raise UsageError(f"cluster.price_usd_per_h makes no sense: {price}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def kind(self) -> Literal["gpu", "cpu", "tpu", "other"]:
        return self.accelerator.kind

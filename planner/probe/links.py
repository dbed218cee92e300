"""The link between ranks of one machine: its kind, its datasheet rate, its start time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outlay.planner.spec.cluster import Gpu, Link
from outlay.profiles.errors import UsageError
from outlay.profiles.loader import Accelerator, read_yaml

DATA = "efficiency/links.yaml"


def shm_link() -> Link:
    """Between CPU ranks of one host, through memory."""
    data = read_yaml(DATA)["shm"]
    return Link(
        kind="shm",
        bytes_per_s=data["bytes_per_s"]["value"],
        latency_s=data["latency_s"]["value"],
        source=f"{DATA}: {data['bytes_per_s']['kind']}, {data['bytes_per_s']['source']}",
    )


def pcie_bytes_per_s(generation: int, width: int, data: Any) -> float | None:
    """One direction: lanes × transfers/s × payload share of the line code / 8.

    The line code alone is deducted; packet headers cost some 10 % more (efficiency, not datasheet).
    """
    lane = data["pcie"]["lane"].get(generation)
    if lane is None:
        return None
    share = lane["payload"] / lane["line"]
    return float(width * lane["transfers_per_s"] * share / 8)


def gpu_link(gpus: Sequence[Gpu], accelerator: Accelerator) -> tuple[Link, tuple[str, ...]]:
    """NVLink where it joins every rank to every other or in one ring; else PCIe. With notes."""
    data = read_yaml(DATA)
    rate, full = accelerator.nvlink_bytes_per_s, _all_pairs(gpus)
    if len(gpus) > 1 and rate and (full or _ring(gpus)):
        kind = "nvswitch" if all(gpu.nvlink_switch for gpu in gpus) else "nvlink"
        share = 1.0 if kind == "nvswitch" else _share(gpus)
        source = f"{accelerator.name}: {accelerator.sources.get('nvlink_bytes_per_s', 'catalog')}"
        if share < 1:
            source += f"; {share:.0%} of it: the other links end at GPUs outside this plan"
        latency_s = data[kind]["latency_s"]["value"]
        link = Link(kind=kind, bytes_per_s=rate * share, latency_s=latency_s, source=source)
        return link, (*_uneven(gpus), *(() if full else ("NVLink joins these GPUs in a ring",)))
    link, notes = _pcie_link(gpus, accelerator, data)
    return link, (*_why_not_nvlink(gpus, accelerator), *_uneven(gpus), *notes)


def _neighbours(gpus: Sequence[Gpu]) -> dict[int, set[int]]:
    here = {gpu.index for gpu in gpus}
    return {gpu.index: here & set(gpu.nvlink_peers) for gpu in gpus}


def _all_pairs(gpus: Sequence[Gpu]) -> bool:
    return all(len(peers) == len(gpus) - 1 for peers in _neighbours(gpus).values())


def _ring(gpus: Sequence[Gpu]) -> bool:
    """A closed path over NVLinks through every GPU, as a ring all-reduce needs (DGX-1's cube)."""
    neighbours, start = _neighbours(gpus), gpus[0].index

    def walk(at: int, seen: frozenset[int]) -> bool:
        if len(seen) == len(gpus):
            return start in neighbours[at]
        return any(walk(to, seen | {to}) for to in neighbours[at] - seen)

    return walk(start, frozenset((start,)))


def _share(gpus: Sequence[Gpu]) -> float:
    """Part of a GPU's NVLinks that ends at a GPU of this plan, taking links as evenly spread."""
    here = _neighbours(gpus)
    return min(len(here[gpu.index]) / len(gpu.nvlink_peers) for gpu in gpus)


def _uneven(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """A GPU with fewer links than its like has lost some, and sets the pace of all."""
    most = max(gpu.nvlink_active for gpu in gpus)
    fewer = [gpu for gpu in gpus if gpu.nvlink_active < most]
    return tuple(
        f"GPU {gpu.index} has {gpu.nvlink_active} active NVLinks where others have {most}"
        for gpu in fewer
    )


def _why_not_nvlink(gpus: Sequence[Gpu], accelerator: Accelerator) -> tuple[str, ...]:
    if len(gpus) < 2:
        return ()
    if not accelerator.nvlink_bytes_per_s:
        active = any(gpu.nvlink_peers for gpu in gpus)
        return (f"NVLink is active, but its rate for {accelerator.name} is unknown",) * active
    pairs = sorted({(min(i, j), max(i, j)) for i, to in _neighbours(gpus).items() for j in to})
    if not pairs:
        return (
            f"{accelerator.name} can have NVLink, but none is active between these GPUs (no bridge,"
            " or the fabric manager does not run); PCIe is taken",
        )
    return (
        "NVLink joins only the pairs " + ", ".join(f"{i}-{j}" for i, j in pairs)
        + "; what all ranks exchange goes at the rate of PCIe",
    )  # fmt: skip


def _pcie_link(
    gpus: Sequence[Gpu], accelerator: Accelerator, data: Any
) -> tuple[Link, tuple[str, ...]]:
    """The slowest GPU's, at the generation that it negotiates under load."""
    latency_s = data["pcie"]["latency_s"]["value"]
    found, notes = [], []
    for gpu in gpus:
        generation = gpu.pcie_max_generation or gpu.pcie_generation
        rate = None
        if generation and gpu.pcie_width:
            rate = pcie_bytes_per_s(generation, gpu.pcie_width, data)
        if rate is not None:
            found.append((rate, f"PCIe {generation} x{gpu.pcie_width}"))
        if gpu.pcie_generation and gpu.pcie_generation < (generation or 0):
            notes.append(
                f"GPU {gpu.index} idles at PCIe {gpu.pcie_generation}; {generation}, which it"
                " reaches under load, is taken"
            )
        if gpu.pcie_width and gpu.pcie_width < (gpu.pcie_max_width or 0):
            notes.append(
                f"GPU {gpu.index} runs {gpu.pcie_width} of {gpu.pcie_max_width} PCIe lanes"
            )
    if len(found) == len(gpus):
        rate, what = min(found)
        source = f"{what} as negotiated; {data['pcie']['source']}"
        return Link(kind="pcie", bytes_per_s=rate, latency_s=latency_s, source=source), (*notes,)
    if not accelerator.pcie_bytes_per_s:
        raise UsageError(
            f"the rate of the link between {accelerator.title} GPUs is unknown",
            why="NVML does not say the PCIe link, and the catalog has no figure",
            do="describe the machine in a cluster file and pass it to --hardware",
        )
    source = f"{accelerator.name}: {accelerator.sources.get('pcie_bytes_per_s', 'catalog')}"
    notes.append("NVML does not say the PCIe link of every GPU; the datasheet's is taken")
    rate = accelerator.pcie_bytes_per_s
    return Link(kind="pcie", bytes_per_s=rate, latency_s=latency_s, source=source), (*notes,)

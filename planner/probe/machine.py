"""This machine → Cluster: its GPUs where there are any that can be used, its CPU where not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from outlay.planner.probe.gpus import GpuReport, read_gpus
from outlay.planner.probe.host import read_host
from outlay.planner.probe.links import gpu_link, shm_link
from outlay.planner.probe.visible import VARIABLE
from outlay.planner.spec.cluster import Cluster, Gpu, Host
from outlay.profiles.errors import UsageError
from outlay.profiles.loader import Accelerator, accelerator, match_nvml
from outlay.profiles.units import format_bytes

DEFAULT_CPU_RANKS = 2
HELD_FRACTION = 0.05
"""Of a GPU's memory; more than this in other hands is worth a note (a display takes less)."""


def probe(
    *, ranks: int | None = None, folder: Path = Path(), price_usd_per_h: float | None = None
) -> Cluster:
    """What is in this machine. `ranks`: processes to plan for; null = each whole GPU, 2 on CPU."""
    if ranks is not None and ranks < 1:
        raise UsageError(f"{ranks} ranks leave nothing to train on", do="ask for at least one")
    if price_usd_per_h is not None and not (0 <= price_usd_per_h < math.inf):
        raise UsageError(f"a price of {price_usd_per_h} USD an hour cannot be meant")
    host, notes = read_host(folder)
    report = read_gpus()
    whole = [gpu for gpu in report.gpus if not gpu.mig]
    if report.gpus and not whole:
        raise UsageError(
            f"all {len(report.gpus)} GPUs are split by MIG",
            why="outlay plans for whole GPUs",
            do="nvidia-smi -i INDEX -mig 0 joins one again, or hide them: CUDA_VISIBLE_DEVICES=''",
        )
    build = _of_gpus if whole else _of_cpu
    return build(host, report, ranks, price_usd_per_h, notes)


def _of_gpus(
    host: Host,
    report: GpuReport,
    ranks: int | None,
    price_usd_per_h: float | None,
    notes: tuple[str, ...],
) -> Cluster:
    whole = [gpu for gpu in report.gpus if not gpu.mig]
    if ranks is not None and ranks > len(whole):
        raise UsageError(
            f"{ranks} ranks need {ranks} whole GPUs", why=f"this machine offers {len(whole)}"
        )
    gpus = whole[:ranks]
    kind = _one_kind(gpus)
    link, link_notes = gpu_link(gpus, kind)
    return Cluster(
        accelerator=kind,
        nodes=1,
        ranks_per_node=len(gpus),
        usable_bytes=min(gpu.total_bytes - gpu.reserved_bytes for gpu in gpus),
        intra=link,
        inter=None,
        source="probe",
        host=host,
        gpus=tuple(gpus),
        price_usd_per_h=price_usd_per_h,
        price_source=None if price_usd_per_h is None else "as given",
        driver=report.driver,
        cuda=report.cuda,
        notes=(
            *report.notes,
            *_mig_notes(report.gpus, whole),
            *_spare_notes(len(whole), len(gpus)),
            *_memory_notes(gpus),
            *_power_notes(gpus, kind),
            *link_notes,
            *notes,
        ),
    )


def _of_cpu(
    host: Host,
    report: GpuReport,
    ranks: int | None,
    price_usd_per_h: float | None,
    notes: tuple[str, ...],
) -> Cluster:
    ranks = min(DEFAULT_CPU_RANKS, host.cores) if ranks is None else ranks
    if ranks > host.cores:
        raise UsageError(
            f"{ranks} ranks on the CPU need {ranks} cores",
            why=f"this process may use {host.cores}",
            do=f"ask for at most {host.cores} ranks",
        )
    return Cluster(
        accelerator=accelerator("cpu"),
        nodes=1,
        ranks_per_node=ranks,
        usable_bytes=host.available_bytes // ranks,
        intra=shm_link(),
        inter=None,
        source="probe",
        host=host,
        price_usd_per_h=price_usd_per_h,
        price_source=None if price_usd_per_h is None else "as given",
        driver=report.driver,
        cuda=report.cuda,
        notes=(*report.notes, *notes),
    )


def _one_kind(gpus: Sequence[Gpu]) -> Accelerator:
    """The catalog entry of GPUs that must all be alike: a plan gives every rank the same work."""
    names = dict.fromkeys(gpu.name for gpu in gpus)
    if len(names) == 1:
        kinds = {kind.name: kind for kind in (match_nvml(g.name, g.total_bytes) for g in gpus)}
        if len(kinds) == 1:
            return next(iter(kinds.values()))
    groups: dict[tuple[str, int], list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault((gpu.name, gpu.total_bytes), []).append(gpu)
    ways = [
        f"{VARIABLE}={','.join(gpu.uuid for gpu in alike)}  ({len(alike)} × {name})"
        for (name, _), alike in groups.items()
    ]
    raise UsageError(
        "the GPUs of this machine are of different kinds",
        why="; ".join(f"GPU {g.index}: {g.name}, {format_bytes(g.total_bytes)}" for g in gpus),
        do="choose one kind and start again with one of\n       " + "\n       ".join(ways),
    )


def _mig_notes(gpus: Sequence[Gpu], whole: Sequence[Gpu]) -> tuple[str, ...]:
    split = [str(gpu.index) for gpu in gpus if gpu.mig]
    if not split:
        return ()
    uuids = ",".join(gpu.uuid for gpu in whole)
    return (
        f"GPU {', '.join(split)} is split by MIG and left out; ranks meet only whole GPUs with"
        f" {VARIABLE}={uuids}",
    )


def _spare_notes(whole: int, used: int) -> tuple[str, ...]:
    return (f"{used} of {whole} GPUs are planned for, as asked",) if used < whole else ()


def _memory_notes(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    held = [(g, g.total_bytes - g.reserved_bytes - g.free_bytes) for g in gpus]
    return tuple(
        f"other processes hold {format_bytes(held_bytes)} of GPU {gpu.index}'s"
        f" {format_bytes(gpu.total_bytes)}; the plan counts on that memory too"
        for gpu, held_bytes in held
        if held_bytes > HELD_FRACTION * gpu.total_bytes
    )


def _power_notes(gpus: Sequence[Gpu], kind: Accelerator) -> tuple[str, ...]:
    """A capped GPU is slower than its datasheet."""
    return tuple(
        f"GPU {gpu.index} is limited to {gpu.power_limit_w:.0f} W; the datasheet's rates are for"
        f" {kind.tdp_w:.0f} W"
        for gpu in gpus
        if gpu.power_limit_w and kind.tdp_w and gpu.power_limit_w < kind.tdp_w
    )

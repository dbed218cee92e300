"""The host as this process may use it: cores, memory, instruction sets, disk."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from outlay.planner.probe.cgroup import CgroupLimits, read_limits
from outlay.planner.spec.cluster import Host
from outlay.profiles.errors import FileError
from outlay.profiles.units import format_bytes

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
"""Instruction sets that decide which precisions run fast."""


@dataclass(frozen=True, kw_only=True)
class _Cpu:
    model: str
    flags: tuple[str, ...]
    sockets: int | None
    threads_per_core: int | None


def probe_host(folder: Path = Path()) -> Host:
    """The host alone, with the free disk of `folder`."""
    return read_host(folder)[0]


def read_host(folder: Path, *, root: Path = Path("/")) -> tuple[Host, tuple[str, ...]]:
    """The host, and what could not be found out or deserves a word. `root` holds proc and sys."""
    import psutil

    limits, cpu, memory = read_limits(root), _read_cpu(root), psutil.virtual_memory()
    ram_bytes = min(memory.total, limits.memory_bytes or memory.total)
    left_bytes = memory.available if limits.memory_left_bytes is None else limits.memory_left_bytes
    host = Host(
        cpu_model=cpu.model,
        cores=_cores(limits),
        sockets=cpu.sockets or 1,
        ram_bytes=ram_bytes,
        available_bytes=min(memory.available, left_bytes),
        disk_free_bytes=_disk_free(folder),
        flags=cpu.flags,
    )
    return host, _notes(host, cpu, limits, memory.total)


def _allowed() -> int:
    """Logical CPUs that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cores(limits: CgroupLimits) -> int:
    """Whole cores: a thread beyond the quota would be stopped for a part of each period."""
    allowed = _allowed()
    return allowed if limits.cores is None else max(1, min(allowed, int(limits.cores)))


def _disk_free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise FileError(
            "the free disk of this folder cannot be read", where=str(folder), why=str(error)
        ) from None


def _notes(host: Host, cpu: _Cpu, limits: CgroupLimits, total_bytes: int) -> tuple[str, ...]:
    notes = []
    if limits.cores is not None and limits.cores < _allowed():
        notes.append(
            f"a control group allows {limits.cores:g} of {_allowed()} cores; {host.cores} are used"
        )
    if host.ram_bytes < total_bytes:
        notes.append(
            f"a control group allows {format_bytes(host.ram_bytes)} of"
            f" {format_bytes(total_bytes)} of memory"
        )
    if cpu.threads_per_core and cpu.threads_per_core > 1:
        notes.append(
            f"{cpu.threads_per_core} of the {host.cores} cores counted here share one physical core"
        )
    if cpu.sockets is None:
        notes.append("this system does not say how many CPU sockets there are; one is assumed")
    if not cpu.flags:
        notes.append("this system names no instruction set that outlay knows (avx2, asimd, …)")
    return tuple(notes)


def _read_cpu(root: Path) -> _Cpu:
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _cpu_elsewhere()
    return _parse_cpuinfo(text, root)


def _parse_cpuinfo(text: str, root: Path) -> _Cpu:
    """Linux's /proc/cpuinfo: x86 says `model name` and `flags`, Arm `CPU part` and `Features`."""
    blocks = [
        {key.strip(): value.strip() for key, _, value in (ln.partition(":") for ln in lines)}
        for lines in (block.splitlines() for block in text.split("\n\n"))
        if lines
    ]
    first = blocks[0] if blocks else {}
    known = set(first.get("flags", first.get("Features", "")).split())
    sockets = {block["physical id"] for block in blocks if "physical id" in block}
    siblings, cores = first.get("siblings", ""), first.get("cpu cores", "")
    counted = siblings.isdigit() and cores.isdigit() and int(cores) > 0
    return _Cpu(
        model=first.get("model name") or _part(first),
        flags=tuple(flag for flag in FLAGS if flag in known),
        sockets=len(sockets) or _packages(root),
        threads_per_core=int(siblings) // int(cores) if counted else None,
    )


def _part(block: dict[str, str]) -> str:
    """Arm's kernel prints numbers, not a name."""
    numbers = [f"{k[4:]} {block[k]}" for k in ("CPU implementer", "CPU part") if k in block]
    return f"{platform.machine()} ({', '.join(numbers)})" if numbers else platform.machine()


def _packages(root: Path) -> int | None:
    """Sockets as the kernel numbers them; null where it does not (-1 on some Arm machines)."""
    found = set()
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id"):
        try:
            found.add(path.read_text(encoding="utf-8").strip())
        except OSError:
            continue
    return len(found - {"-1"}) or None


def _cpu_elsewhere() -> _Cpu:
    """macOS and Windows: py-cpuinfo asks the system in a process of its own."""
    import cpuinfo

    info = cpuinfo.get_cpu_info() or {}
    known = {str(flag).lower() for flag in info.get("flags", ())}
    return _Cpu(
        model=info.get("brand_raw") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in known),
        sockets=None,
        threads_per_core=None,
    )

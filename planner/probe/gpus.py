"""NVIDIA GPUs through NVML (nvidia-ml-py): what they are, and which of them NVLink joins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlay.planner.probe.visible import visible
from outlay.planner.spec.cluster import Gpu

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")
"""PCI class codes of a VGA and of a 3D controller: the GPUs, not their audio functions."""


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """What NVML said. `gpus` are those that CUDA_VISIBLE_DEVICES leaves, MIG ones included."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    notes: tuple[str, ...] = ()


def probe_gpus() -> tuple[list[Gpu], str | None, str | None]:
    """(GPUs, driver version, CUDA version that the driver supports)."""
    report = read_gpus()
    return list(report.gpus), report.driver, report.cuda


def read_gpus(*, root: Path = Path("/")) -> GpuReport:
    """The GPUs, and in notes why there are none or what a GPU would not say."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuReport(notes=(_why_none(pynvml, error, _on_pci(root)),))
    try:
        return _read(pynvml)
    except pynvml.NVMLError as error:
        return GpuReport(notes=(_failed(error, _on_pci(root)),))
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _on_pci(root: Path) -> int:
    """NVIDIA GPUs on the PCI bus, seen without any driver (Linux)."""
    found = 0
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            kind = (vendor.parent / "class").read_text(encoding="utf-8")
            same = vendor.read_text(encoding="utf-8").strip() == NVIDIA_VENDOR
            found += same and kind.startswith(DISPLAY_CLASSES)
    return found


def _why_none(nvml: Any, error: Any, on_pci: int) -> str:
    """Absent is normal on a CPU machine; anything else is a fault that must not look like it."""
    seen = f", although the PCI bus shows {on_pci} NVIDIA GPUs: install the driver"
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no GPUs: the NVIDIA library (NVML) is not installed" + (seen if on_pci else "")
    if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return (
            "no GPUs: the NVIDIA library is installed, but the driver is not loaded"
            " (nvidia-smi says more; a container must be started with its GPUs)"
        )
    return _failed(error, on_pci)


def _failed(error: Any, on_pci: int) -> str:
    seen = f"the PCI bus shows {on_pci} of them" if on_pci else "there may be some"
    return (
        f"GPUs could not be read, so only the CPU is planned for, but {seen}:"
        f" NVML says {str(error)!r} (code {error.value}); see what nvidia-smi says"
    )


def _read(nvml: Any) -> GpuReport:
    driver, cuda = _optional(nvml, nvml.nvmlSystemGetDriverVersion), _cuda(nvml)
    count = nvml.nvmlDeviceGetCount()
    if not count:
        note = f"no GPUs: the NVIDIA driver {driver or ''} works and finds no device"
        return GpuReport(driver=driver, cuda=cuda, notes=(note,))
    handles, places, notes = _handles(nvml, count)
    gpus: list[Gpu] = []
    for index, handle in handles.items():
        try:
            gpu, notes_of_gpu = _read_gpu(nvml, handle, index)
            gpus.append(_with_nvlink(nvml, gpu, handle, places))
            notes += notes_of_gpu
        except nvml.NVMLError as error:
            notes.append(_left_out(index, error))
    chosen, more = visible(_switched(gpus), count=count)
    return GpuReport(gpus=chosen, driver=driver, cuda=cuda, notes=(*dict.fromkeys(notes), *more))


def _handles(
    nvml: Any, count: int
) -> tuple[dict[int, Any], dict[tuple[int, int, int], int], list[str]]:
    """(index → handle, PCI address → index, notes); NVLinks name their far end by PCI address."""
    handles: dict[int, Any] = {}
    places: dict[tuple[int, int, int], int] = {}
    notes = []
    for index in range(count):
        try:
            handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            place = _optional(nvml, nvml.nvmlDeviceGetPciInfo, handles[index])
        except nvml.NVMLError as error:
            handles.pop(index, None)
            notes.append(_left_out(index, error))
            continue
        if place is not None:
            places[_address(place)] = index
    return handles, places, notes


def _left_out(index: int, error: Any) -> str:
    return f"GPU {index} is left out: NVML says {str(error)!r} (code {error.value})"


def _optional(nvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """None where this GPU or driver does not say. A GPU that is gone is an error, not unknown."""
    try:
        return ask(*arguments)
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
            raise
        return None


def _cuda(nvml: Any) -> str | None:
    """NVML's 12040 → "12.4"."""
    version = _optional(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def _read_gpu(nvml: Any, handle: Any, index: int) -> tuple[Gpu, list[str]]:
    """All but the links. Name, UUID and memory are needed; the rest may be unknown."""
    # Version 2 of the memory call says what the driver keeps; drivers before R510 lack it.
    memory = _optional(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    notes = []
    if memory is None:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        notes.append("this driver does not say how much GPU memory it keeps; none is deducted")
    mode = _optional(nvml, nvml.nvmlDeviceGetMigMode, handle)
    limit_mw = _optional(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        total_bytes=memory.total,
        free_bytes=memory.free,
        reserved_bytes=getattr(memory, "reserved", 0),
        power_limit_w=None if limit_mw is None else limit_mw / 1e3,
        pcie_generation=_optional(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        pcie_width=_optional(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        pcie_max_generation=_optional(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_max_width=_optional(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        nvlink_peers=(),
        mig=bool(mode and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE),
    ), notes


def _address(pci: Any) -> tuple[int, int, int]:
    return pci.domain, pci.bus, pci.device


def _with_nvlink(nvml: Any, gpu: Gpu, handle: Any, places: dict[tuple[int, int, int], int]) -> Gpu:
    """The GPU with its active links: to which GPU by PCI address, or to a switch."""
    active, switch, peers = 0, False, set()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if not _optional(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link):
            continue
        active += 1
        kind = _optional(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        switch |= kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
        remote = _optional(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        if remote is not None and _address(remote) in places:
            peers.add(places[_address(remote)])
    return replace(
        gpu,
        nvlink_active=active,
        nvlink_switch=switch,
        nvlink_peers=tuple(sorted(peers - {gpu.index})),
    )


def _switched(gpus: list[Gpu]) -> list[Gpu]:
    """Every GPU on NVSwitches reaches every other: one fabric spans the machine."""
    on_switch = {gpu.index for gpu in gpus if gpu.nvlink_switch}
    return [
        replace(gpu, nvlink_peers=tuple(sorted((on_switch | set(gpu.nvlink_peers)) - {gpu.index})))
        if gpu.nvlink_switch
        else gpu
        for gpu in gpus
    ]

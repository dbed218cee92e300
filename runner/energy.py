"""Energy of an attempt: NVML's counter, RAPL, or a power limit times utilization, and which it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from outlay.planner.spec.cluster import Cluster
from outlay.profiles.units import format_count

ENERGY_BASE = "OUTLAY_ENERGY_BASE_J"
"""The supervisor's first readings, for the ranks."""
JOULES_PER_KWH = 3.6e6
WINDOW_S = 5.0
"""Power is the mean over at least so long: counters move in jumps."""
MARGIN = 1.1
"""Over the highest power seen, for what is still to come."""
UNKNOWN_MARGIN = 1.5
"""The same, before a window is over and where no limit is known."""


class Counter(Protocol):
    """Joules since a moment of its own; every process of a host reads the same."""

    source: str
    limit_w: float | None
    """At most so much power; null = not known."""

    def joules(self) -> float: ...


class NvmlCounter:
    """All GPUs of the machine, since the driver was loaded (Volta and later)."""

    def __init__(self, nvml: Any, handles: Sequence[Any], limit_w: float | None) -> None:
        self._nvml, self._handles, self.limit_w = nvml, handles, limit_w
        self.source = f"NVML's energy counter of {len(handles)} GPUs"
        self.joules()

    def joules(self) -> float:
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return sum(float(read(handle)) for handle in self._handles) / 1e3


class RaplCounter:
    """CPU packages, Linux powercap. The kernel's counters wrap around; they are unwound here."""

    source = "RAPL (CPU packages)"
    limit_w: float | None = None

    def __init__(self, packages: Sequence[Path]) -> None:
        self._packages = packages
        self._ranges = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        self._last = [self._read(p) for p in packages]
        self._turns = [0] * len(packages)

    @staticmethod
    def _read(package: Path) -> int:
        return int((package / "energy_uj").read_text())

    def joules(self) -> float:
        for i, package in enumerate(self._packages):
            now = self._read(package)
            self._turns[i] += now < self._last[i]
            self._last[i] = now
        whole = zip(self._last, self._turns, self._ranges, strict=True)
        return sum(now + turns * size for now, turns, size in whole) / 1e6


class BusyCounter:
    """Power limit times the share of time that the machine's cores were not idle."""

    def __init__(self, power_w: float, busy_s: Callable[[], float] | None = None) -> None:
        import psutil

        self.limit_w: float | None = power_w
        self._busy_s = busy_s or _busy_s
        self._cores = psutil.cpu_count() or 1
        self.source = f"{power_w:g} W times the utilization of {self._cores} cores, not measured"

    def joules(self) -> float:
        assert self.limit_w is not None
        return self.limit_w * self._busy_s() / self._cores


def _busy_s() -> float:
    """Core-seconds of all processes since boot."""
    import psutil

    times = psutil.cpu_times()
    return float(
        times.user + times.system + getattr(times, "irq", 0) + getattr(times, "softirq", 0)
    )


class LimitCounter:
    """Power limit times time: GPUs without a counter, taken as busy all the time."""

    def __init__(self, power_w: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_w: float | None = power_w
        self._clock = clock
        self.source = f"{format_count(power_w)} W power limit times time at full use, not measured"

    def joules(self) -> float:
        assert self.limit_w is not None
        return self.limit_w * self._clock()


class EnergyUse:
    """What the counters say since `base_j`, times PUE.

    Counters are read at most four times a second; in between the highest power is taken, so that
    the figure is never too low.
    """

    def __init__(
        self,
        counters: Sequence[Counter],
        *,
        pue: float,
        base_j: Sequence[float] | None = None,
        already_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters, self._pue, self._clock = tuple(counters), pue, clock
        self.source = " + ".join(c.source for c in counters) + f", times PUE {pue:g}"
        # before the first reading the attempt ran already; so long at most at the limit
        began_j = (c.joules() - already_s * (c.limit_w or 0.0) for c in counters)
        self.base_j = tuple(began_j) if base_j is None else tuple(base_j)
        limits = [c.limit_w for c in counters]
        known = [w for w in limits if w is not None]
        self._limit_kw = sum(known) * pue / 1e3 if len(known) == len(limits) else None
        self._read_s = self._window_s = clock()
        self._kwh = self._window_kwh = self._read()
        self._highest_kw = self._latest_kw = 0.0

    def _read(self) -> float:
        now_j = zip(self._counters, self.base_j, strict=True)
        used_j = sum(max(0.0, counter.joules() - base) for counter, base in now_j)
        return used_j * self._pue / JOULES_PER_KWH

    def kwh(self) -> float:
        now_s = self._clock()
        if now_s - self._read_s >= 0.25:
            self._kwh, self._read_s = self._read(), now_s
            lasted_s = now_s - self._window_s
            if lasted_s >= WINDOW_S:
                power_kw = (self._kwh - self._window_kwh) * 3600 / lasted_s
                self._highest_kw, self._latest_kw = max(self._highest_kw, power_kw), power_kw
                self._window_s, self._window_kwh = now_s, self._kwh
        return self._kwh + self.upper_kw() * (now_s - self._read_s) / 3600

    def upper_kw(self) -> float:
        if self._highest_kw:
            upper_kw = MARGIN * self._highest_kw
            return upper_kw if self._limit_kw is None else min(self._limit_kw, upper_kw)
        if self._limit_kw is not None:
            return self._limit_kw
        lasted_s = max(0.25, self._read_s - self._window_s)
        return UNKNOWN_MARGIN * (self._kwh - self._window_kwh) * 3600 / lasted_s

    def expected_kw(self) -> float:
        """As in the last window; before there is one, at most."""
        return self._latest_kw or self.upper_kw()


def energy_of(
    cluster: Cluster,
    power_w: float | None,
    pue: float,
    *,
    base_j: Sequence[float] | None = None,
    already_s: float = 0.0,
) -> EnergyUse | None:
    """The meter of this machine; none where nothing measures and no limit is known."""
    counters, notes = find_counters(cluster, power_w)
    if not counters:
        return None
    use = EnergyUse(counters, pue=pue, base_j=base_j, already_s=already_s)
    use.source = "; ".join((use.source, *notes))
    return use


def find_counters(
    cluster: Cluster, power_w: float | None, *, root: Path = Path("/")
) -> tuple[list[Counter], tuple[str, ...]]:
    """(counters, what they leave out). None where nothing measures and no limit is known."""
    found: list[Counter] = []
    notes: list[str] = []
    rapl = _rapl(root)
    if cluster.kind == "gpu":
        gpus = _gpus(cluster, power_w)
        if gpus is None:
            return [], ()
        found.append(gpus)
        if rapl is None:
            notes.append("the host's CPUs and memory are not metered (RAPL is not readable)")
    if rapl is not None:
        found.append(rapl)
    elif cluster.kind != "gpu" and power_w is not None:
        found.append(BusyCounter(power_w))
    return found, tuple(notes)


def _rapl(root: Path) -> RaplCounter | None:
    packages = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
    packages += sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9][0-9]"))
    try:
        return RaplCounter(packages) if packages else None
    except (OSError, ValueError):  # since 2020 only root may read them on most systems
        return None


def _gpus(cluster: Cluster, power_w: float | None) -> Counter | None:
    limits = [gpu.power_limit_w for gpu in cluster.gpus]
    known = [w for w in limits if w is not None]
    limit_w = sum(known) if known and len(known) == len(limits) else None
    if limit_w is None and cluster.accelerator.tdp_w is not None:
        limit_w = cluster.accelerator.tdp_w * (len(cluster.gpus) or cluster.ranks)
    limit_w = power_w if power_w is not None else limit_w
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in cluster.gpus]
        if handles:
            return NvmlCounter(pynvml, handles, limit_w)
    return None if limit_w is None else LimitCounter(limit_w)

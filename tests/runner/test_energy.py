"""Energy from counters, from files that look like RAPL, and from a limit times utilization."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from outlay.planner.spec.cluster import Cluster, Gpu
from outlay.profiles.errors import UnknownName, UsageError
from outlay.profiles.loader import accelerator
from outlay.runner import energy
from outlay.runner.energy import (
    BusyCounter,
    EnergyUse,
    LimitCounter,
    NvmlCounter,
    RaplCounter,
    find_counters,
)
from outlay.runner.limits import Limits, carbon_of_region


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Fake:
    source = "fake"

    def __init__(self, limit_w: float | None = None) -> None:
        self.limit_w, self.j = limit_w, 5000.0

    def joules(self) -> float:
        return self.j


def rapl_tree(root: Path, *values_uj: int, size_uj: int = 1_000_000) -> list[Path]:
    packages = []
    for i, value in enumerate(values_uj):
        package = root / f"sys/class/powercap/intel-rapl:{i}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(f"{value}\n")
        (package / "max_energy_range_uj").write_text(f"{size_uj}\n")
        packages.append(package)
    return packages


def test_what_is_used_counts_from_the_base_times_pue() -> None:
    clock, counter = Clock(), Fake()
    use = EnergyUse([counter], pue=1.5, clock=clock)
    counter.j += 3.6e6
    clock.now_s += 3600
    assert use.kwh() == pytest.approx(1.5)
    assert use.upper_kw() == pytest.approx(1.5 * 1.1)
    other = EnergyUse([counter], pue=1.5, base_j=use.base_j, clock=clock)
    assert other.kwh() == pytest.approx(1.5)
    assert use.source == "fake, times PUE 1.5"


def test_between_readings_the_figure_is_never_too_low_and_the_limit_is_kept() -> None:
    clock, counter = Clock(), Fake(limit_w=1000.0)
    use = EnergyUse([counter], pue=1.0, clock=clock)
    assert use.upper_kw() == pytest.approx(1.0)
    clock.now_s += 0.2
    assert use.kwh() == pytest.approx(0.2 / 3600)
    for _ in range(20):
        clock.now_s += 1
        counter.j += 950.0
        use.kwh()
    assert use.upper_kw() == pytest.approx(1.0)


def test_the_start_before_the_first_reading_is_charged_at_the_limit() -> None:
    clock, counter = Clock(), Fake(limit_w=360.0)
    use = EnergyUse([counter], pue=1.0, already_s=10.0, clock=clock)
    assert use.kwh() == pytest.approx(3600 / 3.6e6)


def test_rapl_is_unwound(tmp_path: Path) -> None:
    counter = RaplCounter(rapl_tree(tmp_path, 900_000, 100))
    began_j = counter.joules()
    rapl_tree(tmp_path, 100_000, 200)
    assert counter.joules() - began_j == pytest.approx(0.2 + 0.0001)


def test_a_share_of_busy_cores_times_the_limit(monkeypatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    busy = iter([10.0, 12.0])
    counter = BusyCounter(200.0, lambda: next(busy))
    assert -counter.joules() + counter.joules() == pytest.approx(100.0)
    assert "not measured" in counter.source


def test_which_meter_a_machine_has(cpu_cluster: Cluster, tmp_path: Path) -> None:
    assert find_counters(cpu_cluster, None, root=tmp_path) == ([], ())
    (busy,), _ = find_counters(cpu_cluster, 150.0, root=tmp_path)
    assert isinstance(busy, BusyCounter)
    rapl_tree(tmp_path, 1)
    (rapl,), _ = find_counters(cpu_cluster, None, root=tmp_path)
    assert isinstance(rapl, RaplCounter)


def test_gpus_without_a_counter_are_taken_at_their_limit(cpu_cluster, tmp_path) -> None:
    gpu = Gpu(
        index=0,
        name="x",
        uuid="GPU-none",
        total_bytes=1,
        free_bytes=1,
        power_limit_w=300.0,
        pcie_generation=None,
        pcie_width=None,
        nvlink_peers=(),
    )
    cluster = dataclasses.replace(
        cpu_cluster, accelerator=accelerator("a100-sxm-80gb"), gpus=(gpu, gpu)
    )
    (counter,), notes = find_counters(cluster, None, root=tmp_path)
    assert isinstance(counter, LimitCounter)
    assert counter.limit_w == 600.0
    assert "not measured" in counter.source
    assert "CPUs and memory are not metered" in notes[0]


def test_nvml_counts_millijoules_of_all_gpus() -> None:
    nvml = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: handle * 1000)
    counter = NvmlCounter(nvml, [3, 4], 700.0)
    assert counter.joules() == 7.0
    assert counter.source == "NVML's energy counter of 2 GPUs"


def test_energy_of_a_machine_says_what_it_is(cpu_cluster, monkeypatch) -> None:
    monkeypatch.setattr(energy, "_rapl", lambda _root: None)
    use = energy.energy_of(cpu_cluster, 100.0, 1.2)
    assert use is not None
    assert "100 W times the utilization" in use.source
    assert use.source.endswith("times PUE 1.2")


def test_carbon_of_a_region_has_its_source() -> None:
    value, source = carbon_of_region("us-central1")
    assert 0.05 < value < 1.0
    assert "us-central1" in source
    with pytest.raises(UnknownName, match="us-central1"):
        carbon_of_region("us-centrall1")


@pytest.mark.parametrize(
    "bad", [{"pue": 0.9}, {"walltime_s": 0.0}, {"power_w": float("inf")}, {"minimum_s": -1.0}]
)
def test_nonsense_is_refused(bad) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        Limits(**bad)


def test_pue_is_assumed_where_none_is_given() -> None:
    assert Limits(pue=1.1).used_pue() == (1.1, "--pue")
    assert "assumed" in Limits().used_pue()[1]

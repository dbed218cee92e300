"""Link arithmetic, and the integrity of profiles/efficiency/links.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.probe.gpus import read_gpus
from outlay.planner.probe.links import gpu_link, pcie_bytes_per_s, shm_link
from outlay.planner.spec.cluster import Gpu
from outlay.profiles.errors import UsageError
from outlay.profiles.loader import Accelerator, read_yaml

DATA = read_yaml("efficiency/links.yaml")
CARD = Accelerator(name="card", title="Card", vendor="NVIDIA", kind="gpu", nvlink_bytes_per_s=300e9)


def gpu(index: int, *peers: int, **more: object) -> Gpu:
    plain = Gpu(
        index=index,
        name="Card",
        uuid=f"GPU-{index}",
        total_bytes=2**34,
        free_bytes=2**34,
        power_limit_w=None,
        pcie_generation=4,
        pcie_width=16,
        nvlink_peers=peers,
        nvlink_active=4 * len(peers),
    )
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("generation", "width", "gb_per_s"),
    # The rounded figures that the PCI-SIG and vendors print for one direction.
    [(1, 16, 4.0), (2, 16, 8.0), (3, 16, 15.75), (4, 16, 31.5), (5, 16, 63.0), (4, 8, 15.75)],
)
def test_pcie_rates_are_the_published_ones(generation: int, width: int, gb_per_s: float) -> None:
    rate = pcie_bytes_per_s(generation, width, DATA)
    assert rate == pytest.approx(gb_per_s * 1e9, rel=0.002)


def test_an_unknown_generation_has_no_rate() -> None:
    assert pcie_bytes_per_s(9, 16, DATA) is None


def figures(value: object) -> list[dict[str, object]]:
    if isinstance(value, dict):
        if "value" in value:
            return [value]
        return [found for inner in value.values() for found in figures(inner)]
    return []


def test_every_figure_has_bounds_a_kind_and_a_source() -> None:
    found = figures(DATA)
    assert len(found) == 7
    for figure in found:
        assert {"value", "low", "high", "kind", "source"} <= set(figure)
        low, value, high = figure["low"], figure["value"], figure["high"]
        assert isinstance(low, float) and isinstance(value, float) and isinstance(high, float)
        assert 0 < low < value < high
        assert figure["kind"] in ("measured", "published", "guess")
        assert figure["source"]


def test_each_pcie_generation_is_faster_than_the_last() -> None:
    rates = [pcie_bytes_per_s(generation, 16, DATA) or 0 for generation in range(1, 7)]
    assert rates == sorted(set(rates))


def test_shm_says_how_it_was_found() -> None:
    link = shm_link()
    assert link.kind == "shm"
    assert "measured" in link.source
    assert link.bytes_per_s > 0


@settings(deadline=None)
@given(st.integers(2, 10))
def test_a_bare_ring_is_nvlink_and_a_broken_one_is_not(count: int) -> None:
    ring = [gpu(i, *{(i - 1) % count, (i + 1) % count}) for i in range(count)]
    assert gpu_link(ring, CARD)[0].kind == "nvlink"
    chain = [gpu(i, *(j for j in (i - 1, i + 1) if 0 <= j < count)) for i in range(count)]
    assert gpu_link(chain, CARD)[0].kind == ("nvlink" if count == 2 else "pcie")


@settings(deadline=None)
@given(st.integers(2, 8), st.data())
def test_part_of_a_full_mesh_gets_its_part_of_the_links(count: int, data: st.DataObject) -> None:
    mesh = [gpu(i, *(j for j in range(count) if j != i)) for i in range(count)]
    used = data.draw(st.integers(2, count))
    link, _ = gpu_link(mesh[:used], CARD)
    assert link.kind == "nvlink"
    assert link.bytes_per_s == pytest.approx(300e9 * (used - 1) / (count - 1))


def test_one_gpu_needs_no_nvlink() -> None:
    link, notes = gpu_link([gpu(0, 1)], CARD)
    assert (link.kind, notes) == ("pcie", ())


def test_links_of_an_unknown_rate_are_told() -> None:
    unknown = dataclasses.replace(CARD, nvlink_bytes_per_s=None)
    link, notes = gpu_link([gpu(0, 1), gpu(1, 0)], unknown)
    assert link.kind == "pcie"
    assert any("rate for card is unknown" in note for note in notes)


def test_no_rate_at_all_is_an_error() -> None:
    silent = [gpu(i, pcie_generation=None) for i in range(2)]
    with pytest.raises(UsageError, match="unknown"):
        gpu_link(silent, CARD)


def pci(root: Path, name: str, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices" / name
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "class").write_text(kind + "\n")


def test_hardware_without_a_library_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert read_gpus(root=tmp_path).notes == (
        "no GPUs: the NVIDIA library (NVML) is not installed",
    )
    pci(tmp_path, "0000:01:00.0", "0x10de", "0x030200")
    pci(tmp_path, "0000:02:00.0", "0x10de", "0x030000")
    pci(tmp_path, "0000:02:00.1", "0x10de", "0x040300")
    pci(tmp_path, "0000:00:02.0", "0x8086", "0x030000")
    assert "2 NVIDIA GPUs: install the driver" in read_gpus(root=tmp_path).notes[0]

"""Looking things up in the catalog."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from outlay.profiles.errors import EXIT_USAGE, UnknownName
from outlay.profiles.loader import (
    accelerator,
    accelerators,
    aliases,
    match_nvml,
    nearest_memory,
)

MIB = 2**20


def test_by_name_alias_and_in_any_case() -> None:
    h100 = accelerator("h100-sxm")
    assert accelerator("H100-SXM ") is h100
    assert aliases()["h100-sxm-80gb"] == "h100-sxm"
    assert accelerator("h100-sxm-80gb") is h100


def test_every_name_is_found_under_itself() -> None:
    for name, entry in accelerators().items():
        assert accelerator(name) is entry


def test_changing_the_mapping_that_one_got_changes_nobody_elses() -> None:
    accelerators().clear()
    assert "h100-sxm" in accelerators()


def test_the_cpu_is_in_the_catalog_without_figures() -> None:
    cpu = accelerator("cpu")
    assert cpu.kind == "cpu"
    assert cpu.flops == {} and "flops" in cpu.unknown


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        accelerator("h100")
    assert caught.value.exit_code == EXIT_USAGE
    assert "unknown accelerator 'h100'" in str(caught.value)
    assert "h100-sxm" in caught.value.near and "h100-pcie" in caught.value.near


@pytest.mark.parametrize(
    ("name", "mib", "entry"),
    [
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-sxm-80gb"),
        ("NVIDIA A100-SXM4-80GB", 81251, "a100-sxm-80gb"),  # older drivers
        ("nvidia a100-sxm4-40gb", 40960, "a100-sxm-40gb"),
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA RTX A6000", 46068, "rtx-a6000"),  # ECC on
        ("NVIDIA GH200 480GB", 97871, "gh200-96gb"),  # the driver counts the CPU's memory in
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
    ],
)
def test_nvml_strings_find_their_entry(name: str, mib: int, entry: str) -> None:
    assert match_nvml(name, mib * MIB).name == entry


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA H20", 143771),  # a variant with more memory
        ("NVIDIA A100-SXM4-80GB", 9856),  # a slice
        ("NVIDIA H20-3e", 143771),
        ("Quadro K620", 2048),
        ("", 81559),
    ],
)
def test_another_gpus_figures_are_never_taken(name: str, mib: int) -> None:
    with pytest.raises(UnknownName, match="unknown GPU") as caught:
        match_nvml(name, mib * MIB)
    assert "GiB" in str(caught.value)


def test_the_message_says_which_entry_is_meant() -> None:
    with pytest.raises(UnknownName, match=r"nvidia h20 \(h20\)"):
        match_nvml("NVIDIA H20-3e", 143771 * MIB)


def test_memory_decides_between_entries_of_one_name() -> None:
    small = accelerator("a100-sxm-40gb")
    large = dataclasses.replace(small, name="large", usable_bytes=81920 * MIB)
    assert nearest_memory([small, large], 81251 * MIB) is large
    assert nearest_memory([small, large], 40536 * MIB) is small
    assert nearest_memory([small, large], 60000 * MIB) is None
    assert nearest_memory([], 40960 * MIB) is None


def test_marketed_memory_serves_where_the_usable_is_unknown() -> None:
    entry = dataclasses.replace(accelerator("a100-sxm-40gb"), usable_bytes=None)
    assert nearest_memory([entry], 40960 * MIB) is entry
    assert nearest_memory([dataclasses.replace(entry, memory_bytes=None)], 40960 * MIB) is None


def test_one_lookup_parses_one_entry_and_imports_no_pandas() -> None:
    code = (
        "import sys, yaml; from outlay.profiles import loader\n"
        "parsed = []; real = yaml.load\n"
        "yaml.load = lambda text, Loader: parsed.append(text) or real(text, Loader=Loader)\n"
        "loader.accelerator('h100-sxm'); loader.instances()\n"
        "assert len(parsed) == 2 and all('rtx-4090:' not in text for text in parsed), parsed\n"
        "assert not {'pandas', 'numpy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""The catalog that is shipped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from typing import ClassVar

import pytest
from catalog_integrity import AcceleratorIntegrity, InstanceIntegrity

from outlay.profiles.loader import (
    Accelerator,
    Instance,
    accelerator,
    accelerators,
    aliases,
    instances,
    read_yaml,
)
from outlay.profiles.offers import carbon_intensities, electricity_prices

FOLDER = files("outlay.profiles") / "accelerators"
CATALOG_FILES = sorted(f.name for f in FOLDER.iterdir() if f.name.endswith(".yaml"))

MEASURED = (
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "b200",
    "b300",
    "gb200",
    "gb300",
    "h100-sxm",
    "h100-sxm-96gb-hbm2e",
    "h200-sxm",
    "v100-sxm-16gb",
    "v100-sxm-32gb",
)
"""Accelerators of the published measurements."""

DATASHEET = (
    # name, usable GiB to 2 places, bf16 TFLOP/s, HBM GB/s, one direction of NVLink GB/s
    ("a100-sxm-80gb", 80.00, 312, 2039, 300),
    ("h100-sxm", 79.65, 989.4, 3352, 450),
    ("h200-sxm", 140.40, 989.4, 4800, 450),
    ("b200", 179.06, 2250, 8000, 900),
    ("mi300x", 191.98, 1307.4, 5300, 448),
)
"""NVIDIA's and AMD's pages, and nvidia-smi for memory. Vendors quote NVLink as both directions."""


class TestAccelerators(AcceleratorIntegrity):
    catalog: ClassVar[Mapping[str, Accelerator]] = accelerators()

    @pytest.mark.parametrize("name", MEASURED)
    def test_what_is_measured_can_be_estimated(self, name: str) -> None:
        a = self.catalog[name]
        assert a.memory_bytes and a.memory_bytes_per_s and a.flops["fp16"] and a.nvlink_bytes_per_s

    @pytest.mark.parametrize(("name", "gib", "bf16", "hbm", "nvlink"), DATASHEET)
    def test_units_are_converted(
        self, name: str, gib: float, bf16: float, hbm: float, nvlink: float
    ) -> None:
        a = self.catalog[name]
        assert a.usable_bytes is not None
        assert round(a.usable_bytes / 2**30, 2) == gib
        assert a.flops["bf16"] == pytest.approx(bf16 * 1e12)
        assert a.memory_bytes_per_s == pytest.approx(hbm * 1e9)
        assert a.nvlink_bytes_per_s == pytest.approx(nvlink * 1e9)

    def test_parts_before_ampere_have_no_bf16(self) -> None:
        for a in self.catalog.values():
            if a.compute_capability and float(a.compute_capability) < 8:
                assert "bf16" not in a.flops and "tf32" not in a.flops, a.name

    def test_one_direction_of_the_link_of_a_pair_of_mi300x_is_a_seventh(self) -> None:
        a = self.catalog["mi300x"]
        assert a.nvlink_bytes_per_s and a.nvlink_pair_bytes_per_s
        assert a.nvlink_bytes_per_s == pytest.approx(7 * a.nvlink_pair_bytes_per_s)

    def test_deepspeed_is_not_said_to_train_on_tpu_or_trainium(self) -> None:
        assert {a.vendor for a in self.catalog.values() if not a.deepspeed} == {"Google", "AWS"}


class TestAcceleratorFiles:
    def test_a_name_is_given_once(self) -> None:
        tops = [
            key
            for name in CATALOG_FILES
            if name != "sources.yaml"
            for key in re.findall(r"^([a-z0-9.-]+):", (FOLDER / name).read_text("utf-8"), re.M)
        ]
        others = [
            alias
            for name in CATALOG_FILES
            for line in re.findall(
                r"^  aliases: \[(.*)\]", (FOLDER / name).read_text("utf-8"), re.M
            )
            for alias in re.findall(r"[\w.-]+", line)
        ]
        twice = [name for name, n in Counter(tops + others).items() if n > 1]
        assert not twice
        assert set(others) == set(aliases())

    @pytest.mark.parametrize("name", [n for n in CATALOG_FILES if n != "sources.yaml"])
    def test_cutting_a_file_into_entries_gives_what_parsing_it_whole_gives(self, name: str) -> None:
        whole = read_yaml(f"accelerators/{name}")
        for key, raw in whole.items():
            a = accelerator(key)
            assert a.title == raw["title"]
            assert a.nvml_names == tuple(raw.get("nvml_names", ()))
            assert set(a.flops) == set(raw["flops_t"])
            assert {alias for alias, to in aliases().items() if to == key} == set(
                raw.get("aliases", ())
            )

    def test_every_source_is_cited(self) -> None:
        text = " ".join((FOLDER / name).read_text("utf-8") for name in CATALOG_FILES)
        cited = {
            key
            for value in re.findall(r'^    [\w.]+: "?([\w+]+)(?::|"|$)', text, re.M)
            for key in value.split("+")
        }
        assert set(read_yaml("accelerators/sources.yaml")) <= cited


class TestInstances(InstanceIntegrity):
    offers: ClassVar[tuple[Instance, ...]] = instances()
    known: ClassVar[Mapping[str, Accelerator]] = accelerators()

    def test_big_providers_are_there(self) -> None:
        assert {"aws", "azure", "gcp", "lambda"} <= {o.provider for o in self.offers}

    def test_a_spot_price_that_only_repeats_the_list_price_was_dropped(self) -> None:
        (repeated,) = [o for o in self.offers if o.name == "1x_A100-80GB_SECURE"]
        assert repeated.on_demand_usd_per_h == 1.39
        assert repeated.spot_usd_per_h is None


class TestEnergy:
    def test_carbon_is_plausible_and_sourced(self) -> None:
        rows = carbon_intensities()
        assert {row.basis for row in rows.values()} == {"operational", "lifecycle"}
        for row in rows.values():
            assert 0 <= row.gco2e_per_kwh < 1500, row.region
            assert 2000 <= row.year <= 2030 and row.source and row.licence, row.region

    def test_country_and_region_figures_are_not_of_one_basis(self) -> None:
        for row in carbon_intensities().values():
            assert (row.scope == "country") == (row.basis == "lifecycle"), row.region

    def test_electricity_is_plausible_and_sourced(self) -> None:
        assert electricity_prices()
        for row in electricity_prices().values():
            assert 0.01 < row.industrial_usd_per_kwh < 1, row.region
            assert 2000 <= row.year <= 2030 and row.source and row.licence, row.region

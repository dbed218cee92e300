"""Nodes for rent: the catalog's and one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlay.profiles.errors import FileError, UnknownName, UsageError
from outlay.profiles.loader import instance, instances, read_instances
from outlay.profiles.offers import carbon_intensities, electricity_prices

COLUMNS = (
    "provider,name,region,accelerator,count,vcpus,ram_gib,nvme_gb,interconnect,inter_node_gbps,"
    "on_demand_usd_per_h,price_date,spot_usd_per_h,spot_least_usd_per_h,spot_date,"
    "reserved_1y_usd_per_h,reserved_date,source,note"
)
ROW = "own,box,,h100-sxm,8,96,1024,,nvswitch,400,20,2026-01-31,,,,,,a quote,"


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["# my prices", COLUMNS, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_node_of_the_catalog_in_bytes() -> None:
    node = instance("aws", "p4d.24xlarge")
    assert (node.accelerator, node.count, node.interconnect) == ("a100-sxm-40gb", 8, "nvswitch")
    assert node.ram_bytes == 1152 * 2**30
    assert node.inter_node_bytes_per_s == 400e9 / 8
    assert node.on_demand_usd_per_h is not None and node.spot_usd_per_h is not None
    assert node.spot_usd_per_h < node.on_demand_usd_per_h
    assert node.price_date is not None


def test_case_does_not_matter() -> None:
    assert instance("Azure", "standard_nd96isr_h100_v5") is instance(
        "azure", "Standard_ND96isr_H100_v5"
    )


def test_what_is_unknown_is_null_and_not_zero() -> None:
    node = instance("aws", "trn2.48xlarge")
    assert node.on_demand_usd_per_h is None and node.price_date is None
    assert instance("gcp", "a2-highgpu-8g").inter_node_bytes_per_s is None


@pytest.mark.parametrize(
    ("provider", "name", "says"),
    [
        ("awz", "p5.48xlarge", "unknown provider 'awz'"),
        ("aws", "p5.49xlarge", "p5.48xlarge"),
    ],
)
def test_unknown_nodes_are_refused_with_the_nearest(provider: str, name: str, says: str) -> None:
    with pytest.raises(UnknownName, match=says):
        instance(provider, name)


def test_region_chooses_and_must_exist() -> None:
    node = instance("aws", "p5.48xlarge")
    assert instance("aws", "p5.48xlarge", node.region) is node
    with pytest.raises(UnknownName, match="us-east-1"):
        instance("aws", "p5.48xlarge", "us-east-7")


def test_a_node_with_prices_in_several_regions_is_asked_about(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, there = ROW.replace("box,,", "box,here,"), ROW.replace("box,,", "box,there,")
    own = read_instances(write(tmp_path / "own.csv", here, there))
    monkeypatch.setattr("outlay.profiles.offers.instances", lambda: own)
    assert instance("own", "box", "there") is own[1]
    with pytest.raises(UsageError, match="here, there"):
        instance("own", "box")


def test_ones_own_prices(tmp_path: Path) -> None:
    (node,) = read_instances(write(tmp_path / "own.csv", ROW))
    assert node.on_demand_usd_per_h == 20 and node.region is None and node.nvme_bytes is None
    assert node.inter_node_bytes_per_s == 50e9


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (ROW.replace(",20,", ",twenty,"), r"own.csv:3: on_demand_usd_per_h.*'twenty'"),
        (ROW.replace(",20,", ",-1,"), r"own.csv:3: on_demand_usd_per_h.*'-1'"),
        (ROW.replace(",20,", ",inf,"), r"own.csv:3: on_demand_usd_per_h.*'inf'"),
        (ROW.replace("h100-sxm", ""), r"own.csv:3: accelerator"),
        (ROW.replace("nvswitch", "wire"), r"own.csv:3: unknown interconnect 'wire'"),
    ],
)
def test_a_bad_row_is_one_message_with_its_place(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_instances(write(tmp_path / "own.csv", row))


def test_a_missing_column_or_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("provider,name\nown,box\n", encoding="utf-8")
    with pytest.raises(FileError, match="no column accelerator"):
        read_instances(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_instances(tmp_path / "absent.csv")


def test_the_catalog_is_read_once() -> None:
    assert instances() is instances()
    assert carbon_intensities() is carbon_intensities()


def test_carbon_and_electricity_by_region() -> None:
    assert carbon_intensities()["us-central1"].provider == "gcp"
    assert carbon_intensities()["us-central1"].gco2e_per_kwh == pytest.approx(413, abs=1)
    assert electricity_prices()["US-Washington"].industrial_usd_per_kwh == 0.0635

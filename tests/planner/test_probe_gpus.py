"""GPUs as the probe sees them through the real nvidia-ml-py and a stub libnvidia-ml.so.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlay.profiles.loader import accelerator

STUB = Path(__file__).parents[1] / "nvml_stub"
NO_COMPILER = 3
MIB = 2**20
GPU = "GPU-000000{}0-0000-4000-8000-00000000000{}"
UUIDS = [GPU.format(a, b) for a, b in zip("abcd", "0123", strict=True)]

PROBE = """
import json, sys
from outlay.planner.probe import probe
from outlay.planner.spec.files import plain
from outlay.profiles.errors import OutlayError
try:
    print(json.dumps(plain(probe(**json.loads(sys.argv[1])))))
except OutlayError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""

Probe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub replaces a shared library of Linux")
    folder = tmp_path_factory.mktemp("nvml")
    built = subprocess.run(
        [sys.executable, str(STUB / "build.py"), str(folder)], capture_output=True, text=True
    )
    if built.returncode == NO_COMPILER:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture
def probe(stub_folder: Path, tmp_path: Path) -> Probe:
    """Probe a scenario (a name, or the text itself) in a process of its own."""

    def run(scenario: str, *, variables: dict[str, str] | None = None, **asked: Any) -> Any:
        path = STUB / "scenarios" / f"{scenario}.txt"
        if "\n" in scenario:
            path = tmp_path / "scenario.txt"
            path.write_text(scenario)
        hidden = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        environment |= {"LD_LIBRARY_PATH": str(stub_folder), "NVML_STUB_SCENARIO": str(path)}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROBE, json.dumps(asked)],
            env=environment | (variables or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    return run


def test_eight_h100_on_switches(probe: Probe) -> None:
    cluster = probe("8xh100-nvswitch")
    h100 = accelerator("h100-sxm")
    assert cluster["accelerator"]["name"] == "h100-sxm"
    assert (cluster["nodes"], cluster["ranks_per_node"], len(cluster["gpus"])) == (1, 8, 8)
    assert cluster["usable_bytes"] == (81559 - 520) * MIB
    assert cluster["intra"]["kind"] == "nvswitch"
    assert cluster["intra"]["bytes_per_s"] == h100.nvlink_bytes_per_s
    assert 0 < cluster["intra"]["latency_s"] < 1e-4
    assert (cluster["driver"], cluster["cuda"]) == ("550.54.15", "12.4")
    assert cluster["price_usd_per_h"] is None
    third = cluster["gpus"][3]
    assert third["nvlink_peers"] == [0, 1, 2, 4, 5, 6, 7]
    assert third["nvlink_active"] == 18
    assert third["free_bytes"] == (81559 - 520 - 4) * MIB
    assert (third["power_limit_w"], third["pcie_generation"], third["pcie_width"]) == (700, 5, 16)
    assert not any("GPU" in note for note in cluster["notes"])


def test_two_4090_over_pcie(probe: Probe) -> None:
    """The idle generation is kept as found; the link is what the slower slot reaches under load."""
    cluster = probe("2xrtx4090-pcie", price_usd_per_h=0.7)
    assert cluster["accelerator"]["name"] == "rtx-4090"
    assert cluster["ranks_per_node"] == 2
    assert cluster["intra"]["kind"] == "pcie"
    assert cluster["intra"]["bytes_per_s"] == pytest.approx(8 * 16e9 * 128 / 130 / 8)
    assert [gpu["pcie_generation"] for gpu in cluster["gpus"]] == [1, 1]
    assert [gpu["power_limit_w"] for gpu in cluster["gpus"]] == [450, None]
    assert [gpu["nvlink_peers"] for gpu in cluster["gpus"]] == [[], []]
    assert cluster["price_usd_per_h"] == 0.7
    assert any("8 of 16 PCIe lanes" in note for note in cluster["notes"])
    assert any("idles at PCIe 1" in note for note in cluster["notes"])


def test_mig_gpu_is_left_out(probe: Probe) -> None:
    cluster = probe("4xa100-mig")
    assert cluster["accelerator"]["name"] == "a100-sxm-40gb"
    assert cluster["ranks_per_node"] == 3
    assert [gpu["index"] for gpu in cluster["gpus"]] == [0, 1, 3]
    assert cluster["intra"]["kind"] == "nvlink"
    # Eight of each GPU's twelve links end at the two other whole GPUs.
    full = accelerator("a100-sxm-40gb").nvlink_bytes_per_s
    assert full is not None
    assert cluster["intra"]["bytes_per_s"] == pytest.approx(full * 2 / 3)
    whole = ",".join(UUIDS[i] for i in (0, 1, 3))
    assert any("GPU 2 is split by MIG" in n and whole in n for n in cluster["notes"])


def test_only_mig_gpus_is_an_error(probe: Probe) -> None:
    found = probe("4xa100-mig", variables={"CUDA_VISIBLE_DEVICES": "2"})
    assert found["error"] == "UsageError"
    assert "split by MIG" in found["message"]


def test_different_kinds_are_refused_with_the_way_out(probe: Probe) -> None:
    found = probe("a100-and-t4")
    assert found["error"] == "UsageError"
    assert "different kinds" in found["message"]
    assert "GPU 2: Tesla T4, 15.00 GiB" in found["message"]
    for uuids in (",".join(UUIDS[:2]), UUIDS[2]):
        assert f"CUDA_VISIBLE_DEVICES={uuids}" in found["message"]
        chosen = probe("a100-and-t4", variables={"CUDA_VISIBLE_DEVICES": uuids})
        assert [gpu["uuid"] for gpu in chosen["gpus"]] == uuids.split(",")


def test_an_index_among_different_kinds_is_doubtful(probe: Probe) -> None:
    by_speed = probe("a100-and-t4", variables={"CUDA_VISIBLE_DEVICES": "2"})
    assert by_speed["accelerator"]["name"] == "t4"
    assert any("CUDA_DEVICE_ORDER" in note for note in by_speed["notes"])
    by_bus = {"CUDA_VISIBLE_DEVICES": "2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert not any("ORDER" in n for n in probe("a100-and-t4", variables=by_bus)["notes"])


def test_unknown_gpu_is_refused(probe: Probe) -> None:
    found = probe("gpu 1 NVIDIA Nonesuch 9000\nmemory 24564 370 1\n")
    assert found["error"] == "UnknownName"
    assert "Nonesuch" in found["message"]


@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("no-driver", "the driver is not loaded"),
        ("no-devices", "finds no device"),
        ("driver-mismatch", "could not be read"),
        ("no-permission", "could not be read"),
    ],
)
def test_without_gpus_the_cpu_is_planned_for_and_says_why(
    probe: Probe, scenario: str, says: str
) -> None:
    cluster = probe(scenario)
    assert cluster["accelerator"]["kind"] == "cpu"
    assert cluster["gpus"] == []
    assert cluster["intra"]["kind"] == "shm"
    assert sum(says in note for note in cluster["notes"]) == 1


def test_a_gpu_that_is_lost_an_old_driver_and_a_busy_gpu(probe: Probe) -> None:
    cluster = probe("4xv100-lost")
    assert [gpu["index"] for gpu in cluster["gpus"]] == [0, 2, 3]
    assert cluster["usable_bytes"] == 32768 * MIB
    for part in (
        "GPU 1 is left out: NVML says 'GPU is lost'",
        "does not say how much GPU memory it keeps",
        "hold 19.80 GiB of GPU 3",
        "GPU 3 is limited to 200 W",
    ):
        assert sum(part in note for note in cluster["notes"]) == 1, part


def test_a_lost_gpu_in_the_list_is_passed_over(probe: Probe) -> None:
    cluster = probe("4xv100-lost", variables={"CUDA_VISIBLE_DEVICES": "2,1,0"})
    assert [gpu["index"] for gpu in cluster["gpus"]] == [2, 0]


def test_bridged_pairs_exchange_over_pcie(probe: Probe) -> None:
    """What joins only pairs does not carry an all-reduce of four; of one pair it does."""
    cluster = probe("4xa6000-pairs")
    a6000 = accelerator("rtx-a6000")
    assert [gpu["nvlink_peers"] for gpu in cluster["gpus"]] == [[1], [0], [3], [2]]
    assert cluster["intra"]["kind"] == "pcie"
    assert cluster["intra"]["bytes_per_s"] == a6000.pcie_bytes_per_s
    assert any("pairs 0-1, 2-3" in note for note in cluster["notes"])
    pair = probe("4xa6000-pairs", ranks=2)
    assert pair["intra"]["kind"] == "nvlink"
    assert pair["intra"]["bytes_per_s"] == a6000.nvlink_bytes_per_s


def test_a_cube_mesh_is_a_ring(probe: Probe) -> None:
    cluster = probe("8xv100-cube")
    assert cluster["intra"]["kind"] == "nvlink"
    assert cluster["gpus"][0]["nvlink_peers"] == [1, 2, 3, 4]
    assert any("ring" in note for note in cluster["notes"])


def test_visible_devices_choose_and_order(probe: Probe) -> None:
    def indices(value: str) -> list[int]:
        cluster = probe("8xh100-nvswitch", variables={"CUDA_VISIBLE_DEVICES": value})
        return [gpu["index"] for gpu in cluster["gpus"]]

    assert indices("3,1") == [3, 1]
    assert indices(f"{UUIDS[2]}, GPU-000000a0") == [2, 0]
    assert indices("4,2,-1,1") == [4, 2]


def test_fewer_ranks_than_gpus(probe: Probe) -> None:
    cluster = probe("8xh100-nvswitch", ranks=4)
    assert (cluster["ranks_per_node"], len(cluster["gpus"])) == (4, 4)
    assert any("4 of 8 GPUs" in note for note in cluster["notes"])


def test_more_ranks_than_gpus_is_refused(probe: Probe) -> None:
    found = probe("2xrtx4090-pcie", ranks=3)
    assert found["error"] == "UsageError"
    assert "2" in found["message"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("9", "names no GPU of this machine"),
        ("1,1", "twice"),
        ("GPU-0000", "begins the UUID of 8 GPUs"),
        ("MIG-1234", "whole GPUs"),
    ],
)
def test_a_wrong_visible_devices_is_one_clear_error(probe: Probe, value: str, says: str) -> None:
    found = probe("8xh100-nvswitch", variables={"CUDA_VISIBLE_DEVICES": value})
    assert found["error"] == "UsageError"
    assert says in found["message"]


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hiding_all_gpus_leaves_the_cpu(probe: Probe, value: str) -> None:
    cluster = probe("8xh100-nvswitch", variables={"CUDA_VISIBLE_DEVICES": value})
    assert cluster["accelerator"]["kind"] == "cpu"
    assert any("hides all 8 GPUs" in note for note in cluster["notes"])
    assert cluster["driver"] == "550.54.15"


def test_a_dead_link_is_named(probe: Probe) -> None:
    head = "driver 550.54.15\n"
    card = "gpu {} NVIDIA H100 80GB HBM3\nmemory 81559 520 4\npcie 5 16 5 16\nswitch {}\n"
    cluster = probe(head + card.format(7, 18) + card.format(1, 16))
    assert "GPU 7 has 16 active NVLinks where others have 18" in cluster["notes"]


def test_sxm_without_links_says_so(probe: Probe) -> None:
    """NVSwitches without their fabric manager leave every link down."""
    cluster = probe("gpu 2 NVIDIA H100 80GB HBM3\nmemory 81559 520 4\npcie 5 16 5 16\n")
    assert cluster["intra"]["kind"] == "pcie"
    assert any("fabric manager" in note for note in cluster["notes"])

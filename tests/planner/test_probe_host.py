"""The host part of the probe: this machine, and trees of proc and control groups made by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.probe import GpuReport, machine, probe, probe_host, read_host
from outlay.planner.probe.cgroup import CgroupLimits, read_limits
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import parse, plain
from outlay.profiles.errors import FileError, UsageError

GIB = 2**30
V2 = "36 25 0:32 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_gpus", lambda: GpuReport(notes=("no GPUs: a test",)))


def test_this_host_agrees_with_the_system(tmp_path: Path) -> None:
    host = probe_host(tmp_path)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= host.cores <= (allowed or 1)
    assert host.sockets >= 1
    assert host.cpu_model
    assert 0 < host.available_bytes <= host.ram_bytes <= psutil.virtual_memory().total
    assert host.disk_free_bytes > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system sets no affinity")
def test_affinity_bounds_the_cores() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from outlay.planner.probe import probe_host; print(probe_host().cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        probe_host(tmp_path / "nowhere")


def test_x86_cpuinfo(tmp_path: Path) -> None:
    block = (
        "processor\t: {}\nmodel name\t: Xeon 9000\nphysical id\t: {}\nsiblings\t: 4\n"
        "cpu cores\t: 2\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16 avx512_bf16\n\n"
    )
    text = "".join(block.format(i, i // 4) for i in range(8))
    put(tmp_path, "proc/cpuinfo", text)
    host, notes = read_host(tmp_path, root=tmp_path)
    assert (host.cpu_model, host.sockets) == ("Xeon 9000", 2)
    assert host.flags == ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
    assert any("share one physical core" in note for note in notes)


def test_arm_cpuinfo(tmp_path: Path) -> None:
    block = (
        "processor\t: {}\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\n"
        "CPU part\t: 0xd4f\n\n"
    )
    put(tmp_path, "proc/cpuinfo", "".join(block.format(i) for i in range(2)))
    for cpu, package in ((0, 0), (1, 0)):
        path = f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"
        put(tmp_path, path, f"{package}\n")
    host, notes = read_host(tmp_path, root=tmp_path)
    assert "0x41" in host.cpu_model
    assert host.flags == ("asimd", "sve", "bf16")
    assert host.sockets == 1
    assert not any("socket" in note for note in notes)


def test_without_proc_the_rest_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS and Windows."""
    import cpuinfo

    monkeypatch.setattr(
        cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Some CPU", "flags": ["AVX2", "sse"]}
    )
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    host, notes = read_host(tmp_path, root=tmp_path)
    assert (host.cpu_model, host.flags, host.sockets) == ("Some CPU", ("avx2",), 1)
    assert host.cores == os.cpu_count()
    assert any("socket" in note for note in notes)


def test_no_control_groups_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == CgroupLimits()


def test_version_2_takes_the_tightest_level(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    put(tmp_path, "proc/self/mountinfo", V2)
    group = "sys/fs/cgroup/"
    put(tmp_path, group + "a/cpu.max", "150000 100000\n")
    put(tmp_path, group + "a/memory.max", f"{8 * GIB}\n")
    put(tmp_path, group + "a/memory.current", f"{5 * GIB}\n")
    put(tmp_path, group + "a/memory.stat", f"anon 1\ninactive_file {2 * GIB}\n")
    put(tmp_path, group + "a/b/cpu.max", "max 100000\n")
    put(tmp_path, group + "a/b/memory.max", f"{16 * GIB}\n")
    put(tmp_path, group + "a/b/memory.current", f"{1 * GIB}\n")
    assert read_limits(tmp_path) == CgroupLimits(
        cores=1.5, memory_bytes=8 * GIB, memory_left_bytes=5 * GIB
    )


def test_version_1_and_an_empty_version_2_beside_it(tmp_path: Path) -> None:
    groups = "5:memory:/job/7\n4:cpu,cpuacct:/job/7\n0::/\n"
    put(tmp_path, "proc/self/cgroup", groups)
    mounts = (
        "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "34 31 0:31 / /sys/fs/cgroup/memory rw shared:7 - cgroup cgroup rw,memory\n"
        "35 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    put(tmp_path, "proc/self/mountinfo", mounts)
    memory = "sys/fs/cgroup/memory/"
    put(tmp_path, memory + "memory.limit_in_bytes", "9223372036854771712\n")
    put(tmp_path, memory + "job/7/memory.limit_in_bytes", f"{4 * GIB}\n")
    put(tmp_path, memory + "job/7/memory.usage_in_bytes", f"{1 * GIB}\n")
    cpu = "sys/fs/cgroup/cpu,cpuacct/"
    put(tmp_path, cpu + "cpu.cfs_quota_us", "-1\n")
    put(tmp_path, cpu + "job/7/cpu.cfs_quota_us", "50000\n")
    put(tmp_path, cpu + "job/7/cpu.cfs_period_us", "100000\n")
    assert read_limits(tmp_path) == CgroupLimits(
        cores=0.5, memory_bytes=4 * GIB, memory_left_bytes=3 * GIB
    )


@pytest.mark.parametrize("group", ["/docker/abc", "/docker/abc/inner", "/../other", "/docker/abcd"])
def test_a_container_sees_its_own_part_of_the_tree(tmp_path: Path, group: str) -> None:
    put(tmp_path, "proc/self/cgroup", f"3:memory:{group}\n")
    mount = "40 31 0:31 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    put(tmp_path, "proc/self/mountinfo", mount)
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    assert read_limits(tmp_path).memory_bytes == 2 * GIB


def test_limits_bound_the_host_and_are_told(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "proc/self/mountinfo", V2)
    put(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000\n")
    put(tmp_path, "sys/fs/cgroup/memory.max", f"{GIB // 4}\n")
    put(tmp_path, "sys/fs/cgroup/memory.current", f"{GIB // 8}\n")
    put(tmp_path, "proc/cpuinfo", "model name : x\nflags : avx2\n")
    host, notes = read_host(tmp_path, root=tmp_path)
    assert host.cores == 1
    assert host.ram_bytes == GIB // 4
    assert host.available_bytes == GIB // 8
    assert any("0.5 of" in note for note in notes)
    assert any("256 MiB of" in note for note in notes)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 2**40), st.integers(0, 2**41))
def test_left_memory_is_never_negative_nor_over_the_limit(
    tmp_path_factory: pytest.TempPathFactory, depth: int, limit: int, used: int
) -> None:
    root = tmp_path_factory.mktemp("group")
    path = "/".join("g" * depth) + "/"
    put(root, "proc/self/cgroup", f"0::/{path.rstrip('/')}\n")
    put(root, "proc/self/mountinfo", V2)
    put(root, f"sys/fs/cgroup/{path}memory.max", str(limit))
    put(root, f"sys/fs/cgroup/{path}memory.current", str(used))
    found = read_limits(root)
    assert found.memory_bytes == limit
    assert found.memory_left_bytes is not None
    assert 0 <= found.memory_left_bytes <= limit


@pytest.mark.usefixtures("no_gpus")
def test_a_cpu_cluster(tmp_path: Path) -> None:
    cluster = probe(folder=tmp_path)
    host = cluster.host
    assert host is not None
    assert cluster.kind == "cpu"
    assert cluster.accelerator.name == "cpu"
    assert cluster.accelerator.flops == {}
    assert cluster.ranks == min(2, host.cores)
    assert cluster.usable_bytes * cluster.ranks <= host.available_bytes
    assert cluster.intra.kind == "shm"
    assert (cluster.price_usd_per_h, cluster.price_source, cluster.inter) == (None, None, None)
    assert "no GPUs: a test" in cluster.notes
    again = parse(Cluster, plain(cluster), path="cluster.json")
    assert again == cluster


@pytest.mark.usefixtures("no_gpus")
def test_one_rank_takes_all_the_memory_and_the_price_is_kept(tmp_path: Path) -> None:
    cluster = probe(ranks=1, folder=tmp_path, price_usd_per_h=0.1)
    assert cluster.host is not None
    assert cluster.usable_bytes == cluster.host.available_bytes
    assert cluster.price_usd_per_h == 0.1
    assert cluster.price_source


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize("ranks", [0, -1, 10**6])
def test_impossible_ranks_are_refused(ranks: int) -> None:
    with pytest.raises(UsageError, match=str(ranks)):
        probe(ranks=ranks)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_impossible_prices_are_refused(price: float) -> None:
    with pytest.raises(UsageError, match="price"):
        probe(price_usd_per_h=price)


def test_probing_imports_no_torch() -> None:
    code = (
        "import sys; from outlay.planner.probe import probe; probe()\n"
        "print([m for m in ('torch', 'pandas', 'deepspeed', 'cpuinfo') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
    )
    allowed = "[]" if Path("/proc/cpuinfo").exists() else "['cpuinfo']"
    assert done.stdout.strip() == allowed, done.stderr

"""`outlay probe --measure` on CPU: real processes, short times; and ranks that die or hang."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from outlay.planner.spec.cluster import Rates
from outlay.planner.spec.files import parse, plain
from outlay.profiles.errors import MissingExtra, OutlayError, UsageError
from outlay.runner import measure_rates as module
from outlay.runner.measure_rates import measure_rates


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work for each figure; the figures stay real."""
    monkeypatch.setattr(module, "GEMM_SIZES", {"cpu": (64, 128), "cuda": (64, 128)})
    monkeypatch.setattr(module, "MESSAGES_BYTES", (4096, 2**20))
    monkeypatch.setattr(module, "RAM_SHARE", 1000)


@pytest.mark.processes
@pytest.mark.usefixtures("small")
def test_two_ranks_together() -> None:
    rates = measure_rates(2, threads_per_rank=1, seconds_each=0.05, device="cpu")
    assert (rates.ranks, rates.threads_per_rank) == (2, 1)
    assert set(rates.gemm_flops) == {"fp32", "bf16"}
    for precision, rate in rates.gemm_flops.items():
        by_size = {n: flops for name, n, flops in rates.gemm_by_size if name == precision}
        assert list(by_size) == [64, 128]
        assert rate == by_size[128]
        assert 1e7 < rate < 1e13
    assert 1e8 < rates.memory_bytes_per_s < 1e13
    assert tuple(size for size, _ in rates.all_reduce) == (4096, 2**20)
    assert all(0 < seconds < 10 for _, seconds in rates.all_reduce)
    assert "gloo" in rates.source
    assert "torch" in rates.source
    assert (rates.pinned_copy_bytes_per_s, rates.pageable_copy_bytes_per_s) == (None, None)
    assert parse(Rates, plain(rates), path="rates.json") == rates


@pytest.mark.processes
@pytest.mark.usefixtures("small")
def test_one_rank_has_nobody_to_reduce_with() -> None:
    rates = measure_rates(1, threads_per_rank=1, precisions=("fp32",), seconds_each=0.01)
    assert rates.all_reduce == ()
    assert set(rates.gemm_flops) == {"fp32"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ranks": 0}, "0 ranks"),
        ({"ranks": 1, "threads_per_rank": 0}, "0 threads"),
        ({"ranks": 1, "seconds_each": 0.0}, "seconds"),
        ({"ranks": 1, "seconds_each": float("nan")}, "seconds"),
        ({"ranks": 1, "precisions": ("int3",)}, "int3"),
        ({"ranks": 1, "precisions": ()}, "no precision"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measure_rates(**arguments)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"outlay\[run\]"):
        measure_rates(1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.processes
def test_a_rank_that_dies_ends_the_others_and_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "rank = int(os.environ['LOCAL_RANK'])\n"
        "if rank == 1: print('line one'); sys.exit('the last words')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(module, "_command", lambda rank, task: [sys.executable, "-c", code])
    start = time.monotonic()
    with pytest.raises(OutlayError, match="rank 1 of the measurement ended with code 1") as caught:
        measure_rates(2)
    assert time.monotonic() - start < 30
    assert "the last words" in caught.value.why
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.processes
def test_a_killed_rank_says_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(module, "_command", lambda rank, task: [sys.executable, "-c", code])
    with pytest.raises(OutlayError, match="signal 9") as caught:
        measure_rates(1)
    assert "memory" in caught.value.do


@pytest.mark.processes
def test_a_rank_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; time.sleep(60)"
    monkeypatch.setattr(module, "_command", lambda rank, task: [sys.executable, "-c", code])
    monkeypatch.setattr(module, "LIMIT_S", 0.5)
    with pytest.raises(OutlayError, match="rank 0 did not end"):
        measure_rates(1, seconds_each=0.001)


@pytest.mark.processes
def test_what_a_device_cannot_do_is_told() -> None:
    with pytest.raises(OutlayError) as caught:
        measure_rates(1, precisions=("tf32",), device="cpu")
    assert "tf32 is a mode of NVIDIA GPUs" in caught.value.why


def test_the_slowest_rank_is_reported() -> None:
    host = module.probe_host()

    def rank(factor: float) -> dict[str, Any]:
        return {
            "torch": "2",
            "backend": "nccl",
            "device_name": "Card",
            "gemm": [["bf16", 1024, 4e12 * factor], ["bf16", 2048, 5e12 * factor]],
            "memory": 1e12 * factor,
            "all_reduce": [[4096, 1e-5 / factor]],
            "copies": {"pinned": 5e10 * factor, "pageable": 1e10 * factor},
        }

    rates = module._combine([rank(1.0), rank(0.5)], 2, 1, host)
    assert rates.gemm_flops == {"bf16": 2.5e12}
    assert rates.gemm_by_size == (("bf16", 1024, 2e12), ("bf16", 2048, 2.5e12))
    assert rates.memory_bytes_per_s == 5e11
    assert rates.all_reduce == ((4096, 2e-5),)
    assert (rates.pinned_copy_bytes_per_s, rates.pageable_copy_bytes_per_s) == (2.5e10, 5e9)
    assert "Card" in rates.source

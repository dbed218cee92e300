"""Under a memory cgroup that plain loading exceeds, ZeRO-3 with offload to NVMe trains as planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import big_on_small as bench
from outlay.profiles.errors import UsageError

WORST = 0.15


@pytest.mark.long
@pytest.mark.processes
def test_a_model_larger_than_its_memory_trains(tmp_path: Path) -> None:
    if not Path("/usr/include/libaio.h").exists():
        pytest.skip("libaio.h is missing: install libaio-dev (.ci/packages does)")
    try:
        with bench.memory_cgroup(1 << 30):
            pass
    except UsageError as error:
        pytest.skip(str(error))
    said: list[str] = []
    found = bench.compare(14, tmp_path, said.append)
    assert found["plain_died"], said
    assert found["growth"] is not None, said
    assert abs(found["expected"] / max(found["growth"]) - 1) <= WORST, said

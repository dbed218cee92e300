"""Fixtures that several test folders share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from outlay.planner.spec.cluster import Cluster, Link, Rates
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.loader import Accelerator

# The same examples every time, so that a red test is this change's doing; HYPOTHESIS_PROFILE=search
# looks for new ones (make test-long). No example has a deadline: how long it takes is the machine's doing.
settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

# A test's figures must not depend on what its user ran before; tests of own measurements set their own.
os.environ["OUTLAY_MEASUREMENTS"] = "off"
os.environ["OUTLAY_EFFICIENCY"] = "off"
os.environ["OUTLAY_LEDGER"] = "off"
os.environ["OUTLAY_CATALOG"] = "off"

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    """A pool of two living ranks, one thread each; they start at the first call."""
    from outlay.runner.pool import RankPool

    pool = RankPool(2, threads_per_rank=1)
    yield pool
    pool.close()


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A small Llama's config.json."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def tiny_spec() -> ModelSpec:
    from outlay.planner.spec.families import spec_from_config

    return spec_from_config(TINY, name="tiny", source="test")


@pytest.fixture
def cpu_cluster() -> Cluster:
    """Two CPU ranks with round rates; nothing is read from this machine."""
    return Cluster(
        accelerator=Accelerator(name="cpu", title="CPU", vendor="any", kind="cpu"),
        nodes=1,
        ranks_per_node=2,
        usable_bytes=8 * 2**30,
        intra=Link(kind="shm", bytes_per_s=1e9, latency_s=1e-4, source="test"),
        inter=None,
        source="test",
        rates=Rates(
            ranks=2,
            threads_per_rank=1,
            gemm_flops={"fp32": 100e9, "bf16": 80e9},
            memory_bytes_per_s=10e9,
            all_reduce=((4096, 1e-4), (2**20, 1e-3), (2**26, 6e-2)),
            measured_at="2026-01-01T00:00:00+00:00",
            source="test",
        ),
        price_usd_per_h=0.1,
        price_source="test",
    )


@pytest.fixture
def tiny_job() -> Job:
    return Job(model="tiny", seq_len=64, global_batch=8, steps=10, precision="fp32")

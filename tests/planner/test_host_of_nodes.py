"""A rented node's memory and drives, as its provider states them, bound what goes there."""

from __future__ import annotations

import dataclasses

import pytest

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.hardware import resolve_hardware
from outlay.planner.search import search
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.offers import instance

SEVENTY, _ = resolve_model("llama-3-70b")
JOB = Job(model="x", seq_len=2048, global_batch=64, steps=10, precision="bf16")
OFFLOADED = Strategy(
    zero=3, dp=8, micro_batch=1, grad_accum=8, activation_checkpointing="full",
    offload_optimizer="cpu", offload_param="cpu",
)  # fmt: skip


def test_a_catalog_node_has_its_memory() -> None:
    node = instance("aws", "p4d.24xlarge")
    cluster = resolve_hardware("aws/p4d.24xlarge:1")
    assert cluster.ram_bytes == node.ram_bytes
    assert cluster.node_nvme_bytes == node.nvme_bytes


def test_what_needs_more_cannot_run_there() -> None:
    cluster = resolve_hardware("aws/p4d.24xlarge:1")
    found = evaluate(SEVENTY, JOB, cluster, Candidates.of([OFFLOADED]))
    e = estimate_dict(SEVENTY, JOB, cluster, found, 0)
    assert e["memory"]["host_bytes"] > cluster.ram_bytes  # type: ignore[operator]
    assert (e["verdict"], e["oom_probability"]) == ("no", 1.0)
    assert any("it cannot run there" in str(row["source"]) for row in e["assumptions"])
    with pytest.raises(NotFeasible, match="host memory of the nodes"):
        search(SEVENTY, JOB, cluster, {"zero": 3})


def test_enough_memory_is_enough() -> None:
    small = resolve_hardware("aws/p4d.24xlarge:1")
    large = dataclasses.replace(small, node_ram_bytes=4 * (small.node_ram_bytes or 0))
    found = evaluate(SEVENTY, JOB, large, Candidates.of([OFFLOADED]))
    assert found.risk[0] < 0.05


def test_counts_have_an_end() -> None:
    with pytest.raises(UsageError, match="more than the largest"):
        dataclasses.replace(JOB, seq_len=10**20)

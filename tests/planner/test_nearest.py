"""The measured runs shown beside an estimate, and how distance widens an interval."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.compute import forward_flops_per_token, recomputed_flops_per_token
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.interval import widened
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.hardware import resolve_hardware
from outlay.planner.nearest import COLUMNS, SHOWN, job_distance, nearest, table
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Job
from outlay.planner.spec.strategy import Strategy

LLAMA = resolve_model("llama-3-8b")[0]


def job(**changes: Any) -> Job:
    base: dict[str, Any] = {"model": "m", "seq_len": 8192, "global_batch": 64, "steps": 1}
    return Job(**({"precision": "bf16"} | base | changes))


def cluster(name: str = "a100-sxm-80gb", gpus: int = 64) -> Cluster:
    return resolve_hardware(f"{name}:{gpus}/8", inter_node_gbps=1600)


def test_every_row_of_the_table_has_a_source_and_positive_seconds() -> None:
    rows = table().rows
    assert len(rows) > 1000
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert all(row[name] for name in COLUMNS)
        assert float(row["measured_s"]) > 0
        assert float(row["predicted_s"]) > 0


def test_a_run_that_was_measured_is_its_own_nearest() -> None:
    found = nearest(LLAMA, job(), cluster(), Strategy(zero=3, dp=64, activation_checkpointing="selective"),
                    software="fsdp")  # fmt: skip
    assert len(found) == SHOWN
    assert found[0]["source"] == "pytorch/torchtitan"
    assert "llama3-8b, 64 x a100-sxm-80gb" in found[0]["what"]
    assert len({row["what"] for row in found}) == SHOWN


def test_an_estimate_shows_them() -> None:
    strategy = Strategy(zero=2, dp=64)
    e = evaluate(LLAMA, job(), cluster(), Candidates.of([strategy]))
    shown = estimate_dict(LLAMA, job(), cluster(), e, 0)["nearest"]
    assert [set(row) for row in shown] == [
        {"id", "source", "what", "measured", "predicted"}
    ] * SHOWN


def test_distance_grows_away_from_what_was_measured_and_widens_the_interval() -> None:
    near = job_distance(LLAMA, job(), cluster(), software="fsdp")
    far = job_distance(LLAMA, job(precision="fp32"), cluster("tpu-v5p", 64), software="deepspeed")
    assert 0 <= near < 1 < far
    assert widened(0.4, 1.0, 4.0) == 0.4
    assert widened(0.4, 8.0, 4.0) == pytest.approx(0.8)


def test_recomputation_counts_what_is_computed_twice() -> None:
    seq_len = 8192

    def again(word: str, layers: int | None = None) -> float:
        return recomputed_flops_per_token(LLAMA, seq_len, word, layers)

    head = forward_flops_per_token(LLAMA, seq_len) - again("full")
    assert head == pytest.approx(2 * LLAMA.hidden * LLAMA.vocab)
    assert again("none") == 0 < again("selective") < again("full")
    assert again("full", 8) == pytest.approx(again("full") * 8 / LLAMA.layers)


@pytest.mark.parametrize("changes", [{"cp": 2, "dp": 32}, {"sp": 2, "dp": 32}, {"tp": 8, "dp": 8}])
def test_throughput_divides_by_all_ranks(changes: dict[str, int]) -> None:
    strategy = dataclasses.replace(Strategy(zero=1), **changes)
    e = evaluate(LLAMA, job(), cluster(), Candidates.of([strategy]))
    found = estimate_dict(LLAMA, job(), cluster(), e, 0)["throughput"]
    assert found["tokens_per_s"] == pytest.approx(64 * found["tokens_per_s_per_gpu"])

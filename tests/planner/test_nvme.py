"""Offload to NVMe: the sizes that DeepSpeed is given are those that the estimate counts, and small."""

from __future__ import annotations

import pytest

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate_memory
from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.rules import Context, broken
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Job
from outlay.planner.spec.strategy import Strategy

CONFIG = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 16,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
SPEC = spec_from_config(CONFIG, name="large", source="test")
JOB = Job(model="large", seq_len=32, global_batch=4, steps=3, precision="fp32")


def _strategy(where: str, dp: int = 4) -> Strategy:
    return Strategy(zero=3, dp=dp, offload_optimizer=where, offload_param=where)  # type: ignore[arg-type]


@pytest.mark.parametrize("dp", [2, 3, 4])
def test_each_buffer_holds_what_it_must(cpu_cluster: Cluster, dp: int) -> None:
    zero = deepspeed_config(JOB, _strategy("nvme", dp), SPEC, cpu_cluster)["zero_optimization"]
    share = parameter_counts(SPEC).total / dp
    assert zero["offload_param"]["max_in_cpu"] == 0
    assert zero["offload_param"]["buffer_size"] * dp >= largest_matrix(SPEC)
    assert zero["offload_param"]["buffer_size"] < share / 10
    assert zero["sub_group_size"] * dp >= zero["reduce_bucket_size"] >= largest_matrix(SPEC)
    assert zero["sub_group_size"] < share / 10
    assert zero["stage3_max_live_parameters"] == zero["reduce_bucket_size"]


def test_cpu_ranks_keep_less_than_the_host_or_the_weights_would_take(cpu_cluster: Cluster) -> None:
    grid = Candidates.of([_strategy("nvme"), _strategy("cpu"), _strategy("none")])
    # In a step: the export at the end puts all weights together on the first rank.
    found = evaluate_memory(SPEC, JOB, cpu_cluster, grid, step_only=True).memory
    nvme, host, none = found.in_kind("host_growth")
    # weights, gradients and states are 16 bytes a parameter in all
    assert nvme < 0.5 * host and nvme < 0.5 * none
    assert nvme < 5 * parameter_counts(SPEC).total < none


@pytest.mark.parametrize(
    ("strategy", "rule"),
    [
        (Strategy(zero=2, dp=4, offload_optimizer="nvme"), "nvme_needs_stage_3"),
        (
            Strategy(zero=3, dp=4, offload_optimizer="cpu", offload_param="nvme"),
            "runner_does_not_yet",
        ),
        (_strategy("nvme"), None),
    ],
)
def test_only_stage_3_swaps(cpu_cluster: Cluster, strategy: Strategy, rule: str | None) -> None:
    four = Cluster(**{**vars(cpu_cluster), "ranks_per_node": 4})
    names = [r.name for r, _ in broken(strategy, Context(spec=SPEC, job=JOB, cluster=four))]
    assert names == ([] if rule is None else [rule])

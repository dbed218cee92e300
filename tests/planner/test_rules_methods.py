"""Optimizers, losses and adapters that `outlay run` does not execute are forbidden, with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from outlay.planner.rules import RULES, Context, broken
from outlay.planner.rules.runner_methods import METHOD_RULES
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Finetune, Job, Optimizer
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

TWO = {"dp": 2, "micro_batch": 2, "grad_accum": 2}
STAGES = {"pp": 2, "micro_batch": 2, "grad_accum": 4}
SLICES = {"tp": 2, "micro_batch": 2, "grad_accum": 4}
LORA = {"finetune": Finetune(rank=4)}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("runner_builds_its_optimizers", TWO, {"optimizer": Optimizer(name="lamb")}, "does not train with lamb"),
    ("adafactor_needs_whole_matrices", {**TWO, "zero": 1}, {"optimizer": Optimizer(name="adafactor")}, "use --zero 0"),
    ("muon_is_not_clipped", {**TWO, "zero": 1}, {"optimizer": Optimizer(name="muon")}, "--gradient-clipping 0"),
    ("muon_steps_whole_matrices", STAGES, {"optimizer": Optimizer(name="muon")}, "at tp 1, pp 2"),
    ("loss_of_whole_sequences", {**SLICES, "loss": "chunked"}, {}, "the chunked loss with tp 2"),
    ("runner_adapts_with_lora", TWO, {"finetune": Finetune(method="adapter")}, "does not train adapter of llama"),
    ("runner_adapts_with_lora", TWO, {"finetune": Finetune(quant="int8")}, "lora over int8 weights"),
    ("dora_reads_whole_weights", {**TWO, "zero": 3}, {"finetune": Finetune(method="dora")}, "use --zero 2"),
    ("adapters_with_data_parallel", STAGES, LORA, "data parallel alone, not at tp 1, pp 2"),
    ("compiles_whole_blocks", {**TWO, "zero": 3}, {"compile": True}, "does not compile at ZeRO-3"),
    ("compiles_whole_blocks", TWO, {**LORA, "compile": True}, "nor adapters"),
    ("adapters_stay_on_the_device", {**TWO, "zero": 1, "offload_optimizer": "cpu"}, LORA, "without offload"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "strategy", "job", "says"), CASES, ids=[c[0] for c in CASES])
def test_each_rule(
    rule: str, strategy: dict[str, Any], job: dict[str, Any], says: str,
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster,
) -> None:  # fmt: skip
    x = Context(spec=tiny_spec, job=dataclasses.replace(tiny_job, **job), cluster=cpu_cluster)
    found = broken(Strategy(**strategy), x)
    assert [r.name for r, _ in found] == [rule]
    assert says in found[0][1]


def test_capped_scores_have_no_sdpa(tiny_job: Job, cpu_cluster: Cluster) -> None:
    spec = resolve_model("gemma-2-2b")[0]
    x = Context(spec=spec, job=tiny_job, cluster=cpu_cluster)
    assert [r.name for r, _ in broken(Strategy(**TWO), x)] == ["sdpa_has_no_capped_scores"]
    eager = dataclasses.replace(x, job=dataclasses.replace(tiny_job, attention="eager"))
    assert broken(Strategy(**TWO), eager) == []


def test_the_runner_asks_all_of_them() -> None:
    asked = {case[0] for case in CASES} | {"sdpa_has_no_capped_scores", "qlora_without_zero_init"}
    assert asked == set(METHOD_RULES) <= {rule.name for rule in RULES}

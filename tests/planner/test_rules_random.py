"""200 random plans with a fault each: refused before anything is written, and the rule is named."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY

from outlay.planner.emit.writable import writable_spec
from outlay.planner.hardware import resolve_hardware
from outlay.planner.rules import RULES, Context, broken
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Job
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError

PLANS = 200
GROUPED = {**TINY, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}
EXPERTS = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
LEARNED = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128,
}  # fmt: skip

Changes = dict[str, Any]
FAULTS: dict[str, Callable[[random.Random], Changes]] = {
    "world_is_ranks": lambda r: {"more_ranks": r.randint(1, 9)},
    "batch_closes": lambda r: {"more_batch": r.randint(1, 9)},
    "zero_stage_exists": lambda r: {"zero": r.randint(4, 9)},
    "stages_have_blocks": lambda r: {"pp": r.randint(5, 12), "zero": r.randint(0, 1)},
    "pipeline_without_zero_2": lambda r: {"pp": r.choice([2, 4]), "zero": r.randint(2, 3)},
    "pipeline_without_ulysses": lambda r: {"pp": 2, "sp": 2, "zero": r.randint(0, 1)},
    "tensor_parallel_divides_heads": lambda r: {"tp": r.choice([3, 4, 5, 6, 8])},
    "sequence_parallel_divides": lambda r: {"sp": r.choice([3, 5, 6, 8])},
    "sequence_parallel_divides_kv_heads": lambda r: {"sp": r.choice([3, 6]), "config": GROUPED, "seq_len": 96},
    "expert_parallel_divides": lambda r: {"ep": r.choice([2, 3, 4])},
    "expert_parallel_at_stage_3_alone": lambda r: {"ep": 2, "sp": 2, "dp": 4, "zero": 3, "config": EXPERTS},
    "precision_runs_on_cpu": lambda r: {"precision": r.choice(["fp16", "tf32"]), "accelerator": "cpu"},
    "deepspeed_runs_there": lambda r: {"accelerator": "tpu"},
    "offload_param_needs_stage_3": lambda r: {"zero": r.randint(0, 2), "offload_param": "cpu"},
    "offload_needs_zero": lambda r: {"zero": 0, "offload_optimizer": r.choice(["cpu", "nvme"])},
    "nvme_needs_stage_3": lambda r: {"zero": r.randint(1, 2), "offload_optimizer": "nvme"},
    "sequence_fits_positions": lambda r: {"config": LEARNED, "seq_len": r.randint(129, 999)},
    "recomputed_layers_exist": lambda r: {
        "activation_checkpointing": "full", "recompute_layers": r.randint(5, 99),
    },
    "not_run_by_deepspeed": lambda r: r.choice([{"vpp": 2, "pp": 2, "zero": 1}, {"cp": 2}]),
}  # fmt: skip
"""What of a random legal strategy, job and cluster is changed to break the rule of that name."""


def drawn(r: random.Random, changes: Changes) -> Plan:
    """A random strategy that closes, with the changes."""
    changes = dict(changes)
    config = changes.pop("config", TINY)
    more_ranks, more_batch = changes.pop("more_ranks", 0), changes.pop("more_batch", 0)
    accelerator = changes.pop("accelerator", None)
    what = {k: changes.pop(k) for k in ("seq_len", "precision") if k in changes}
    base = {
        "zero": r.randint(0, 3), "dp": r.choice([2, 4]), "micro_batch": r.randint(1, 8),
        "grad_accum": r.randint(1, 8), "overlap_comm": r.random() < 0.5,
        "activation_checkpointing": r.choice(["none", "full"]),
    }  # fmt: skip
    strategy = Strategy(**{**base, **changes})
    batch = strategy.global_batch + more_batch
    job = Job(
        **{
            "model": "tiny",
            "seq_len": 64,
            "global_batch": batch,
            "steps": 10,
            "precision": "bf16",
            **what,
        }
    )
    cluster = resolve_hardware("a100-sxm-80gb:8")
    if accelerator is not None:
        other = dataclasses.replace(
            cluster.accelerator, name=accelerator, kind=accelerator, deepspeed=accelerator == "cpu"
        )
        cluster = dataclasses.replace(cluster, accelerator=other)
    cluster = dataclasses.replace(cluster, nodes=1, ranks_per_node=strategy.world + more_ranks)
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="test", job=job, cluster=cluster, strategy=strategy,
        model=ModelSource(name="tiny", source="test", parameters=0, config=config),
        estimate={}, deepspeed={}, considered=1, feasible=1,
    )  # fmt: skip


def names(plan: Plan) -> set[str]:
    spec = spec_from_config(plan.model.config, name="tiny", source="test")
    x = Context(spec=spec, job=plan.job, cluster=plan.cluster)
    return {rule.name for rule, _ in broken(plan.strategy, x, kinds=("arithmetic", "deepspeed"))}


def test_random_illegal_plans_are_refused_by_rule() -> None:
    r = random.Random(6)
    for i in range(PLANS):
        name = list(FAULTS)[i % len(FAULTS)]
        plan = drawn(r, FAULTS[name](r))
        assert name in names(plan), (name, plan.strategy)
        with pytest.raises(UsageError) as refused:
            writable_spec(plan, "plan.yaml", "/nvme")
        assert refused.value.why.partition(":")[0] in names(plan)


def test_without_the_fault_they_are_written() -> None:
    r = random.Random(6)
    for _ in range(PLANS // 4):
        plan = drawn(r, {})
        assert names(plan) == set()
        writable_spec(plan, "plan.yaml", None)


def test_every_rule_of_arithmetic_and_deepspeed_is_drawn() -> None:
    assert {rule.name for rule in RULES if rule.kind in ("arithmetic", "deepspeed")} == set(FAULTS)


def test_what_deepspeed_does_with_it_is_said() -> None:
    quiet = {rule.name: rule.effect for rule in RULES if rule.effect != "illegal"}
    assert quiet == {
        "offload_param_needs_stage_3": "ignored",
        "offload_needs_zero": "changed",
        "tensor_parallel_divides_heads": "changed",
        "nvme_needs_stage_3": "changed",
    }

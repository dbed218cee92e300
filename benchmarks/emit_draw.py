"""Random plans that no rule forbids, with the DeepSpeed JSON that `outlay emit` writes for each."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.hardware import resolve_hardware
from outlay.planner.rules import Context, broken
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Finetune, Job, Optimizer, Schedule
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy

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
JOB = Job(model="tiny", seq_len=64, global_batch=16, steps=100, precision="fp32")


def drawn(r: random.Random, job: Job) -> tuple[Strategy, Job]:
    """One strategy of those that DeepSpeed's JSON can say, legal or not, with the job that fits it."""
    strategy = Strategy(
        zero=r.randint(0, 3),
        dp=r.choice([1, 2, 3, 4, 8]),
        tp=r.choice([1, 1, 2]),
        pp=r.choice([1, 1, 2]),
        sp=r.choice([1, 1, 2]),
        micro_batch=r.randint(1, 8),
        grad_accum=r.randint(1, 8),
        activation_checkpointing=r.choice(["none", "full"]),
        offload_optimizer=r.choice(["none", "cpu", "nvme"]),
        offload_param=r.choice(["none", "cpu", "nvme"]),
        overlap_comm=r.random() < 0.5,
        reduce_bucket_size=r.choice([None, 1_000_000]),
    )
    return strategy, dataclasses.replace(
        job,
        global_batch=strategy.global_batch,
        precision=r.choice(["fp32", "bf16", "fp16"]),
        optimizer=Optimizer(name=r.choice(["adamw", "adam", "sgd"])),
        gradient_clipping=r.choice([0.0, 1.0]),
    )


def drawn_configs(count: int, seed: int = 0) -> list[tuple[Strategy, dict[str, Any]]]:
    """As many legal ones as asked for, each with its JSON."""
    r = random.Random(seed)
    spec = spec_from_config(TINY, name="tiny", source="drawn")
    clusters = {n: resolve_hardware(f"a100-sxm-80gb:{n}") for n in (1, 2, 4, 8)}
    found: list[tuple[Strategy, dict[str, Any]]] = []
    while len(found) < count:
        strategy, job = drawn(r, JOB)
        if strategy.world not in clusters:
            continue
        cluster = clusters[strategy.world]
        context = Context(spec=spec, job=job, cluster=cluster)
        if not broken(strategy, context, kinds=("arithmetic", "deepspeed")):
            config = deepspeed_config(job, strategy, spec, cluster, nvme_path="/nvme")
            found.append((strategy, config))
    return found


HARDWARE = (
    "h100-sxm:8", "h100-sxm:16/8", "a100-sxm-80gb:4", "a100-sxm-80gb:32/8", "rtx-4090:2", "l40s:4/2",
    "aws/p5.48xlarge:2", "aws/p4d.24xlarge:1",
)  # fmt: skip


def drawn_plan(r: random.Random, *, adapters: bool = False) -> Plan | None:
    """A plan that a trainer on transformers can be told, whether it fits or not; null = a rule forbids."""
    cluster = resolve_hardware(r.choice(HARDWARE), inter_node_gbps=100)
    strategy = Strategy(
        zero=r.randint(0, 3),
        dp=cluster.ranks,
        micro_batch=r.randint(1, 8),
        grad_accum=r.randint(1, 8),
        activation_checkpointing=r.choice(["none", "full"]),
        offload_optimizer=r.choice(["none", "none", "cpu", "nvme"]),
        offload_param=r.choice(["none", "none", "cpu", "nvme"]),
        overlap_comm=r.random() < 0.5,
        reduce_bucket_size=r.choice([None, 1_000_000]),
        allgather_bucket_size=r.choice([None, 2_000_000]),
    )
    tune = Finetune(rank=r.choice([8, 16]), quant=r.choice(["none", "nf4", "nf4-dq", "int8"]))
    schedule = Schedule(
        name=r.choice(["constant", "linear", "cosine", "wsd"]),
        warmup_steps=r.choice([0, 10]),
        final_fraction=r.choice([0.0, 0.1, 1.0]),
    )
    job = dataclasses.replace(
        JOB,
        global_batch=strategy.global_batch,
        precision=r.choice(["fp32", "tf32", "bf16", "bf16", "fp16"]),
        optimizer=Optimizer(name=r.choice(["adamw", "adam"])),
        schedule=schedule,
        gradient_clipping=r.choice([0.0, 1.0]),
        attention=r.choice(["eager", "sdpa", "flash"]),
        packing=r.random() < 0.7,
        save_every=r.choice([None, 50]),
        finetune=tune if adapters and r.random() < 0.4 else None,
    )
    spec = spec_from_config(TINY, name="tiny", source="drawn")
    context = Context(spec=spec, job=job, cluster=cluster)
    if broken(strategy, context, kinds=("arithmetic", "deepspeed")):
        return None
    return Plan(
        created="drawn", outlay_version="drawn", job=job, cluster=cluster, strategy=strategy,
        model=ModelSource(name="tiny", source="drawn", parameters=1, config=TINY), estimate={},
        deepspeed={}, considered=1, feasible=1,
    )  # fmt: skip

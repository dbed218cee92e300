"""DeepSpeed's own parser reads what `outlay emit deepspeed` writes, at the plan's world size."""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

import pytest

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.hardware import resolve_hardware
from outlay.planner.rules import Context, broken
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

PLANS = 500


class _DataParallel:
    """What DeepSpeed asks a topology for."""

    def __init__(self, dp: int) -> None:
        self.dp = dp

    def get_data_parallel_world_size(self) -> int:
        return self.dp


def _drawn(r: random.Random, job: Job) -> tuple[Strategy, Job]:
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


def _configs(spec: ModelSpec, job: Job) -> list[tuple[Strategy, dict[str, Any]]]:
    r = random.Random(0)
    clusters = {n: resolve_hardware(f"a100-sxm-80gb:{n}") for n in (1, 2, 4, 8)}
    found: list[tuple[Strategy, dict[str, Any]]] = []
    while len(found) < PLANS:
        strategy, drawn = _drawn(r, job)
        if strategy.world not in clusters:
            continue
        cluster = clusters[strategy.world]
        context = Context(spec=spec, job=drawn, cluster=cluster)
        if not broken(strategy, context, kinds=("arithmetic", "deepspeed")):
            config = deepspeed_config(drawn, strategy, spec, cluster, nvme_path="/nvme")
            found.append((strategy, config))
    return found


def test_deepspeeds_parser_accepts_every_emitted_json(
    tiny_spec: ModelSpec,
    tiny_job: Job,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config as module
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero import config as zero
    from deepspeed.utils import logger

    # without a process group DeepSpeed would take the world to be one rank
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    # DeepSpeed ignores a top-level key that it does not know without a word: so each must be a name
    # that its own constants have.
    names = {v for v in (vars(constants) | vars(module) | vars(zero)).values() if type(v) is str}
    names |= {"bf16", "fp16", "pipeline", "tensor_parallel", "sequence_parallel_size"}
    logger.addHandler(caplog.handler)
    seen_stages = set()
    try:
        with caplog.at_level(logging.WARNING, logger=logger.name):
            for strategy, config in _configs(tiny_spec, tiny_job):
                assert set(config) <= names, set(config) - names
                parsed: Any = module.DeepSpeedConfig(config, mpu=_DataParallel(strategy.dp))
                assert parsed.train_batch_size == strategy.global_batch
                assert parsed.zero_config.stage == strategy.zero
                assert parsed.gradient_clipping == config["gradient_clipping"]
                for key in ("offload_optimizer", "offload_param"):
                    section = getattr(parsed.zero_config, key)
                    device = "none" if section is None else section.device
                    assert device == getattr(strategy, key)
                    assert device != "nvme" or str(section.nvme_path) == "/nvme"
                seen_stages.add(strategy.zero)
    finally:
        logger.removeHandler(caplog.handler)
    assert seen_stages == {0, 1, 2, 3}
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []

"""Real steps of a strategy: how long they take, and how much memory they grow by.

`steps_in_rank` and `growth_in_rank` run inside the ranks of a pool (`runner/pool.py`);
`time_strategies` interleaves repeats of many plans in the same living ranks, so that a slow minute
of the machine hits all of them alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError
from outlay.runner.pool import RankPool

WARMUP_STEPS = 2
"""First steps allocate buffers and optimizer states; they are not timed."""


@dataclass(frozen=True, kw_only=True)
class TimedStrategy:
    """Seconds a step of one plan: of each repeat the median over its steps, slowest rank."""

    repeats_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        return statistics.median(self.repeats_s)


def _random_batches(plan: Plan, dp_rank: int, step: int) -> list[object]:
    """Uniformly random tokens: speed and memory do not depend on what the tokens are."""
    import torch

    generator = torch.Generator().manual_seed(1_000_003 * step + dp_rank)
    shape = (plan.strategy.micro_batch, plan.job.seq_len)
    vocab = int(plan.model.config["vocab_size"])
    return [
        torch.randint(vocab, shape, generator=generator) for _ in range(plan.strategy.grad_accum)
    ]


def steps_in_rank(plan: Plan, steps: int, warmup: int = WARMUP_STEPS) -> list[float]:
    """Build the engine, take `warmup` steps, then time `steps`; seconds of each."""
    import torch

    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        seconds = []
        for step in range(warmup + steps):
            batches = _random_batches(plan, engine.dp_rank, step)
            torch.distributed.barrier()
            started = time.perf_counter()
            engine.train_step(batches)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds[warmup:]
    finally:
        engine.close()


def time_strategies(
    plans: Sequence[Plan],
    *,
    pool: RankPool,
    steps: int = 20,
    repeats: int = 3,
    progress: Callable[[int, int, float], None] = lambda plan, repeat, seconds: None,
) -> list[TimedStrategy | OutlayError]:
    """Time each plan `repeats` times, interleaved. A plan that fails keeps its error, not a figure."""
    found: list[list[float]] = [[] for _ in plans]
    failed: dict[int, OutlayError] = {}
    for repeat in range(repeats):
        for i, plan in enumerate(plans):
            if i in failed:
                continue
            try:
                ranks = pool.call("outlay.runner.measure:steps_in_rank", plan, steps)
            except OutlayError as error:
                failed[i] = error
                continue
            slowest = [max(step) for step in zip(*ranks, strict=True)]
            found[i].append(statistics.median(slowest))
            progress(i, repeat, found[i][-1])
    return [
        failed[i] if i in failed else TimedStrategy(repeats_s=tuple(times))
        for i, times in enumerate(found)
    ]


def with_strategy(plan: Plan, **changes: object) -> Plan:
    """The same plan with parts of its job or strategy replaced; its DeepSpeed configuration follows."""
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.spec.families import spec_from_config

    job_fields = {f.name for f in dataclasses.fields(plan.job)}
    job = dataclasses.replace(plan.job, **{k: v for k, v in changes.items() if k in job_fields})  # type: ignore[arg-type]
    strategy = dataclasses.replace(
        plan.strategy,
        **{k: v for k, v in changes.items() if k not in job_fields},  # type: ignore[arg-type]
    )
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=plan.model.source)
    return dataclasses.replace(
        plan,
        job=job,
        strategy=strategy,
        deepspeed=deepspeed_config(job, strategy, spec, plan.cluster),
    )

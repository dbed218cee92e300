"""Functions that tests run inside living ranks that share layers or sequences: exports and their logits.

As in ranks.py: `pool.call("ranks_parallel:train_and_export", plan, steps, folder)`.
"""

from __future__ import annotations

from typing import Any

from ranks import micro_batches

from outlay.planner.spec.plan import Plan


def train_and_export(plan: Plan, steps: int, folder: str) -> dict[str, Any]:
    """Train and export on rank 0: the engine's logits put together, and those of a model of one process
    that is given the gathered weights."""
    from pathlib import Path

    import torch

    from outlay.runner.engine import Engine
    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    engine = Engine.build(plan)
    try:
        for step in range(steps):
            engine.train_step(micro_batches(plan, step, engine.dp_rank))
        ids = micro_batches(plan, 900, 0)[0]
        found = {"engine": _logits(engine, ids), "heldout": engine.evaluate([ids]), "plain": None}
        state = engine.gather_state_dict()
    finally:
        engine.close()
    if state is not None:
        export_safetensors(state, plan, Path(folder), None, shard_bytes=100_000)
        model = build_model(plan.model, precision="fp32", attention=plan.job.attention, seed=0)
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            found["plain"] = model(input_ids=ids).logits.numpy()
    return found


def _logits(engine: Any, ids: Any) -> Any:
    """[b, s, v] on every rank, from the slices or pieces of the first group."""
    import torch

    strategy, module = engine.plan.strategy, engine.deepspeed
    module.eval()
    with torch.no_grad():
        if strategy.tp > 1:
            mine, axis = module(input_ids=ids).logits, 2
        else:
            width = ids.shape[1] // strategy.sp
            cut = slice(engine.piece * width, (engine.piece + 1) * width)
            positions = torch.arange(ids.shape[1]).expand_as(ids)[:, cut].contiguous()
            mine = module(input_ids=ids[:, cut].contiguous(), position_ids=positions).logits
            axis = 1
    pieces = [torch.empty_like(mine) for _ in range(engine.world)]
    torch.distributed.all_gather(pieces, mine.contiguous())
    return torch.cat(pieces[: strategy.tp * strategy.sp], dim=axis).numpy()


def other_batches(plan: Plan) -> None:
    """One step in which each rank is given other sequences."""
    import torch

    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        engine.train_step(micro_batches(plan, torch.distributed.get_rank(), engine.dp_rank))
    finally:
        engine.close()


def three_steps(plan: Plan) -> list[float]:
    """Losses of three steps."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        return [engine.train_step(micro_batches(plan, s, engine.dp_rank)) for s in range(3)]
    finally:
        engine.close()


def train_on_grid(plan: Plan, steps: int) -> dict[str, Any]:
    """`ranks.train` by the engine for pipeline and tensor parallel together, whatever the plan's stages."""
    from ranks import train

    from outlay.runner import engine
    from outlay.runner.parallel.grid import TensorPipelineEngine

    chosen, engine._kind_of = engine._kind_of, lambda _: TensorPipelineEngine
    try:
        return train(plan, steps)
    finally:
        engine._kind_of = chosen


def train_and_export_grid(plan: Plan, steps: int, folder: str) -> dict[str, Any]:
    """Train and export on rank 0: the held-out loss, and the logits of the gathered weights in one process."""
    from pathlib import Path

    import torch

    from outlay.runner.engine import Engine
    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    engine = Engine.build(plan)
    try:
        for step in range(steps):
            engine.train_step(micro_batches(plan, step, engine.dp_rank))
        ids = micro_batches(plan, 900, 0)[0]
        found = {"heldout": engine.evaluate([ids]), "plain": None}
        state = engine.gather_state_dict()
    finally:
        engine.close()
    if state is not None:
        export_safetensors(state, plan, Path(folder), None, shard_bytes=100_000)
        model = build_model(plan.model, precision="fp32", attention=plan.job.attention, seed=0)
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            found["plain"] = model(input_ids=ids).logits.numpy()
    return found

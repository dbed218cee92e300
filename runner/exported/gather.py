"""A checkpoint's weights as a dense folder: the plan's ranks load it on this machine and rank 0 writes.

DeepSpeed splits weights by stage and rank in its own ways; loading them as a run would is the one reading that
holds for all of them.
"""

from __future__ import annotations

from pathlib import Path

from outlay.planner.spec.plan import Plan


def write_dense(plan: Plan, checkpoint: Path, tokenizer: Path | None, out: Path) -> None:
    """Start ranks, load, gather, write `out`; the ranks end with it."""
    from outlay.runner.host import default_extensions_dir
    from outlay.runner.launch import rank_environment
    from outlay.runner.pool import RankPool

    environment = rank_environment(plan)
    kind = "cuda" if environment["DS_ACCELERATOR"] == "cuda" else "cpu"
    with RankPool(
        plan.strategy.world,
        int(environment["OMP_NUM_THREADS"]),
        accelerator=kind,  # type: ignore[arg-type]
        extensions_dir=default_extensions_dir(),
    ) as pool:
        pool.call(
            "outlay.runner.exported.gather:in_rank", plan, str(checkpoint),
            None if tokenizer is None else str(tokenizer), str(out),
        )  # fmt: skip


def in_rank(plan: Plan, checkpoint: str, tokenizer: str | None, out: str) -> None:
    """The part of one rank. Collective."""
    from outlay.runner.checkpoint import load_checkpoint
    from outlay.runner.engine import Engine
    from outlay.runner.export import export_safetensors

    engine = Engine.build(plan)
    try:
        load_checkpoint(engine, Path(checkpoint))
        weights = engine.gather_state_dict()
        if weights is not None:
            export_safetensors(
                weights, plan, Path(out), None if tokenizer is None else Path(tokenizer)
            )
    finally:
        engine.close()

"""Functions that tests run inside living ranks: distillation from a live teacher and from cached logits.

As in ranks.py: `pool.call("ranks_distill:train_distilled", plan, steps)`.
"""

from __future__ import annotations

from typing import Any

import ranks as r

from outlay.planner.spec.plan import Plan


def write_teacher(plan: Plan, folder: str) -> None:
    """The plan's model, untrained, as a folder of transformers (rank 0)."""
    from pathlib import Path

    import torch

    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    if torch.distributed.get_rank() == 0:
        model = build_model(plan.model, precision="fp32", attention="sdpa", seed=5)
        export_safetensors(model.state_dict(), plan, Path(folder))
    torch.distributed.barrier()


def train_distilled(plan: Plan, steps: int, cache: str | None = None) -> dict[str, Any]:
    """Losses, weights (rank 0), what the optimizer step saw."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        if cache is not None:
            _open(engine, cache)
        losses = [
            engine.train_step(r.micro_batches(plan, step, engine.dp_rank)) for step in range(steps)
        ]
        state = engine.gather_state_dict()
        return {
            "losses": losses,
            "weights": None if state is None else {k: v.numpy() for k, v in state.items()},
            "heldout": engine.evaluate([r.micro_batches(plan, 900, engine.dp_rank)[0]]),
        }
    finally:
        engine.close()


class _Windows:
    """The batches of ranks.py as a dataset of whole windows."""

    def __init__(self, steps: int) -> None:
        from types import SimpleNamespace

        import torch

        self.rows = torch.cat([r.global_batch(step) for step in range(steps)]).numpy()
        self.windows = len(self.rows)
        self.info = SimpleNamespace(vocab_size=r.VOCAB, train=SimpleNamespace(sha256="test"))

    def sample(self, index: int) -> Any:
        return self.rows[index]


def _open(engine: Any, folder: str) -> None:
    from pathlib import Path

    from outlay.runner.compress.teacher_share import prepare_cache

    windows: Any = _Windows(engine.plan.job.steps)
    prepare_cache(engine, windows, Path(folder), lambda: True)
    first = engine.distiller.cache
    # a second engine finds it on disk: no teacher is opened again
    engine.distiller.cache = None
    prepare_cache(engine, windows, Path(folder), _never)
    assert first is not None and engine.distiller.cache is not None


def _never() -> bool:
    raise AssertionError("computed although it was there")

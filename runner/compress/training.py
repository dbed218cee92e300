"""What compresses a model while it trains: masks, fake quantization, or both, on one engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlay.planner.spec.compress import Compression
from outlay.profiles.errors import UsageError
from outlay.runner.compress import qat
from outlay.runner.compress.pruning import Pruner, in_all
from outlay.runner.compress.schedule import quantizes_at

if TYPE_CHECKING:
    from outlay.planner.spec.plan import Plan
    from outlay.runner.engine import Engine


class Compressor:
    """The job's pruning and quantization, in every rank of one engine."""

    def __init__(self, engine: Engine, compress: Compression) -> None:
        self.engine, self.qat = engine, compress.qat
        self.pruner = None if compress.pruning is None else Pruner(engine, compress.pruning)
        self.quantizes: bool | None = None
        """Whether forward passes see quantized weights; null before the first step."""

    @classmethod
    def of(cls, engine: Engine) -> Compressor | None:
        """Null where the job neither prunes nor quantizes."""
        compress = engine.plan.job.compress
        if compress is None or (compress.pruning is None and compress.qat is None):
            return None
        return cls(engine, compress)

    def before_step(self, step: int, total: int) -> dict[str, Any]:
        """What changes with this step (0 … total-1); empty where nothing does. Collective."""
        changed: dict[str, Any] = {}
        if self.pruner is not None:
            sparsity = self.pruner.before_step(step, total)
            if sparsity is not None:
                changed["sparsity"] = sparsity
        if self.qat is not None:
            on = quantizes_at(self.qat, step, total)
            if on is not self.quantizes:
                qat.switch(self.engine.deepspeed.module, on)
                changed["quantizes"] = self.quantizes = on
        return changed

    def report(self) -> dict[str, Any]:
        """How it stands, counted: zeros by matrix and in all. Collective."""
        if self.pruner is None:
            return {}
        zeros = self.pruner.zeros()
        total = in_all(zeros)
        return {
            "asked": self.pruner.pruning.final_sparsity,
            "wanted": self.pruner.wanted_zeros(),
            "sparsity": total.sparsity,
            "zeros": total.zeros,
            "weights": total.weights,
            "matrices": {z.name: {"zeros": z.zeros, "weights": z.weights} for z in zeros},
        }

    def save(self, folder: Path) -> None:
        """Into a checkpoint. Collective."""
        if self.pruner is not None:
            self.pruner.save(folder)

    def load(self, folder: Path) -> None:
        """From a checkpoint. Collective."""
        if self.pruner is not None:
            self.pruner.load(folder)

    def close(self) -> None:
        """Let go of the engine's tensors."""
        if self.pruner is not None:
            self.pruner.close()


def prepare(model: Any, plan: Plan) -> None:
    """What must be in the model before DeepSpeed sees it; it may be a skeleton yet."""
    compress = plan.job.compress
    if compress is None or compress.qat is None:
        return
    if plan.strategy.tp > 1:
        raise UsageError(
            f"quantization-aware training is not run over tensor-parallel slices (tp={plan.strategy.tp})",
            where="compress.qat",
            why="DeepSpeed's sliced layers take the place of the fake-quantized ones",
            do="plan with tp: 1",
        )
    qat.prepare(model, compress.qat)

"""The guard inside Lightning's Trainer. Imported by `callback.lightning_callback` only."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from outlay.profiles.errors import UsageError
from outlay.runner.budget import Bounds, measure_write_rate
from outlay.runner.callback import Guard, Report, parse_budgets, reshaper
from outlay.runner.reshape import Reshaper


class BudgetCallback(Callback):
    """Rank 0 meters and decides; all ranks hear the same. `report` is there after the training."""

    def __init__(self, budget: str | Sequence[str] = (), *, save_to: Path, **options: Any) -> None:
        parse_budgets(budget, options.get("rate", ()))
        self._clock: Callable[[], float] = options.get("clock", time.monotonic)
        self._budget, self._options, self._save_to = budget, options, save_to
        self.guard: Guard | None = None
        self.report: Report | None = None
        self._step, self._evaluation_s = 0, 0.0
        self._reshaper: Reshaper | None = None
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        least = {"min_steps": trainer.min_steps, "min_epochs": trainer.min_epochs}
        if given := [name for name, value in least.items() if value]:
            raise UsageError(
                f"a Trainer with {' and '.join(given)} does not stop at a budget",
                where="lightning.Trainer",
                do=f"leave out {' and '.join(given)}",
            )
        self._step = self._first_step = trainer.global_step
        all_steps = trainer.estimated_stepping_batches
        steps = None if math.isinf(all_steps) else int(all_steps) - trainer.global_step
        options: dict[str, Any] = {"when_over": "anneal", **self._options}
        if options["when_over"] == "anneal":
            say = options.get("say") or (lambda text: print(text, file=sys.stderr, flush=True))
            self._reshaper = _reshaper(trainer, steps, say)
            options["when_over"] = "cut" if self._reshaper is None else "anneal"
        if not trainer.is_global_zero:
            return
        options = {"accelerators": trainer.world_size, **options}
        self.guard = Guard(self._budget, steps=steps, **options)
        self._save_to.parent.mkdir(parents=True, exist_ok=True)
        written = Bounds(
            step_guess_s=0.0,
            parameters=sum(p.numel() for p in pl_module.parameters()),
            write_bytes_per_s=measure_write_rate(self._save_to.parent),
        )
        self.guard.bounds.save.guess(written.save.upper_s())
        self.guard.resumed()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are accumulated: no step yet
        self._step = trainer.global_step
        save = stop = drop_validation = False
        end = 0
        if self.guard is not None:
            self._expect_validation(trainer)
            save = self.guard.look()
            stop, end = self.guard.stop_now, self.guard.total_steps
        save, stop, end = trainer.strategy.broadcast((save, stop, end))
        if self._reshaper is not None:
            self._reshaper.retarget(self._step - self._first_step, end)
        if save or stop:
            self._save(trainer)
        if not stop:
            return
        trainer.should_stop = True
        if self.guard is not None:
            # Lightning validates once more when it is told to stop
            drop_validation = not self.guard.meter.affords(self.guard.bounds.evaluate.upper_s())
        if trainer.strategy.broadcast(drop_validation):
            trainer.limit_val_batches = 0.0

    def _expect_validation(self, trainer: Trainer) -> None:
        """Of the end: the validation, and one more save by each checkpoint callback."""
        assert self.guard is not None
        bounds = self.guard.bounds
        bounds.export.guess(len(trainer.checkpoint_callbacks) * bounds.save.upper_s())
        if bounds.evaluate.measured or not bounds.step.measured or not trainer.enable_validation:
            return
        batches = sum(trainer.num_val_batches)
        if math.isfinite(batches):
            # a forward pass takes no longer than a forward and a backward one
            bounds.evaluate.guess(batches * bounds.step.upper_s() + 0.5)

    def _save(self, trainer: Trainer) -> None:
        began_s = self._clock()
        trainer.save_checkpoint(self._save_to)
        if self.guard is not None:
            self.guard.saved(self._clock() - began_s)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation_s = self._clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.guard is not None and self.report is None and not trainer.sanity_checking:
            self.guard.bounds.evaluate.add(self._clock() - self._evaluation_s)
            self.guard.resumed()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.guard is not None:
            self.report = self.guard.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.guard is not None:
            self.report = self.guard.close()


def _reshaper(trainer: Trainer, steps: int | None, say: Callable[[str], None]) -> Reshaper | None:
    """Null, said by the first rank, where the rate cannot be made to end earlier."""
    configs = trainer.lr_scheduler_configs
    say = say if trainer.is_global_zero else lambda _: None
    by_epoch = [c for c in configs if c.interval != "step" or c.frequency != 1]
    if not by_epoch:
        return reshaper([c.scheduler for c in configs], steps, say)
    say(
        "outlay: the learning rate cannot be made to end within the budget: its scheduler is not "
        'stepped with each step (interval "step", frequency 1); a training that is longer stops '
        "there, with the rate that it has then"
    )
    return None

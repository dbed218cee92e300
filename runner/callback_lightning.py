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
from outlay.runner.callback import Guard
from outlay.runner.callback_report import Report
from outlay.runner.callback_start import check_known, expected_save, parse_budgets, reshaper
from outlay.runner.reshape import Reshaper


class BudgetCallback(Callback):
    """Rank 0 meters and decides; all ranks hear the same. `report` is there after the training."""

    def __init__(self, budget: str | Sequence[str] = (), *, save_to: Path, **options: Any) -> None:
        parse_budgets(budget, options.get("rate", ()))
        check_known(options, Guard)
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
        self.report = None
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
        if options.get("save_s") is None:
            parameters = sum(p.numel() for p in pl_module.parameters())
            options |= expected_save(self._save_to.parent, parameters)
        self.guard = Guard(self._budget, steps=steps, **options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are accumulated: no step yet
        self._step = trainer.global_step
        save = stop = False
        end = 0
        if self.guard is not None:
            self._expect_end(trainer)
            self.guard.look()
            save, stop, end = self.guard.save_now, self.guard.stop_now, self.guard.total_steps
        save, stop, end = trainer.strategy.broadcast((save, stop, end))
        if self._reshaper is not None:
            self._reshaper.retarget(self._step - self._first_step, end)
        if save:
            self._save(trainer)
        if stop:
            trainer.should_stop = True
            self._drop_what_does_not_fit(trainer)

    def _drop_what_does_not_fit(self, trainer: Trainer) -> None:
        """Told to stop, Lightning validates once more, and its checkpoint callbacks save."""
        drop_saves = drop_validation = False
        if self.guard is not None:
            saves_s = _saves(trainer) * self.guard.bounds.save.upper_s()
            drop_saves = not self.guard.fits(saves_s)
            kept_s = 0.0 if drop_saves else saves_s
            drop_validation = not self.guard.fits(self.guard.bounds.evaluate.upper_s() + kept_s)
        drop_saves, drop_validation = trainer.strategy.broadcast((drop_saves, drop_validation))
        if drop_validation:
            trainer.limit_val_batches = 0.0
        if drop_saves:
            for callback in trainer.checkpoint_callbacks:
                # they save a step once: by this field of theirs they know which it was
                callback._last_global_step_saved = trainer.global_step  # type: ignore[attr-defined]

    def _expect_end(self, trainer: Trainer) -> None:
        """The validation, and the saves of each checkpoint callback: just before the end, or, where
        they still fit then, at the end."""
        assert self.guard is not None
        bounds = self.guard.bounds
        bounds.export.guess(_saves(trainer) * bounds.save.upper_s())
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


def _saves(trainer: Trainer) -> int:
    """Files that the checkpoint callbacks write when they save."""
    return sum(1 + (getattr(c, "save_last", None) is True) for c in trainer.checkpoint_callbacks)


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

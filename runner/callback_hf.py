"""The guard inside Hugging Face's Trainer. Imported by `callback.hf_callback` only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from outlay.runner.budget import SHUTDOWN_S, UpperBound
from outlay.runner.callback import Guard
from outlay.runner.callback_report import Report
from outlay.runner.callback_start import check_known, expected_save, parse_budgets, reshaper
from outlay.runner.reshape import Reshaper
from outlay.runner.votes import Votes


class BudgetCallback(TrainerCallback):  # type: ignore[misc]
    """Rank 0 meters and decides; all ranks hear the same. `report` is there after the training."""

    def __init__(self, budget: str | Sequence[str] = (), **options: Any) -> None:
        parse_budgets(budget, options.get("rate", ()))
        check_known(options, Guard)
        self._clock: Callable[[], float] = options.get("clock", time.monotonic)
        self._budget, self._options = budget, options
        self.guard: Guard | None = None
        self.report: Report | None = None
        self._votes: Votes | None = None
        self._evaluate = UpperBound(0.0, slack_s=0.1)
        self._extra_s = 0.0
        self._stopping = False
        self._reshaper: Reshaper | None = None
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopping, self.report = False, None
        self._votes = Votes(dist.get_world_size() if dist.is_initialized() else 1)
        self._first_step, steps = state.global_step, state.max_steps - state.global_step
        options: dict[str, Any] = {"when_over": "anneal", **self._options}
        say = options.get("say") or (lambda text: print(text, file=sys.stderr, flush=True))
        if options["when_over"] == "anneal":
            schedulers = [kwargs["lr_scheduler"]] if kwargs.get("lr_scheduler") else []
            lead = state.is_world_process_zero
            self._reshaper = reshaper(schedulers, steps, say if lead else lambda _: None)
            options["when_over"] = "cut" if self._reshaper is None else "anneal"
        if not state.is_world_process_zero:
            return
        if args.push_to_hub:
            say(
                "outlay: uploads to the hub that go on after the training are not within the budget"
            )
        if options.get("save_s") is None:
            parameters = sum(p.numel() for p in kwargs["model"].parameters())
            options |= expected_save(Path(args.output_dir), parameters)
        self.guard = Guard(
            self._budget, steps=steps, **{"accelerators": args.world_size, **options}
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stop = save = no_save = no_evaluation = False
        end = 0
        if self.guard is not None:
            # the best model is read again at the end: no longer than it took to write
            best_s = self.guard.bounds.save.upper_s() if args.load_best_model_at_end else 0.0
            self.guard.bounds.export.guess(best_s)
            self.guard.look()
            stop, save, end = self.guard.stop_now, self.guard.save_now, self.guard.total_steps
            no_save, no_evaluation = self._too_dear(args, control, kwargs)
        *said, end = self._agree(stop, save, no_save, no_evaluation, end)
        self._stopping, save, no_save, no_evaluation = map(bool, said)
        if self._reshaper is not None:
            self._reshaper.retarget(state.global_step - self._first_step, end)
        if self._stopping:
            control.should_training_stop = True
        others = control.should_save and not (no_save or self._stopping)
        control.should_save = others or save
        control.should_evaluate = control.should_evaluate and not (self._stopping or no_evaluation)
        self._extra_s = self._clock()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # an epoch that is cut short ends here, too; its state is saved already
        no_save, no_evaluation = map(bool, self._agree(*self._too_dear(args, control, kwargs)))
        control.should_save = control.should_save and not (self._stopping or no_save)
        control.should_evaluate = control.should_evaluate and not (self._stopping or no_evaluation)
        self._extra_s = self._clock()

    def _agree(self, *wishes: int) -> list[int]:
        assert self._votes is not None
        return self._votes.largest(*(int(wish) for wish in wishes))

    def _too_dear(
        self, args: TrainingArguments, control: TrainerControl, kwargs: dict[str, Any]
    ) -> tuple[bool, bool]:
        """Whether a save and an evaluation that are due do not fit before the end. At the end itself
        the Trainer forces both; the save is the more important one."""
        if self.guard is None:
            return False, False
        bounds, last = self.guard.bounds, control.should_training_stop
        if not self._evaluate.measured and kwargs.get("eval_dataloader") is not None:
            # a forward pass takes no longer than a forward and a backward one
            batches = len(kwargs["eval_dataloader"])
            self._evaluate.guess(batches * bounds.step.upper_s() + 0.5)
        evaluation_s, save_s = self._evaluate.upper_s(), bounds.save.upper_s()
        if last:
            no_save = control.should_save and not self.guard.fits(save_s)
            kept_s = save_s if control.should_save and not no_save else 0.0
            end_s = evaluation_s + kept_s + bounds.export.upper_s() + bounds.after_s + SHUTDOWN_S
            return no_save, control.should_evaluate and not self.guard.fits(end_s)
        affords = self.guard.control.affords
        # the strategy `best` saves what an evaluation finds to be better, and asks nobody
        best_s = save_s if str(getattr(args.save_strategy, "value", "")) == "best" else 0.0
        no_evaluation = control.should_evaluate and not affords(evaluation_s + best_s)
        evaluation_s = evaluation_s if control.should_evaluate and not no_evaluation else 0.0
        return control.should_save and not affords(evaluation_s + save_s), no_evaluation

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard is not None and self.report is None:
            self._evaluate.add(self._clock() - self._extra_s)
            self._extra_s = self._clock()
            self.guard.resumed()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard is not None and self.report is None:
            self.guard.saved(self._clock() - self._extra_s)
            self._extra_s = self._clock()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard is not None:
            self.report = self.guard.close()

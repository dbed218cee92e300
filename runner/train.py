"""The training loop of one rank: until the last step, the budget or a signal."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outlay.planner.spec.files import plain, to_json, write_text
from outlay.planner.spec.measurement import Outcome, RunState
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import (
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_RESTART_ME,
    OutlayError,
    UsageError,
)
from outlay.runner.budget import SHUTDOWN_S, Bounds, Meter, UpperBound, measure_write_rate
from outlay.runner.checkpoint import save_checkpoint
from outlay.runner.compress.progress import Progress
from outlay.runner.control import Controller, Stop
from outlay.runner.data.dataset import TokenDataset
from outlay.runner.events import EventLog
from outlay.runner.export import export_safetensors
from outlay.runner.folder import RunFolder
from outlay.runner.limits import Limits
from outlay.runner.observed import measurement, memory_now_bytes, peak_memory
from outlay.runner.own import record
from outlay.runner.processes import StopRequest
from outlay.runner.question import Asked
from outlay.runner.rehearsal import evaluate_within, try_evaluation, try_export
from outlay.runner.schedule import Decay
from outlay.runner.telemetry import Scalars
from outlay.runner.votes import STOPS, Orders, Votes

if TYPE_CHECKING:
    from outlay.runner.engine import Engine, RankInfo

REHEARSE_AFTER = 3
"""Steps of an attempt after which a run with a budget saves for the first time, to know what a
save takes, and times evaluation; they are also the steps that are left out of the timings."""

_EXIT_CODES: dict[RunState, int] = {
    "done": EXIT_DONE,
    "budget": EXIT_BUDGET,
    "stopped": EXIT_RESTART_ME,
}

SAVE_AFTER_S = 60.0
"""Wall time between checkpoints where the job does not say how many steps."""


class Trainer:
    """One rank's part of a run. Rank 0 decides, writes events and keeps the scalars."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        *,
        engine: Engine,
        info: RankInfo,
        dataset: TokenDataset,
        meter: Meter,
        log: EventLog,
        stop: StopRequest,
        limits: Limits | None = None,
    ) -> None:
        self.plan, self.job, self.strategy = plan, plan.job, plan.strategy
        self.folder, self.engine, self.info = folder, engine, info
        self.dataset, self.meter, self.log, self.stop = dataset, meter, log, stop
        self.lead = info.rank == 0
        self.votes = Votes(info.world)
        self.step = self.first_step = 0
        self.saved_step: int | None = None
        self.checkpoint: str | None = None
        self.loss: float | None = None
        self.last_save_s, self.last_save_took_s = time.monotonic(), 0.0
        self.step_times_s: list[float] = []
        self.rehearsed = False
        self.scalars: Scalars | None = None
        micro_batch, sequences = self.strategy.micro_batch, self.job.eval_sequences
        grid = {"dp_size": engine.dp_size, "micro_batch": micro_batch, "sequences": sequences}
        batches = dataset.heldout_batches(engine.dp_rank, **grid)
        self.heldout = [torch.from_numpy(batch) for batch in batches]
        self.unigram = dataset.heldout_unigram_nats(**grid) if self.lead else None
        self.bounds = self._first_bounds()
        limits = limits or Limits()
        self.control = Controller(
            meter,
            self.bounds,
            steps=self.job.steps,
            policy=limits.when_over,
            walltime_s=limits.walltime_s,
        )
        self.asked = Asked(folder, log)
        self.decay = Decay(self.job.schedule, self.job.optimizer.lr, self.job.steps)
        self.compression = Progress(engine.compressor, log, lead=self.lead)

    def _first_bounds(self) -> Bounds:
        estimate_s = self.plan.estimate.get("step", {}).get("high_s", 0.0)
        limited = self.lead and bool(self.meter.budgets)
        return Bounds(
            step_guess_s=float(estimate_s),
            parameters=self.plan.model.parameters,
            write_bytes_per_s=measure_write_rate(self.folder.root) if limited else math.inf,
        )

    def restore(self, state: dict[str, Any], checkpoint: str) -> None:
        """Take up where a checkpoint ends; its data must be this data."""
        if state["data"] != self._data_identity():
            raise UsageError(
                "this checkpoint was made with other data",
                where=checkpoint,
                why=f"{state['data']}, now {self._data_identity()}",
                do="resume with the data, seq_len, seed and global batch that it began with",
            )
        self.step = self.first_step = self.saved_step = int(state["step"])
        self.loss, self.checkpoint = state["train_loss"], checkpoint
        if "decay" in state:
            self.decay.restore(state["decay"], self.step, self.job.steps)

    def run(self) -> int:
        """Train to the end of the run and write its outcome; returns the exit code."""
        if self.lead:
            self.scalars = Scalars(self.folder.tensorboard, first_step=self.step + 1)
        while True:
            orders = self._orders()
            if orders.signalled:
                return self._finish("stopped", "stopped by a signal")
            if orders.save:
                self._save()
            if orders.rehearse:
                self._rehearse()
            if orders.evaluate:
                self._evaluate()
            if self.step >= self.job.steps:
                return self._finish("done", f"all {self.job.steps} steps done")
            if orders.stop is not None:
                state: RunState = "stopped" if orders.stop == "walltime" else "budget"
                return self._finish(state, self._why(orders.stop))
            self.decay.retarget(self.step, orders.total_steps)
            self._train_step()

    def _why(self, stop: Stop) -> str:
        if stop == "walltime":
            return "the wall time ends: start me again with outlay resume"
        if stop == "budget":
            return f"the budget of {self.meter.limit_text()} is used up"
        return (
            f"stopped for its forecast: {self.control.forecast_text(self.step)}; resume with a "
            "larger --budget, or with --when-over anneal"
        )

    def _orders(self) -> Orders:
        """Rank 0 decides, any rank may have received a signal, and all get the same orders."""
        wishes = [0, 0, 0, 0, 0]
        if self.lead:
            wishes = [int(wish) for wish in self._wishes()]
        agreed = self.votes.largest(int(self.stop.requested), *wishes)
        signalled, stop, total_steps, save, evaluate, rehearse = agreed
        return Orders(
            signalled=bool(signalled),
            stop=STOPS[stop],
            total_steps=total_steps,
            save=bool(save),
            evaluate=bool(evaluate),
            rehearse=bool(rehearse),
        )

    def _wishes(self) -> tuple[int, int, bool, bool, bool]:
        """(stop, total steps, save, evaluate, rehearse): extras only if the end fits after them."""
        bounds, done = self.bounds, self.step - self.first_step
        decision = self.control.decide(self.step)
        self.asked.look(self.control, decision, self.step)
        for message in decision.warnings:
            self.log.write("warning", self.step, message=message)
        stop, total_steps = STOPS.index(decision.stop), decision.total_steps
        if stop or self.step >= self.job.steps or done == 0:
            return stop, total_steps, False, False, False
        limited = bool(self.meter.budgets) or self.control.walltime_s is not None
        rehearse = limited and done == REHEARSE_AFTER
        save = rehearse or self._save_due()
        save = save and self.control.affords(bounds.save.upper_s())
        evaluate = _due(self.job.eval_every, self.step)
        evaluate = evaluate and self.control.affords(bounds.evaluate.upper_s())
        return 0, total_steps, save, evaluate, rehearse

    def _save_due(self) -> bool:
        """By steps where the job says so; else by time, so that a kill costs at most
        SAVE_AFTER_S (or fifty times what a save takes, where saves are slow)."""
        if self.job.save_every is not None:
            return _due(self.job.save_every, self.step)
        waited_s = time.monotonic() - self.last_save_s
        return waited_s >= max(SAVE_AFTER_S, 50 * self.last_save_took_s)

    def _train_step(self) -> None:
        began_s = time.monotonic()
        lr = self.decay.rate(self.step)
        self.engine.set_lr(lr)
        self.compression.before_step(self.step, self.decay.steps)
        loss = self.engine.train_step([self._batch(i) for i in range(self.strategy.grad_accum)])
        took_s = time.monotonic() - began_s
        self.step += 1
        self.step_times_s.append(took_s)
        if len(self.step_times_s) == 2 * REHEARSE_AFTER:
            self.bounds.step.forget_first(REHEARSE_AFTER)
        self.bounds.step.add(took_s)
        if not (self.bounds.evaluate.measured or self.rehearsed):
            # a forward pass takes no longer than a forward and a backward one
            self.bounds.evaluate.guess(len(self.heldout) * took_s / self.strategy.grad_accum + 0.5)
        self._report_step(loss, lr, took_s)
        if not math.isfinite(loss):
            raise OutlayError(
                f"the loss of step {self.step} is not finite",
                why=f"learning rate {lr:.3g}, loss before {self.loss}",
                do="train anew with a lower learning rate, a longer warm-up or another precision",
            )
        self.loss = loss

    def _batch(self, index: int) -> torch.Tensor:
        return torch.from_numpy(
            self.dataset.batch(
                self.step,
                index,
                self.engine.dp_rank,
                dp_size=self.engine.dp_size,
                micro_batch=self.strategy.micro_batch,
                grad_accum=self.strategy.grad_accum,
            )
        )

    def _report_step(self, loss: float, lr: float, took_s: float) -> None:
        if not self.lead:
            return
        spent = self.meter.spent()
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": self.engine.last_grad_norm,
            "step_s": took_s,
            "tokens_per_s": self.job.tokens_per_step / took_s,
            "spent_usd": spent.cost_usd,
            "spent_s": spent.wall_s,
            "spent_kwh": spent.energy_kwh,
        }
        use = self.engine.last_expert_use
        if use is not None:
            values |= use.figures()
        self.log.write("step", self.step, **values)
        assert self.scalars is not None
        self.scalars.add("train", self.step, **values, memory_bytes=memory_now_bytes())

    def _save(self) -> None:
        began_s = time.monotonic()
        state = {
            "step": self.step,
            "tokens": self.step * self.job.tokens_per_step,
            "data_position": self.step * self.job.global_batch,
            "spent_s": self.meter.spent().wall_s,
            "spent": plain(self.meter.spent()),
            "decay": self.decay.state(),
            "train_loss": self.loss,
            "data": self._data_identity(),
        }
        path = save_checkpoint(self.engine, self.folder.checkpoints, self.step, state)
        took_s = time.monotonic() - began_s
        self.bounds.save.add(took_s)
        self.last_save_s, self.last_save_took_s = time.monotonic(), took_s
        self.saved_step, self.checkpoint = self.step, str(path)
        if self.lead:
            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            self._guess_export(took_s, size)
            self.log.write("save", self.step, path=str(path), save_s=took_s, size_bytes=size)

    def _guess_export(self, save_s: float, save_bytes: int) -> None:
        """All ranks wrote the checkpoint; one writes the export, with at most 4 bytes a weight."""
        weights_share = min(1.0, 4 * self.plan.model.parameters / max(1, save_bytes))
        share = weights_share * self.info.world
        self.bounds.export.guess(1.5 * save_s * share + 0.5)

    def _data_identity(self) -> dict[str, Any]:
        return {
            "train_sha256": self.dataset.info.train.sha256,
            "seq_len": self.job.seq_len,
            "seed": self.job.seed,
            "global_batch": self.job.global_batch,
        }

    def _rehearse(self) -> None:
        export, root = self.bounds.export, self.folder.root
        try_export(self._export_to, export, root, self.votes, lead=self.lead)
        self.rehearsed = True
        evaluate, count, bound = self.engine.evaluate, len(self.heldout), self.bounds.evaluate
        try_evaluation(lambda most: evaluate(self.heldout[:most]), count, bound)

    def _evaluate(self, *, last: bool = False) -> float | None:
        """The last one under a budget goes batch by batch, and gives up where the budget ends."""
        began_s = time.monotonic()
        evaluate, loss = self.engine.evaluate, None
        if last and self.meter.budgets and self.strategy.pp == 1:
            one, count = lambda i: evaluate(self.heldout[i : i + 1]), len(self.heldout)
            loss = evaluate_within(one, count, self.meter, self.votes, lead=self.lead)
        else:
            loss = evaluate(self.heldout)
        took_s = time.monotonic() - began_s
        if loss is None:
            self._left_out("the held-out evaluation", took_s)
            return None
        self.bounds.evaluate.add(took_s)
        if self.lead:
            self.log.write("eval", self.step, loss=loss, unigram=self.unigram, eval_s=took_s)
            assert self.scalars is not None
            self.scalars.add("heldout", self.step, loss=loss, unigram=self.unigram)
        return loss

    def _finish(self, state: RunState, reason: str) -> int:
        """Save; unless stopped by a signal export and evaluate, as far as the budget reaches."""
        if self.lead:
            kept_s = self.bounds.kept_s()
            self.log.write("stop", self.step, message=reason, state=state, kept_s=kept_s)
        # nothing trained is worth a save only if there is time for it
        if self.saved_step != self.step and (
            self.step > 0 or self._affords(self.bounds.save, "a first checkpoint")
        ):
            self._save()
        heldout = exported = None
        if state != "stopped":
            if self._affords(self.bounds.export, "the export"):
                exported = self._export()
            if self._affords(self.bounds.evaluate, "the held-out evaluation"):
                heldout = self._evaluate(last=True)
        memory = peak_memory(self.votes.gather)
        self.compression.at_end(self.step)
        if self.lead:
            self._write_measurement(*memory)
            self._write_outcome(state, reason, heldout, exported)
        return _EXIT_CODES[state]

    def _affords(self, bound: UpperBound, what: str) -> bool:
        """Rank 0's answer for all; what is left out is said."""
        upper_s = bound.upper_s()
        short = self.lead and not self.meter.affords(upper_s + SHUTDOWN_S)
        (left_out,) = self.votes.largest(int(short))
        if left_out:
            self._left_out(what, upper_s)
        return not left_out

    def _left_out(self, what: str, takes_s: float) -> None:
        if not self.lead:
            return
        left_s = max(0.0, self.meter.remaining_s() or 0.0)
        message = f"{what} is left out: it may take {takes_s:.1f} s and more, "
        message += f"the end {SHUTDOWN_S:.1f} s, and the budget has {left_s:.1f} s left"
        self.log.write("warning", self.step, message=message)

    def _export(self) -> str:
        began_s = time.monotonic()
        if self._export_to(self.folder.export):
            took_s = time.monotonic() - began_s
            self.log.write("export", self.step, path=str(self.folder.export), export_s=took_s)
        return str(self.folder.export)

    def _export_to(self, path: Path) -> bool:
        """Whether this rank wrote it."""
        weights = self.engine.gather_state_dict()
        if weights is not None:
            export_safetensors(weights, self.plan, path, self.dataset.tokenizer_path)
        return weights is not None

    def _write_measurement(self, kind: str | None, memory_bytes: tuple[int, ...]) -> None:
        result = measurement(
            self.plan,
            name=self.folder.root.name,
            step_times_s=self.step_times_s,
            left_out=REHEARSE_AFTER,
            memory_kind=kind,
            memory_bytes=memory_bytes,
            cost_usd=self.meter.spent().cost_usd,
        )
        spent = self.meter.spent()
        if self.meter.energy is not None:
            result = replace(
                result, energy_kwh=spent.energy_kwh, energy_source=self.meter.energy.source
            )
        write_text(self.folder.measurement, to_json(result))
        record(self.plan, result)

    def _write_outcome(
        self, state: RunState, reason: str, heldout: float | None, exported: str | None
    ) -> None:
        """The last thing that is written: whoever finds it may end the processes."""
        assert self.scalars is not None
        self.scalars.close()
        spent = self.meter.spent()
        outcome = Outcome(
            state=state,
            exit_code=_EXIT_CODES[state],
            reason=reason,
            steps=self.step,
            tokens=self.step * self.job.tokens_per_step,
            wall_s=spent.wall_s,
            cost_usd=spent.cost_usd,
            train_loss=self.loss,
            heldout_loss=heldout,
            checkpoint=self.checkpoint,
            export=exported,
            heldout_unigram=None if heldout is None else self.unigram,
            compression=self.compression.report,
        )
        write_text(self.folder.outcome, to_json(outcome))


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0

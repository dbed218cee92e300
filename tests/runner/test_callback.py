"""The guard: a loop on a simulated clock, and real Trainers of others that stop at their budget."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import FileError, NotFeasible, UsageError
from outlay.runner.callback import BEAT_S, Guard, hf_callback, lightning_callback
from outlay.runner.ledger import Ledger

PRICE = 3600.0
"""One USD a second."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def guarded(clock: Clock, said: list[str] | None = None, **more: Any) -> Guard:
    fields: dict[str, Any] = {
        "budget": "100usd",
        "price_usd_per_h": PRICE,
        "started_s": clock(),
        "say": (said if said is not None else []).append,
    }
    if "save" not in more:
        fields["save_s"] = 0.0  # the loop never saves
    return Guard(clock=clock, **fields | more)


def loop(guard: Guard, clock: Clock, step_s: float, most: int = 10_000) -> int:
    for done in range(1, most + 1):
        clock.now_s += step_s
        if guard.step():
            return done
    return most


def test_a_loop_stops_within_its_budget_saved_and_warned(tmp_path: Path) -> None:
    clock, said, saves = Clock(), [], []

    def save() -> None:
        clock.now_s += 2.0
        saves.append(clock())

    guard = guarded(clock, said, steps=500, save=save, report=tmp_path / "report.json")
    steps = loop(guard, clock, 0.5, 500)
    report = guard.close()
    assert steps < 500
    assert len(saves) == 2  # the early one and the last
    assert report.saved and report.state == "budget"
    assert report.spent.cost_usd is not None
    assert 97.0 < report.spent.cost_usd <= 100.0
    told = [text for text in said if "of the budget is used" in text]
    assert [text.split()[1] for text in told] == ["50%", "80%", "95%"]
    assert "all 500 steps would end at" in told[0]
    # at 20 % of the steps it was known what all of them would take
    assert report.forecast is not None
    assert report.forecast.expected_s == pytest.approx(500 * 0.5 + 2 * 2, rel=0.03)
    assert json.loads((tmp_path / "report.json").read_text())["state"] == "budget"
    assert "forecast at 20% of the steps" in said[-1]
    assert guard.close() is report


def test_a_loop_that_ends_earlier_is_done() -> None:
    clock = Clock()
    guard = guarded(clock, steps=10)
    assert loop(guard, clock, 0.5, 10) == 10
    assert guard.close().state == "done"
    endless, said = Clock(), []
    guard = guarded(endless, said)
    loop(guard, endless, 0.5, 150)
    assert guard.close().state == "stopped"
    assert said[0].startswith("outlay: 50% of the budget is used: 100 steps are done")


def test_policy_stop_ends_for_the_forecast_alone() -> None:
    clock = Clock()
    guard = guarded(clock, steps=100_000, when_over="stop")
    assert loop(guard, clock, 0.5) < 100
    assert guard.close().reason.startswith("all 100,000 steps would end at")


def test_a_scheduler_of_the_loop_ends_within_the_budget() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    clock, said = Clock(), []
    guard = guarded(clock, said, steps=1000, scheduler=scheduler)
    rates = []
    for _ in range(1000):
        clock.now_s += 1.0
        optimizer.step()
        scheduler.step()
        if guard.step():
            break
        rates.append(scheduler.get_last_lr()[0])
    assert 90 < guard.done <= guard.total_steps < 100
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.01
    assert any("the learning rate now ends within it" in text for text in said)
    guard.close()
    endless = guarded(clock, said, scheduler=scheduler)
    assert "the number of steps is not known" in said[-1]
    endless.close()


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a price"):
        Guard("2usd", started_s=0.0)
    with pytest.raises(UsageError, match="no budget"):
        Guard([], started_s=0.0)
    with pytest.raises(UsageError, match="unknown unit"):
        hf_callback("2pounds")
    with pytest.raises(UsageError, match="unknown unit"):
        lightning_callback("2pounds")


def test_the_ledger_knows_it_and_a_later_process_continues(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    options: dict[str, Any] = {"ledger": str(path), "run": "mine", "user": "ada", "tags": ("t",)}
    clock = Clock()
    first = guarded(clock, **options)
    assert loop(first, clock, 1.0, 60) == 60
    first.close()
    second = guarded(clock, **options)
    assert second.meter.spent().cost_usd == pytest.approx(60.0)
    assert loop(second, clock, 1.0) < 40
    report = second.close()
    assert report.spent.cost_usd is not None and 95 < report.spent.cost_usd <= 100
    rows = Ledger(path).rows("SELECT state, cost_usd, steps, tags FROM attempts ORDER BY id")
    assert [r["state"] for r in rows] == ["stopped", "budget"]
    assert sum(r["cost_usd"] for r in rows) == pytest.approx(report.spent.cost_usd)
    assert rows[0]["tags"] == '["t"]'


def test_a_project_budget_is_drawn_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.set_budget("p", Budget(kind="money", amount=50.0))
    clock = Clock()
    options: dict[str, Any] = {"ledger": str(path), "project": "p"}
    guard = guarded(clock, budget=(), **options)
    with pytest.raises(NotFeasible, match="reserved by 1 run that goes on"):
        guarded(clock, **options)
    loop(guard, clock, 1.0)
    assert ledger.totals("p")[0].alive == 1
    report = guard.close()
    assert report.spent.cost_usd is not None and 45 < report.spent.cost_usd <= 50
    (total,) = ledger.totals("p")
    assert (total.alive, total.spent) == (0, report.spent.cost_usd)


def test_a_lost_reservation_stops_the_loop(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).set_budget("p", Budget(kind="money", amount=500.0))
    clock = Clock()
    guard = guarded(clock, ledger=str(path), project="p")
    with Ledger(path).change() as db:
        db.execute("DELETE FROM reservations")
    assert loop(guard, clock, 1.0) <= BEAT_S
    assert "was lost" in guard.close().reason


def test_a_ledger_that_fails_ends_no_training_but_a_project_needs_it(tmp_path: Path) -> None:
    path, clock, said = tmp_path / "ledger.sqlite", Clock(), []
    guard = guarded(clock, said, ledger=str(path))
    with Ledger(path).change() as db:
        db.execute("ALTER TABLE attempts RENAME TO gone")
    assert loop(guard, clock, 1.0) > 90
    assert guard.close().state == "budget"
    assert (
        sum("the ledger was not written" in text for text in said) == 2
    )  # once on the way, once at the end
    path.write_text("rubbish" * 1000)
    for leftover in tmp_path.glob("ledger.sqlite-*"):
        leftover.unlink()
    guarded(clock, said, ledger=str(path)).close()
    assert any("not in the ledger" in text for text in said)
    with pytest.raises(FileError):
        guarded(clock, said, ledger=str(path), project="p")
    with pytest.raises(UsageError, match="which is off"):
        guarded(clock, said, ledger="off", project="p")


def in_time(clock: Any, seconds: float) -> dict[str, Any]:
    return {
        "budget": [f"{seconds}usd", "1h"],
        "price_usd_per_h": PRICE,
        "started_s": clock(),
        "clock": clock,
    }


def check_real(report: Any, amount: float, least: float) -> None:
    """At most 100 %, and not stopped without a reason."""
    assert report.state == "budget" and report.saved
    assert report.spent.fraction <= 1.0
    assert least * amount < report.spent.cost_usd <= amount


def hugging_face(folder: Path, callbacks: list[Any], **arguments: Any) -> Any:
    """A real Trainer of a tiny model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(64)]
    chosen = {
        "max_steps": 400, "save_strategy": "no", "eval_strategy": "epoch", "logging_steps": 1,
        "learning_rate": 1e-3,
    }  # fmt: skip
    with warnings.catch_warnings():
        # torch, of a data loader that pins memory without an accelerator
        warnings.filterwarnings("ignore", message=".*pin_memory", category=UserWarning)
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=TrainingArguments(
                output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True,
                per_device_train_batch_size=4, **chosen | arguments,
            ),
            train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
    return trainer


def costs(clock: Clock, step_s: float, save_s: float, evaluation_s: float) -> Any:
    """What steps, saves and evaluations take on the simulated clock; goes before the guard."""
    from transformers import TrainerCallback

    class Costs(TrainerCallback):  # type: ignore[misc]
        def _pass(self, seconds: float) -> None:
            clock.now_s += seconds

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._pass(step_s)

        def on_save(self, *_: Any, **__: Any) -> None:
            self._pass(save_s)

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            self._pass(evaluation_s)

    return Costs()


def rates_of(trainer: Any) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.mark.processes
@pytest.mark.parametrize("when_over", ["anneal", "cut"])
def test_a_hugging_face_trainer_stops_at_its_budget(tmp_path: Path, when_over: str) -> None:
    """The Trainer is real, its time is simulated: a busy machine changes nothing."""
    import torch
    from transformers import LlamaForCausalLM

    clock, said = Clock(), []
    options = {"when_over": when_over} if when_over != "anneal" else {}  # it is the default
    callback = hf_callback(
        **in_time(clock, 100.0), ledger=str(tmp_path / "ledger.sqlite"), user="ada",
        say=said.append, **options,
    )  # fmt: skip
    trainer = hugging_face(tmp_path / "out", [costs(clock, 2.0, 1.0, 0.25), callback])
    check_real(callback.report, 100.0, 0.94)
    step = trainer.state.global_step
    assert 40 < step == callback.report.steps < 50
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    for mine, theirs in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    row = Ledger(tmp_path / "ledger.sqlite").rows("SELECT * FROM attempts")[0]
    assert (row["state"], row["steps"], row["user"]) == ("budget", step, "ada")
    rates = rates_of(trainer)
    if when_over == "anneal":
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 0.05 * rates[0]
        assert any("the learning rate now ends within it" in text for text in said)
    else:
        assert rates[-1] == pytest.approx(rates[0] * (1 - step / 400), rel=0.01)


@pytest.mark.processes
def test_a_scheduler_that_cannot_be_reshaped_is_said_and_cut(tmp_path: Path) -> None:
    clock, said = Clock(), []
    callback = hf_callback(**in_time(clock, 20.0), ledger="off", say=said.append)
    hugging_face(
        tmp_path / "out", [costs(clock, 1.0, 0.1, 0.1), callback],
        lr_scheduler_type="reduce_lr_on_plateau",
    )  # fmt: skip
    assert "cannot be made to end within the budget: the rate of ReduceLROnPlateau" in said[0]
    check_real(callback.report, 20.0, 0.8)


@pytest.mark.long
@pytest.mark.processes
def test_a_hugging_face_trainer_stops_at_its_budget_in_real_time(tmp_path: Path) -> None:
    callback = hf_callback(**in_time(time.monotonic, 30.0), ledger="off")
    hugging_face(tmp_path / "out", [callback], max_steps=10**6)
    check_real(callback.report, 30.0, 0.5)


@pytest.mark.processes
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_lightning_trainer_stops_at_its_budget(tmp_path: Path, interval: str) -> None:
    import lightning
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    clock, said = Clock(), []
    rates: list[float] = []

    class Tiny(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            clock.now_s += 0.5
            rates.append(self.optimizers().param_groups[0]["lr"])
            return self.layer(batch[0]).pow(2).mean()

        def validation_step(self, batch: Any, index: int) -> None:
            clock.now_s += 0.05
            self.layer(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
            return [optimizer], [{"scheduler": cosine, "interval": interval}]

    data = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=8)
    path = tmp_path / "last.ckpt"
    callback = lightning_callback(
        **in_time(clock, 100.0), save_to=path, say=said.append, ledger="off"
    )
    model = Tiny()
    with warnings.catch_warnings():
        # Lightning of itself: an old name in its tree code; loaders without worker processes
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer = lightning.Trainer(
            max_epochs=100, accelerator="cpu", callbacks=[callback], logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, data)
    check_real(callback.report, 100.0, 0.97)
    assert 3 < trainer.global_step == callback.report.steps
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == trainer.global_step
    assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight)
    if interval == "step":
        assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-3 * rates[0]
    else:
        assert 'not stepped with each step (interval "step"' in said[0]


def test_a_lightning_trainer_that_could_not_stop_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    callback = lightning_callback("1h", save_to=tmp_path / "x.ckpt")
    trainer: Any = SimpleNamespace(min_steps=100, min_epochs=None)
    with pytest.raises(UsageError, match="min_steps does not stop"):
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]

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
    with pytest.raises(NotFeasible, match="reserved by 1 runs"):
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
    assert sum("the ledger was not written" in text for text in said) > 2
    path.write_text("rubbish" * 1000)
    for leftover in tmp_path.glob("ledger.sqlite-*"):
        leftover.unlink()
    guarded(clock, said, ledger=str(path)).close()
    assert any("not in the ledger" in text for text in said)
    with pytest.raises(FileError):
        guarded(clock, said, ledger=str(path), project="p")
    with pytest.raises(UsageError, match="which is off"):
        guarded(clock, said, ledger="off", project="p")


def budget_s(seconds: float) -> dict[str, Any]:
    return {
        "budget": [f"{seconds}usd", "1h"],
        "price_usd_per_h": PRICE,
        "started_s": time.monotonic(),
    }


def check_real(report: Any, amount: float) -> None:
    """At most 100 %, and not stopped without a reason."""
    assert report.state == "budget" and report.saved
    assert report.spent.fraction <= 1.0
    assert 0.25 * amount < report.spent.cost_usd <= amount
    assert report.forecast is None or report.forecast.expected_s > amount


@pytest.mark.processes
def test_a_hugging_face_trainer_stops_at_its_budget(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(64)]
    with warnings.catch_warnings():
        # torch, of a data loader that pins memory without an accelerator
        warnings.filterwarnings("ignore", message=".*pin_memory", category=UserWarning)
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=TrainingArguments(
                output_dir=str(tmp_path / "out"), max_steps=10**6, use_cpu=True, report_to=[],
                per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
                eval_strategy="epoch", logging_steps=10**6,
            ),
            train_dataset=rows, eval_dataset=rows[:8],
        )  # fmt: skip
        # now: imports and the Trainer's own set-up take seconds on a busy machine
        callback = hf_callback(**budget_s(12.0), ledger=str(tmp_path / "ledger.sqlite"), user="ada")
        trainer.add_callback(callback)
        trainer.train()
    check_real(callback.report, 12.0)
    step = trainer.state.global_step
    assert 3 < step == callback.report.steps
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    for mine, theirs in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    row = Ledger(tmp_path / "ledger.sqlite").rows("SELECT * FROM attempts")[0]
    assert (row["state"], row["steps"], row["user"]) == ("budget", step, "ada")


@pytest.mark.processes
def test_a_lightning_trainer_stops_at_its_budget(tmp_path: Path) -> None:
    import lightning
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    class Tiny(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            time.sleep(0.005)
            return self.layer(batch[0]).pow(2).mean()

        def validation_step(self, batch: Any, index: int) -> None:
            self.layer(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=8)
    path = tmp_path / "last.ckpt"
    callback = lightning_callback(**budget_s(8.0), save_to=path)
    model = Tiny()
    with warnings.catch_warnings():
        # Lightning of itself: an old name in its tree code; loaders without worker processes
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer = lightning.Trainer(
            max_epochs=100_000, accelerator="cpu", callbacks=[callback], logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, data)
    check_real(callback.report, 8.0)
    assert 3 < trainer.global_step == callback.report.steps
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == trainer.global_step
    assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight)


def test_a_lightning_trainer_that_could_not_stop_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    callback = lightning_callback("1h", save_to=tmp_path / "x.ckpt")
    trainer: Any = SimpleNamespace(min_steps=100, min_epochs=None)
    with pytest.raises(UsageError, match="min_steps does not stop"):
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]

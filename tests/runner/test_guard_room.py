"""A guard never spends more than its budget: slow steps, slow saves, starts that hold nothing."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from test_callback import PRICE, Clock, costs, guarded, hugging_face, in_time

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.runner import callback_account
from outlay.runner.callback import UNKNOWN_SAVE_S, Guard, hf_callback, lightning_callback
from outlay.runner.ledger import Ledger


def run_loop(guard: Guard, clock: Clock, step_s: Any, most: int = 10_000) -> None:
    for done in range(1, most + 1):
        clock.now_s += step_s(done)
        if guard.step():
            return


def test_a_last_save_that_does_not_fit_is_not_made_and_the_earlier_one_is_named() -> None:
    clock, saves = Clock(), []

    def save() -> None:
        clock.now_s += 4.0
        saves.append(guard.done)

    guard = guarded(clock, save=save)
    # the step before the end takes 6 s, where 0.5 s were usual: what was kept for the save is gone
    run_loop(guard, clock, lambda done: 8.0 if clock() > 1091.0 else 0.5)
    report = guard.close()
    assert saves == [3]
    assert report.spent.fraction is not None and report.spent.fraction <= 1.0
    assert (report.state, report.saved, report.saved_step) == ("budget", False, 3)
    assert "stopped, not saved, within 100 USD; the last save is of step 3" in report.reason
    assert "did not fit" in report.reason


def test_cheap_saves_are_made_on_the_way_so_that_little_is_lost() -> None:
    clock, saves = Clock(), []

    def save() -> None:
        clock.now_s += 0.05
        saves.append(guard.done)

    guard = guarded(clock, save=save)
    run_loop(guard, clock, lambda done: 8.0 if clock() > 1097.0 else 0.5)
    report = guard.close()
    assert [round(done / 2, -1) for done in saves[1:]] == [50, 80, 100]  # seconds: 50, 80, 95
    assert not report.saved and report.saved_step == saves[-1]


def test_100_loops_with_jumps_of_steps_and_saves_stay_within() -> None:
    """Steps that suddenly take up to 20 times as long; saves within the margin of what was seen."""
    lost = 0
    for seed in range(100):
        rng, clock = random.Random(seed), Clock()
        save_s, step_s = rng.uniform(0.01, 4.0), rng.uniform(0.1, 1.0)

        def save(rng: random.Random = rng, clock: Clock = clock, save_s: float = save_s) -> None:
            clock.now_s += save_s * rng.uniform(0.8, 1.04)

        def step(_: int, rng: random.Random = rng, step_s: float = step_s) -> float:
            return step_s * (rng.uniform(2, 20) if rng.random() < 0.003 else rng.uniform(0.9, 1.1))

        guard = guarded(clock, budget=f"{rng.uniform(60, 400)}usd", save=save)
        run_loop(guard, clock, step, most=100_000)
        report = guard.close()
        # only a single step that alone is longer than all that was kept can end above
        kept_s = guard.bounds.finish_s()
        assert report.spent.fraction is not None
        over_s = (report.spent.fraction - 1) * guard.meter.budgets[0].amount
        assert over_s <= max(0.0, 20 * step_s - kept_s), seed
        lost += not report.saved
    assert lost < 10


def test_a_loop_that_saves_for_itself_is_told_when() -> None:
    clock = Clock()
    guard, saved = guarded(clock, save=None, save_s=8.0), []
    while True:
        clock.now_s += 0.5
        stop = guard.step()
        if guard.save_now:
            with guard.saving():
                clock.now_s += 6.0
            saved.append(guard.done)
            assert not guard.save_now
        if stop:
            break
    report = guard.close()
    assert len(saved) == 2 and saved[0] == 3 and report.saved
    assert report.spent.fraction is not None and 0.9 < report.spent.fraction <= 1.0


def test_an_unknown_save_is_kept_room_for_and_said() -> None:
    clock = Clock()
    guard = guarded(clock, save=None, save_s=None)
    run_loop(guard, clock, lambda _: 0.5)
    report = guard.close()
    assert report.spent.wall_s <= 100 - UNKNOWN_SAVE_S
    assert "5.00 s of it were kept for a save, and none was made" in report.reason


def test_what_others_do_after_the_training_has_its_room() -> None:
    clock = Clock()
    guard = guarded(clock, keep_s=20.0)
    run_loop(guard, clock, lambda _: 0.5)
    assert 75 < guard.close().spent.wall_s <= 80
    assert "metered until here" in guard.close().text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "0.01usd"}, "10 ms of it are left; a step is not known, the end"),
        ({"budget": "4usd", "save_s": None}, "a save 5.00 s (assumed: none is timed yet)"),
        ({"budget": "4usd", "save_s": 3.5}, "a save 3.50 s (save_s)"),
        ({"budget": "4usd", "keep_s": 3.5}, "the rest 3.50 s"),
        ({"budget": "9usd", "minimum_s": 10.0}, "below the minimum bill of 10.00 USD"),
    ],
)
def test_a_start_that_holds_no_step_and_save_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(NotFeasible) as refused:
        guarded(Clock(), ledger=str(path), **options)
    assert words in refused.value.message()
    assert refused.value.exit_code == 3
    assert Ledger(path).rows("SELECT * FROM attempts") == []
    assert Ledger(path).rows("SELECT * FROM runs") == []


def test_a_start_knows_what_earlier_ones_measured(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.sqlite"

    def save() -> None:
        clock.now_s += 20.0

    guard = guarded(clock, run="mine", ledger=path, save=save, save_s=1.0)
    run_loop(guard, clock, lambda _: 2.0, most=10)
    spent_s = guard.close().spent.wall_s
    assert spent_s == 40.0
    with pytest.raises(NotFeasible, match=r"a step takes 2\.\d+ s, a save 2\d\.\d s \(measured by"):
        guarded(clock, run="mine", ledger=path, save=save, save_s=1.0, budget="65usd")
    guarded(clock, run="mine", ledger=path, save=save, save_s=1.0).close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 5}, "budget: 5 is no text"),
        ({"budget": [5]}, "budget: 5 is no text"),
        ({"price_usd_per_h": "3.6"}, "price_usd_per_h: '3.6' is no number"),
        ({"price_usd_per_h": True}, "True is no number"),
        ({"accelerators": "2"}, "accelerators: '2' is no number"),
        ({"accelerators": 1.5}, "1.5 is no whole number"),
        ({"steps": "100"}, "steps: '100' is no number"),
        ({"steps": float("inf")}, "inf is no whole number"),
        ({"steps": 0}, "nothing to guard"),
        ({"started_s": "now"}, "started_s: 'now' is no number"),
        ({"minimum_s": "1h"}, "minimum_s: '1h' is no number"),
        ({"save_s": -1.0}, "a save of -1.0 s makes no sense"),
        ({"keep_s": "1min"}, "keep_s: '1min' is no number"),
        ({"kgco2e_per_kwh": "0.3"}, "kgco2e_per_kwh: '0.3' is no number"),
        ({"energy": 5.0}, "5.0 is no meter of energy"),
        ({"tags": "abc"}, "'abc' is one text"),
        ({"tags": [1]}, "1 is no text"),
        ({"run": 7}, "7 is no name"),
        ({"project": " "}, "' ' is no name"),
        ({"save": "model.pt"}, "'model.pt' cannot be called"),
        ({"say": 1}, "1 cannot be called"),
        ({"ledger": 3}, "3 is no path"),
        ({"ledger": ""}, "no file is named"),
        ({"budgett": "1h"}, "unknown option budgett"),
        ({"project": "nobody"}, "project 'nobody' has no budget"),
    ],
)
def test_rubbish_is_one_error_and_enters_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    path = tmp_path / "ledger.sqlite"
    monkeypatch.setenv("OUTLAY_LEDGER", str(path))
    with pytest.raises(UsageError) as refused:
        guarded(Clock(), **options)
    assert words in refused.value.message()
    assert Ledger(path).rows("SELECT * FROM attempts") == []


@pytest.mark.parametrize("make", [hf_callback, lightning_callback])
def test_a_trainers_callback_is_refused_when_it_is_made(make: Any) -> None:
    with pytest.raises(UsageError, match="unknown option prise_usd_per_h"):
        make("1usd", prise_usd_per_h=3.6)
    with pytest.raises(UsageError, match="steps is the Trainer's own"):
        make("1h", steps=5)
    make("1usd", price_usd_per_h=3.6, minimum_s=60.0)


def test_a_held_ledger_is_waited_for_shortly_at_the_start_and_not_near_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback_account, "OPEN_WAIT_S", 0.1)
    path, clock, said = tmp_path / "ledger.sqlite", Clock(), []
    Ledger(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    guarded(clock, said, ledger=path).close()
    assert "not in the ledger" in said[0] and "locked" in said[0]
    other.execute("ROLLBACK")

    def beats(amount: str, step_s: float) -> list[float]:
        clock, when = Clock(), []
        guard = guarded(clock, said, ledger=path, budget=amount)
        monkeypatch.setattr(
            guard._account._run,
            "heartbeat",
            lambda used, **more: when.append(round(used.wall_s, 6)) or True,
        )
        run_loop(guard, clock, lambda _: step_s)
        return when

    # an entry after three steps and then each ten seconds, none when the end is nearer than a wait
    assert beats("40usd", 1.0) == [3.0, 13.0, 23.0, 33.0]
    assert beats("14usd", 0.3) == [0.9, 11.1]
    assert beats("12usd", 0.3) == [0.9]


def test_what_a_guard_has_cost_before_it_is_entered_and_its_minimum_are_in_the_row(
    tmp_path: Path,
) -> None:
    clock, path = Clock(), tmp_path / "ledger.sqlite"
    Ledger(path).set_budget("p", Budget.parse("100usd"))
    guard = guarded(
        clock, ledger=path, started_s=clock() - 7.0, minimum_s=60.0, budget=(), project="p"
    )
    (row,) = Ledger(path).rows("SELECT * FROM attempts")
    assert (row["wall_s"], row["cost_usd"], row["minimum_s"]) == (7.0, 60.0, 60.0)
    assert Ledger(path).totals("p")[0].spent == 60.0
    guard.close()


@pytest.mark.processes
def test_hugging_face_forces_no_save_that_does_not_fit(tmp_path: Path) -> None:
    """At its last step the Trainer itself orders an evaluation and a save."""
    clock = Clock()
    callback = hf_callback(
        **in_time(clock, 60.0), ledger="off", say=lambda _: None, when_over="cut"
    )
    hugging_face(
        tmp_path / "fits", [costs(clock, 2.0, 4.0, 1.0), callback],
        max_steps=20, save_strategy="steps", save_steps=500, eval_strategy="no",
    )  # fmt: skip
    report = callback.report
    assert (report.state, report.saved, report.spent.wall_s) == ("done", True, 48.0)

    class Stall(type(costs(clock, 0, 0, 0))):  # type: ignore[misc]
        """The 25th step takes 9 s, where 2 s were usual."""

        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            clock.now_s += 9.0 if state.global_step == 24 else 2.0

        def on_save(self, *_: Any, **__: Any) -> None:
            clock.now_s += 4.0

    clock = Clock()
    callback = hf_callback(
        **in_time(clock, 65.0), ledger="off", say=lambda _: None, when_over="cut"
    )
    trainer = hugging_face(
        tmp_path / "late", [Stall(), callback],
        max_steps=400, save_strategy="steps", save_steps=500, eval_strategy="no",
    )  # fmt: skip
    report = callback.report
    assert trainer.state.global_step == 25 == report.steps
    assert report.spent.fraction <= 1.0
    assert (report.saved, report.saved_step) == (False, 3)
    assert sorted(p.name for p in (tmp_path / "late").glob("checkpoint-*")) == ["checkpoint-3"]


@pytest.mark.processes
def test_lightnings_own_checkpoints_are_within_the_budget(tmp_path: Path) -> None:
    import warnings

    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    clock = Clock()

    class Tiny(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            clock.now_s += 24.0 if stall and clock() > 1072.0 else 0.5
            return self.layer(batch[0]).pow(2).mean()

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            clock.now_s += 3.0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=8)
    for stall in (False, True):
        clock.now_s = 1000.0
        name = "stall" if stall else "even"
        callback = lightning_callback(
            **in_time(clock, 100.0), save_to=tmp_path / f"{name}.ckpt", say=lambda _: None,
            ledger="off",
        )  # fmt: skip
        own = ModelCheckpoint(tmp_path / name, every_n_train_steps=50, save_last=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec")
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            trainer = lightning.Trainer(
                max_epochs=100, accelerator="cpu", callbacks=[callback, own], logger=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            )  # fmt: skip
            trainer.fit(Tiny(), data)
        assert clock() - 1000.0 <= 100.0, name
        assert callback.report.state == "budget"
        assert callback.report.saved is not stall, callback.report
        assert (tmp_path / name / "last.ckpt").exists()
        assert PRICE * callback.report.spent.wall_s / 3600 <= 100.0


def test_a_budget_that_ends_with_its_project_says_so(tmp_path: Path) -> None:
    clock, path, said = Clock(), tmp_path / "ledger.sqlite", []
    Ledger(path).set_budget("p", Budget.parse("50usd"))
    guard = guarded(clock, said, ledger=path, project="p")
    run_loop(guard, clock, lambda _: 0.5)
    report = guard.close()
    assert "within 50.00 USD (from project 'p')" in report.reason
    assert "the budget is 50.00 USD (from project 'p')" in said[0]
    with pytest.raises(NotFeasible, match=r"what project 'p' has left, [\d.]+ USD, is too small"):
        guarded(clock, ledger=path, project="p", keep_s=5.0)

"""The loop itself, with an engine of clockwork: what it does when, and that it keeps its budget."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch

from outlay.planner.spec.files import parse, read_mapping
from outlay.planner.spec.job import Budget, Data, Schedule
from outlay.planner.spec.measurement import Measurement, Outcome
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError, UsageError
from outlay.runner import rehearsal, train
from outlay.runner.budget import Meter
from outlay.runner.data.corpus import standard_library_files
from outlay.runner.data.dataset import TokenDataset
from outlay.runner.data.prepare import prepare
from outlay.runner.events import EventLog, read_events
from outlay.runner.folder import RunFolder
from outlay.runner.limits import Limits
from outlay.runner.train import Trainer

VOCAB = 300


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Clockwork:
    """An engine whose steps take clock time and whose loss falls by 0.01 a step."""

    dp_rank, dp_size = 0, 1
    compressor = None
    last_grad_norm = 1.0
    last_expert_use = None

    def __init__(self, clock: Clock, seed: int = 0, **takes_s: float) -> None:
        self.clock, self.draws = clock, random.Random(seed)
        self.takes_s = {"step": 1.0, "save": 2.0, "batch": 0.1, "export": 0.5, **takes_s}
        self.loss = 5.0
        self.rates: list[float] = []
        self.seen: list[torch.Tensor] = []

    def spend(self, what: str) -> None:
        self.clock.now_s += self.takes_s[what] * self.draws.uniform(1.0, 1.2)

    def set_lr(self, lr: float) -> None:
        self.rates.append(lr)

    def train_step(self, batches: list[torch.Tensor]) -> float:
        self.spend("step")
        self.seen += batches
        self.loss -= 0.01
        return self.loss

    def evaluate(self, batches: list[torch.Tensor]) -> float:
        for _ in batches:
            self.spend("batch")
        return self.loss + 0.1

    def gather_state_dict(self) -> dict[str, torch.Tensor]:
        self.spend("export")
        return {}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "data"
    files = [f for f in standard_library_files() if f.stat().st_size < 20_000]
    prepare(files, out, vocab_size=VOCAB, seed=0, max_bytes=200_000)
    return out


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (train, rehearsal):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made))
    monkeypatch.setattr(train, "measure_write_rate", lambda _: 1e6)
    monkeypatch.setattr(train, "Scalars", SilentScalars)
    monkeypatch.setattr(train, "export_safetensors", lambda *_: None)

    def save(engine: Clockwork, root: Path, step: int, state: dict[str, Any]) -> Path:
        engine.spend("save")
        folder = root / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(bytes(1_600_000))
        return folder

    monkeypatch.setattr(train, "save_checkpoint", save)
    return made


class SilentScalars:
    def __init__(self, *_: object, **__: object) -> None: ...
    def add(self, *_: object, **__: object) -> None: ...
    def close(self) -> None: ...


def trainer(
    data: Path,
    folder: Path,
    engine: Clockwork,
    *,
    budget: tuple[Budget, ...] = (),
    startup_s: float = 0.0,
    limits: Limits | None = None,
    **job: Any,
) -> Trainer:
    plan: Plan = ranks.tiny_plan(
        config={"vocab_size": VOCAB},
        dp=1,
        steps=job.pop("steps", 20),
        job={"data": Data(path=str(data)), "eval_sequences": 16, **job},
    )
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, parameters=100_000))
    clock = engine.clock
    meter = Meter(budget, price_usd_per_h=36.0, accelerators=1, started_s=clock(), clock=clock)
    clock.now_s += startup_s
    folder.mkdir(exist_ok=True)
    log = EventLog(folder / "events.jsonl", meter.elapsed_s)
    return Trainer(
        plan,
        RunFolder(folder),
        engine=engine,  # type: ignore[arg-type]
        info=SimpleNamespace(rank=0, world=1),  # type: ignore[arg-type]
        dataset=TokenDataset(data, seq_len=plan.job.seq_len, seed=plan.job.seed),
        meter=meter,
        log=log,
        stop=SimpleNamespace(requested=False),  # type: ignore[arg-type]
        limits=limits,
    )


def happened(folder: Path, *kinds: str) -> list[tuple[str, int | None]]:
    return [(e.kind, e.step) for e in read_events(folder / "events.jsonl") if e.kind in kinds]


def outcome_of(folder: Path) -> Outcome:
    return parse(Outcome, read_mapping(folder / "outcome.json"), path=folder)


def test_saves_and_evaluates_when_asked_and_at_the_end(data, tmp_path, clock) -> None:
    engine = Clockwork(clock)
    assert trainer(data, tmp_path, engine, save_every=8, eval_every=5).run() == 0
    assert happened(tmp_path, "save", "eval", "export") == [
        ("eval", 5), ("save", 8), ("eval", 10), ("eval", 15), ("save", 16),
        ("save", 20), ("export", 20), ("eval", 20),
    ]  # fmt: skip
    outcome = outcome_of(tmp_path)
    assert (outcome.state, outcome.steps, outcome.tokens) == ("done", 20, 20 * 8 * 32)
    assert outcome.train_loss == pytest.approx(4.8)
    assert outcome.heldout_loss == pytest.approx(4.9)
    path = tmp_path / "measurement.json"
    measured = parse(Measurement, read_mapping(path), path=path)
    assert (measured.steps_timed, measured.steps_left_out) == (17, 3)
    assert 1.0 <= measured.step_s <= 1.2
    assert len(engine.rates) == 20


def test_a_signal_saves_and_does_nothing_else(data, tmp_path, clock) -> None:
    made = trainer(data, tmp_path, Clockwork(clock))
    step = made.engine.train_step

    def signalled(batches: list[torch.Tensor]) -> float:
        made.stop.requested = made.step == 6
        return step(batches)

    made.engine.train_step = signalled  # type: ignore[method-assign]
    assert made.run() == 75
    assert happened(tmp_path, "save", "eval", "export") == [("save", 7)]
    assert outcome_of(tmp_path).state == "stopped"


def test_resuming_reads_on_where_the_checkpoint_ends(data, tmp_path, clock) -> None:
    whole = Clockwork(clock)
    trainer(data, tmp_path / "whole", whole).run()
    second = Clockwork(clock)
    made = trainer(data, tmp_path / "second", second)
    state = {"step": 12, "train_loss": 4.88, "data": made._data_identity()}
    made.restore(state, "step-12")
    assert made.run() == 0
    assert happened(tmp_path / "second", "step")[0] == ("step", 13)
    assert all(map(torch.equal, second.seen, whole.seen[-len(second.seen) :]))
    assert second.rates == whole.rates[12:]


def test_a_checkpoint_of_other_data_is_refused(data, tmp_path, clock) -> None:
    made = trainer(data, tmp_path, Clockwork(clock))
    other = {**made._data_identity(), "train_sha256": "0"}
    with pytest.raises(UsageError, match="made with other data"):
        made.restore({"step": 1, "train_loss": 1.0, "data": other}, "step-1")


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, clock) -> None:
    engine = Clockwork(clock)
    engine.loss = float("nan")
    with pytest.raises(OutlayError, match="loss of step 1 is not finite"):
        trainer(data, tmp_path, engine).run()
    (event,) = [e for e in read_events(tmp_path / "events.jsonl") if e.kind == "step"]
    assert event.data["loss"] is None


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_kept_and_used(data, tmp_path, clock, seed) -> None:
    """Random machines; every duration varies by up to a fifth."""
    draws = random.Random(seed)
    limit_s = draws.uniform(200, 800)
    engine = Clockwork(
        clock,
        seed,
        step=draws.uniform(0.1, 2.0),
        save=draws.uniform(0.1, 6.0),
        batch=draws.uniform(0.01, 0.5),
        export=draws.uniform(0.0, 0.5),
    )
    budget = Budget(kind="money", amount=36.0 * limit_s / 3600)
    made = trainer(
        data,
        tmp_path,
        engine,
        budget=(budget,),
        startup_s=draws.uniform(5, 40),
        steps=1_000_000,
        eval_every=draws.choice([None, 30]),
        save_every=draws.choice([None, 50]),
    )
    assert made.run() == 4
    outcome = outcome_of(tmp_path)
    assert outcome.cost_usd is not None
    assert outcome.cost_usd <= budget.amount
    assert outcome.cost_usd >= 0.9 * budget.amount
    assert happened(tmp_path, "save")[-1] == ("save", outcome.steps)
    assert outcome.heldout_loss is not None
    assert outcome.export is not None


def test_the_rate_reaches_its_end_within_the_money(data, tmp_path, clock) -> None:
    """Of 1,000 steps the budget holds about 180; the resumed run goes on where it stood."""
    schedule = Schedule(warmup_steps=10, final_fraction=0.0)
    budget = (Budget(kind="hours", amount=220 / 3600),)
    engine = Clockwork(clock)
    made = trainer(data, tmp_path, engine, budget=budget, steps=1000, schedule=schedule)
    assert made.run() == 4
    assert 150 < outcome_of(tmp_path).steps < 200
    assert max(engine.rates) == pytest.approx(made.job.optimizer.lr, rel=0.05)
    assert engine.rates[-1] < 0.01 * made.job.optimizer.lr
    messages = [
        e.data["message"] for e in read_events(tmp_path / "events.jsonl") if e.kind == "warning"
    ]
    ends = [m for m in messages if "the learning rate now ends within it" in m]
    assert 1 <= len(ends) <= 4
    assert [m[:3] for m in messages if "of the budget is used" in m] == ["50%", "80%", "95%"]


def test_cut_keeps_the_planned_rate(data, tmp_path, clock) -> None:
    engine = Clockwork(clock)
    made = trainer(
        data,
        tmp_path,
        engine,
        budget=(Budget(kind="hours", amount=220 / 3600),),
        steps=1000,
        limits=Limits(when_over="cut"),
    )
    assert made.run() == 4
    assert engine.rates[-1] > 0.9 * made.job.optimizer.lr


def test_stop_ends_at_the_forecast_and_keeps_the_money(data, tmp_path, clock) -> None:
    made = trainer(
        data,
        tmp_path,
        Clockwork(clock),
        budget=(Budget(kind="hours", amount=400 / 3600),),
        steps=1000,
        limits=Limits(when_over="stop"),
    )
    assert made.run() == 4
    outcome = outcome_of(tmp_path)
    assert outcome.steps < 80
    assert outcome.checkpoint is not None
    assert "stopped for its forecast" in outcome.reason
    assert "--when-over anneal" in outcome.reason


def test_a_wall_time_stops_and_saves_in_time(data, tmp_path, clock) -> None:
    made = trainer(
        data, tmp_path, Clockwork(clock), steps=1000, startup_s=20.0, limits=Limits(walltime_s=120)
    )
    assert made.run() == 75
    assert 110 < clock.now_s - 100 <= 120
    assert happened(tmp_path, "save", "eval") == [("save", 3), ("save", outcome_of(tmp_path).steps)]


def test_the_first_save_comes_early_under_a_budget(data, tmp_path, clock) -> None:
    budget = (Budget(kind="hours", amount=100 / 3600),)
    assert trainer(data, tmp_path, Clockwork(clock), budget=budget, steps=10).run() == 0
    assert happened(tmp_path, "save") == [("save", 3), ("save", 10)]


def test_what_the_budget_has_no_time_for_is_left_out_and_said(data, tmp_path, clock) -> None:
    """The last step takes twenty times what any before it did."""
    engine = Clockwork(clock, batch=2.0, export=0.1)
    made = trainer(
        data, tmp_path, engine, budget=(Budget(kind="hours", amount=100 / 3600),), steps=1_000_000
    )
    step = engine.train_step

    def slow(batches: list[torch.Tensor]) -> float:
        if made.meter.remaining_s() < 25:
            clock.now_s += 14
        return step(batches)

    engine.train_step = slow  # type: ignore[method-assign]
    assert made.run() == 4
    assert clock.now_s - 100 <= 100
    outcome = outcome_of(tmp_path)
    assert outcome.heldout_loss is None
    assert outcome.checkpoint is not None
    messages = [
        e.data["message"] for e in read_events(tmp_path / "events.jsonl") if e.kind == "warning"
    ]
    assert any("held-out evaluation is left out" in m for m in messages)


def test_a_budget_that_ends_before_the_first_step_saves_what_there_is(
    data, tmp_path, clock
) -> None:
    budget = (Budget(kind="hours", amount=12 / 3600),)
    made = trainer(data, tmp_path, Clockwork(clock, save=1.0), budget=budget, startup_s=3.0)
    made.bounds.step.guess(30.0)
    assert made.run() == 4
    outcome = outcome_of(tmp_path)
    assert outcome.steps == 0
    assert outcome.checkpoint is not None

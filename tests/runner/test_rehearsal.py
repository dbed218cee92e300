"""What is tried early, so that the room for the end is measured; a short export and a few batches."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from outlay.planner.spec.job import Budget
from outlay.runner import rehearsal
from outlay.runner.budget import Meter, UpperBound
from outlay.runner.rehearsal import SCRATCH, evaluate_within, try_evaluation, try_export
from outlay.runner.votes import Votes


def test_a_short_export_is_timed_and_leaves_nothing(tmp_path: Path) -> None:
    wrote: list[Path] = []

    def export(folder: Path) -> bool:
        folder.mkdir()
        (folder / "weights").touch()
        wrote.append(folder)
        return True

    bound = UpperBound(0.8)
    try_export(export, bound, tmp_path, Votes(1), lead=True)
    assert bound.measured and bound.upper_s() < 0.8
    assert wrote == [tmp_path / SCRATCH] and list(tmp_path.iterdir()) == []
    # once is enough; a long one is not tried, and only rank 0 says
    try_export(export, bound, tmp_path, Votes(1), lead=True)
    try_export(export, UpperBound(5.0), tmp_path, Votes(1), lead=True)
    try_export(export, UpperBound(0.8), tmp_path, Votes(1), lead=False)
    assert len(wrote) == 1


def test_an_evaluation_is_guessed_from_a_few_batches_after_the_first() -> None:
    waits = iter([0.5, 0.03])
    bound = UpperBound(9.0)
    try_evaluation(lambda count: time.sleep(next(waits)), 10, bound)
    assert 0.1 < bound.upper_s() < 3.0  # ten of 0.01 s and more; with the first they were above 1.6
    bound.add(1.0)
    try_evaluation(lambda count: next(waits), 10, bound)


@pytest.mark.parametrize(("limit_s", "loss"), [(100.0, 4.5), (5.0, None)])
def test_an_evaluation_that_is_slower_than_it_was_gives_up_in_time(
    limit_s: float, loss: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(monotonic=lambda: now.s))
    limit = Budget(kind="hours", amount=limit_s / 3600)
    meter = Meter([limit], price_usd_per_h=None, accelerators=1, started_s=0.0, clock=lambda: now.s)

    def evaluate(index: int) -> float:
        now.s += 0.9
        return float(index)

    assert evaluate_within(evaluate, 10, meter, Votes(1), lead=True) == loss
    assert now.s <= limit_s

"""benchmarks/runner.py compares what it says it compares; how fast anything is, no test says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.runner import CASES, NAMES, Contender, lower_bound, plan_of
from benchmarks.runner_loops import LOOPS, labels_of
from outlay.runner.fit import check_rules
from outlay.runner.refuse import refuse


@pytest.mark.parametrize(("name", "size", "zero"), CASES)
def test_the_runner_takes_its_plans(tmp_path: Path, name: str, size: object, zero: int) -> None:
    plan = plan_of(size, zero, 2, "fp32", tmp_path)  # type: ignore[arg-type]
    check_rules(plan)
    refuse(plan, 2, "cpu")
    assert plan.strategy.zero == zero
    assert plan.job.save_every == plan.job.steps, name


def test_there_is_a_loop_for_each_that_it_names() -> None:
    assert ("outlay", *LOOPS) == NAMES


def test_the_bound_lies_below_the_median_and_knows_no_spread_where_there_is_none() -> None:
    assert lower_bound([1.02] * 8) == (1.02, 1.02)
    median, lower = lower_bound([0.9, 1.0, 1.0, 1.1, 1.2])
    assert median == 1.0
    assert 0.9 <= lower < median


def test_the_loss_is_that_of_all_tokens_but_the_first() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    assert labels_of(ids).tolist() == [[-100, 6, 7], [-100, 9, 1]]
    assert ids[0, 0] == 5


def test_steps_and_losses_are_told_apart(tmp_path: Path) -> None:
    """A line that is being written is left for the next look."""
    one = object.__new__(Contender)
    one.name, one.losses, one._position, one._file = "trainer", [], 0, tmp_path / "stamps"
    assert one.new_steps() == []
    one._file.write_text("loss 4.5\nstep 10.0\nstep 10.5\nst")
    assert one.new_steps() == [10.0, 10.5]
    assert one.losses == [4.5]
    with one._file.open("a") as file:
        file.write("ep 11.0\n")
    assert one.new_steps() == [11.0]

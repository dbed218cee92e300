"""Warm-up, decay, end: what the learning rate is at the steps that matter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.spec.job import Schedule
from outlay.profiles.errors import UsageError
from outlay.runner.schedule import Decay, check_schedule, learning_rate


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate(schedule, 1.0, step, steps) for step in range(steps)]


def test_warm_up_reaches_the_peak_and_never_starts_at_zero() -> None:
    values = rates(Schedule(name="constant", warmup_steps=4), 10)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0] + 6 * [1.0])


@pytest.mark.parametrize(
    ("name", "middle"), [("linear", 1 - 0.9 * 0.5), ("cosine", 0.1 + 0.9 * 0.5)]
)
def test_decay_is_half_way_in_the_middle_and_ends_at_the_final_fraction(name, middle) -> None:
    values = rates(Schedule(name=name, warmup_steps=10, final_fraction=0.1), 110)
    assert values[59] == pytest.approx(middle)
    assert values[-1] == pytest.approx(0.1)


@given(
    name=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    final=st.floats(0, 1),
)
def test_rises_then_never_rises_again(name, steps, warmup, final) -> None:
    warmup = min(warmup, steps)
    values = rates(Schedule(name=name, warmup_steps=warmup, final_fraction=final), steps)
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    assert values[:warmup] == sorted(values[:warmup])
    after = values[max(0, warmup - 1) :]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


def test_wsd_is_stable_and_then_falls_in_a_straight_line() -> None:
    how = Schedule(name="wsd", warmup_steps=10, final_fraction=0.0, decay_fraction=0.2)
    values = rates(how, 110)
    assert values[9:90] == pytest.approx([1.0] * 81)
    assert values[90:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


@pytest.mark.parametrize(
    "bad",
    [{"warmup_steps": 11}, {"warmup_steps": -1}, {"final_fraction": 2}, {"decay_fraction": 0.0}],
)
def test_nonsense_is_refused(bad) -> None:
    with pytest.raises(UsageError):
        check_schedule(Schedule(**bad), 10)


@given(
    name=st.sampled_from(["linear", "cosine", "wsd"]),
    steps=st.integers(20, 300),
    warmup=st.integers(0, 60),
    ends=st.lists(st.integers(2, 300), min_size=300, max_size=300),
)
def test_however_the_end_moves_the_rate_falls_and_reaches_it(name, steps, warmup, ends) -> None:
    """The last end that is told is the one that is reached, with no rise after the warm-up."""
    schedule = Schedule(name=name, warmup_steps=min(warmup, steps), final_fraction=0.05)
    decay = Decay(schedule, 1.0, steps)
    seen: list[float] = []
    step, end = 0, steps
    while step < end:
        if step % 7 == 3:
            end = max(step + 1, min(steps, ends[step]))
            decay.retarget(step, end)
        seen.append(decay.rate(step))
        step += 1
    top = seen.index(max(seen))
    assert all(a >= b - 1e-12 for a, b in pairwise(seen[top:]))
    if decay.anchor_step < end:
        assert seen[-1] == pytest.approx(0.05 * decay.reached)


def test_a_schedule_that_never_changes_is_the_plain_one_and_survives_a_checkpoint() -> None:
    schedule = Schedule(warmup_steps=7)
    decay = Decay(schedule, 3e-4, 100)
    assert [decay.rate(i) for i in range(100)] == [
        learning_rate(schedule, 3e-4, i, 100) for i in range(100)
    ]
    decay.retarget(40, 60)
    again = Decay(schedule, 3e-4, 100)
    again.restore(decay.state(), 50, 60)
    assert [again.rate(i) for i in range(50, 60)] == [decay.rate(i) for i in range(50, 60)]

"""Schedules of torch and transformers that end earlier than they were made for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedulers
from transformers import get_scheduler

from outlay.runner.reshape import Reshaper, unfit

STEPS = 100


def optimizer() -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def linear(opt: SGD) -> Any:
    return get_scheduler("linear", opt, num_warmup_steps=10, num_training_steps=STEPS)


MADE = {
    "linear": linear,
    "cosine": lambda o: get_scheduler("cosine", o, 10, STEPS),
    "cosine to a minimum": lambda o: get_scheduler(
        "cosine_with_min_lr", o, 10, STEPS, scheduler_specific_kwargs={"min_lr": 0.01}
    ),
    "warm-up, stable, decay": lambda o: get_scheduler(
        "warmup_stable_decay", o, 10, STEPS, scheduler_specific_kwargs={"num_decay_steps": 20}
    ),
    "torch's cosine": lambda o: torch_schedulers.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: torch_schedulers.OneCycleLR(o, 1.0, total_steps=STEPS + 1),
    "polynomial": lambda o: torch_schedulers.PolynomialLR(o, STEPS),
}  # fmt: skip


def walk(scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("name", MADE)
def test_the_rate_has_no_jump_and_ends_at_the_new_end(name: str) -> None:
    planned = walk(MADE[name](optimizer()), STEPS)
    scheduler = MADE[name](optimizer())
    reshaper = Reshaper([scheduler], STEPS)
    before = walk(scheduler, 40)
    assert before == pytest.approx(planned[:40])
    reshaper.retarget(40, 60)
    reshaper.retarget(40, 60)
    after = walk(scheduler, 20)
    # at three times the pace through what is left of the same shape
    assert after == pytest.approx([planned[39 + 3 * i] for i in range(1, 21)], abs=1e-6)
    assert after[-1] == pytest.approx(planned[-1], abs=1e-6)


def test_an_end_that_moves_and_moves_back_gives_the_planned_rate_of_what_is_left() -> None:
    scheduler = linear(optimizer())
    reshaper = Reshaper([scheduler], STEPS)
    walk(scheduler, 20)
    for step, end in zip(range(20, 50), [70, 65, 90, 100, 60] * 6, strict=True):
        reshaper.retarget(step, end)
        walk(scheduler, 1)
    reshaper.retarget(50, 55)
    rates = walk(scheduler, 5)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_checkpoint_holds_it_and_a_later_process_goes_on() -> None:
    scheduler = linear(optimizer())
    reshaper = Reshaper([scheduler], STEPS)
    walk(scheduler, 30)
    reshaper.retarget(30, 50)
    walk(scheduler, 5)
    state = scheduler.state_dict()
    assert torch.equal(torch.tensor(state["outlay_course"]), torch.tensor([30.0, 30, 100, 50]))
    later = linear(optimizer())
    later.load_state_dict(state)
    reshaper = Reshaper([later], STEPS - 35)
    assert walk(later, 3) == pytest.approx(walk(scheduler, 3))
    reshaper.retarget(3, 8)
    assert walk(later, 5)[-1] == pytest.approx(0.0, abs=1e-9)


def test_one_that_is_stepped_by_every_process_ends_in_time() -> None:
    scheduler = get_scheduler("linear", optimizer(), 0, 2 * STEPS)
    reshaper = Reshaper([scheduler], STEPS)
    walk(scheduler, 2 * 40)
    reshaper.retarget(40, 50)
    rates = walk(scheduler, 2 * 10)
    assert rates[-2] > 0 and math.isclose(rates[-1], 0.0, abs_tol=1e-9)


def test_what_cannot_be_reshaped_is_said() -> None:
    opt = optimizer()
    plateau = torch_schedulers.ReduceLROnPlateau(opt)
    restarts = torch_schedulers.CosineAnnealingWarmRestarts(opt, 10)
    assert "ReduceLROnPlateau" in (unfit([plateau]) or "")
    assert "depends on more than the step" in (unfit([restarts]) or "")
    assert unfit([]) == "there is no scheduler"
    assert unfit([object()]) is not None
    assert unfit([linear(opt), torch_schedulers.StepLR(opt, 3)]) is None

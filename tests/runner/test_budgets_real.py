"""Twelve real runs, each under other limits: none above, none far below. The long form."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_launch import data, small_plan  # noqa: F401

from outlay.planner.spec.job import Budget
from outlay.profiles.units import parse_seconds
from outlay.runner.launch import run_plan
from outlay.runner.limits import Limits

POWER_W, CARBON = 200.0, 0.4
FULL_KWH_PER_S = POWER_W * 1.2 / 1e3 / 3600
CASES = [
    (("40s",), "anneal"),
    (("0.04usd",), "anneal"),
    (("0.025gpuh",), "cut"),
    ((f"{45 * FULL_KWH_PER_S}kWh",), "anneal"),
    ((f"{45 * FULL_KWH_PER_S * CARBON}kgCO2e",), "cut"),
    (("1usd", "38s"), "anneal"),
    (("0.05usd", "1h", "1gpuh"), "cut"),
    (("0.05usd", f"{60 * FULL_KWH_PER_S}kWh"), "anneal"),
    (("35s",), "cut"),
    (("60s",), "anneal"),
    (("0.06usd", "2gpuh"), "anneal"),
    (("50s", "1kWh", "1kgCO2e"), "anneal"),
]


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize(("texts", "policy"), CASES)
def test_a_real_run_keeps_and_uses_its_budget(data: Path, tmp_path: Path, texts, policy) -> None:  # noqa: F811
    budgets = tuple(Budget.parse(text) for text in texts)
    plan = small_plan(data, steps=1_000_000, budget=budgets)
    limits = Limits(when_over=policy, power_w=POWER_W, pue=1.2, kgco2e_per_kwh=CARBON)
    outcome = run_plan(plan, tmp_path / "run", limits=limits)
    assert outcome.exit_code == 4, outcome.reason
    used = {
        "hours": outcome.wall_s / 3600,
        "money": outcome.cost_usd,
        "gpu_hours": 2 * outcome.wall_s / 3600,
        "energy": outcome.energy_kwh,
        "carbon": outcome.co2e_kg,
    }
    parts = [used[b.kind] / b.amount for b in budgets]
    print(f"{texts} {policy}: {max(parts):.4f} used in {outcome.steps} steps")
    assert max(parts) <= 1.0
    assert max(parts) >= 0.93
    assert outcome.checkpoint is not None


@pytest.mark.long
@pytest.mark.processes
def test_a_wall_time_ends_in_time_and_a_chain_goes_on_under_one_budget(
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    plan = small_plan(data, steps=1_000_000, budget=(Budget.parse("75s"),))
    limits = Limits(walltime_s=parse_seconds("35s"))
    codes, began_s = [], time.monotonic()
    for attempt in range(4):
        at_s = time.monotonic()
        outcome = run_plan(plan, tmp_path / "run", resume=attempt > 0, limits=limits)
        codes.append(outcome.exit_code)
        assert time.monotonic() - at_s <= 35
        if outcome.exit_code != 75:
            break
    assert codes in ([75, 75, 4], [75, 75, 75, 4]), codes
    assert outcome.wall_s <= 75
    assert time.monotonic() - began_s <= 80

"""--optimizer, --schedule and their numbers over what a job file says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from outlay.planner.spec.files import parse
from outlay.planner.spec.job import Optimizer, Schedule

CAPPED_FAMILY = "gemma2"
"""Whose attention scores are capped: no sdpa."""
_OPTIMIZER = {
    "optimizer_lr": "lr",
    "optimizer_momentum": "momentum",
    "optimizer_adam_lr": "adam_lr",
}
_SCHEDULE = {"schedule": "name", "schedule_warmup_steps": "warmup_steps"}


def take_method_flags(
    flags: dict[str, Any], optimizer: Optimizer | str | None, schedule: Schedule | None
) -> dict[str, Any]:
    """`optimizer` and `schedule` as the flags change them; the flags are taken out of `flags`."""
    found: dict[str, Any] = {}
    numbers = {key: flags.pop(flag) for flag, key in _OPTIMIZER.items() if flag in flags}
    named = flags.pop("optimizer", None)
    if named is not None or numbers:
        # another optimizer's numbers are not this one's
        base = optimizer if named is None else named
        start = (
            parse(Optimizer, {"name": base}, path="optimizer") if isinstance(base, str) else base
        )
        found["optimizer"] = dataclasses.replace(start or Optimizer(), **numbers)
    shape = {key: flags.pop(flag) for flag, key in _SCHEDULE.items() if flag in flags}
    if shape:
        found["schedule"] = dataclasses.replace(schedule or Schedule(), **shape)
    return found

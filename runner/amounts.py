"""What a budget counts: in words for a person, and whether anything here measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_seconds, format_usd

if TYPE_CHECKING:
    from outlay.runner.budget import Meter


def in_unit(budget: Budget, amount: float) -> str:
    """An amount of what a budget counts, for a person."""
    match budget.kind:
        case "money":
            return format_usd(amount)
        case "hours":
            return format_seconds(amount * 3600)
        case "gpu_hours":
            return f"{amount:.4g} GPU-hours"
        case "energy":
            return f"{amount:.4g} kWh"
        case _:
            return f"{amount:.4g} kg CO2e"


def check_metered(budget: Budget, meter: Meter) -> None:
    """A budget that nothing measures cannot be kept."""
    price = meter.price_usd_per_h
    if budget.kind == "money" and (price is None or not price > 0):
        raise UsageError(
            f"a budget of {budget} needs a price, and none is known for this hardware",
            do="give --price-usd-per-h, or a budget in hours",
        )
    if budget.kind in ("energy", "carbon") and meter.energy is None:
        raise UsageError(
            f"a budget of {budget} needs a meter of energy, and this machine has none",
            why="no GPU with NVML, RAPL is not readable, and its power limit is not known",
            do="give --power-w, what all of this machine draws at most, or a budget in hours",
        )
    if budget.kind == "carbon" and meter.kgco2e_per_kwh is None:
        raise UsageError(
            f"a budget of {budget} needs the carbon intensity of the electricity",
            do="give --region (as in `profiles/carbon.csv`) or --kgco2e-per-kwh",
        )

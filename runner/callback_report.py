"""What a guarded training was predicted to take, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlay.profiles.units import format_seconds
from outlay.runner.budget import Spent
from outlay.runner.forecast import Forecast

SCHEMA_REPORT = "outlay/guard@1"
FORECAST_AT = 0.2
"""Of the steps: the forecast that the report keeps."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was predicted and what came: `outlay-report.json`."""

    state: Literal["done", "budget", "stopped"]
    reason: str
    steps: int
    """Done by this process."""
    spent: Spent
    """By all attempts of the run."""
    step_s: float | None
    """Mean of the timed steps, saves and evaluations included; null = too few."""
    predicted_step_s: tuple[float, float, float] | None
    """Low, expected, high of the plan; null without a plan."""
    forecast: Forecast | None
    """Of the whole run's wall time, at 20 % of the steps; null = the number of steps is not known."""
    saved: bool
    """The last step is in a checkpoint that the guard knows of."""
    saved_step: int | None = None
    """Of this process, the last that is in one; null = none is."""
    schema: str = SCHEMA_REPORT

    def text(self) -> str:
        """For a person."""
        lines = [f"outlay: {self.state}: {self.reason}; {self.steps:,} steps, {_spent(self.spent)}"]
        if self.predicted_step_s is not None and self.step_s is not None:
            low, mid, high = (format_seconds(s) for s in self.predicted_step_s)
            off = self.step_s / self.predicted_step_s[1] - 1
            lines.append(
                f"  step {format_seconds(self.step_s)}, predicted {mid} ({low} to {high}): {off:+.0%}"
            )
        if self.forecast is not None:
            f = self.forecast
            low, mid, high = (format_seconds(s) for s in (f.low_s, f.expected_s, f.high_s))
            lines.append(
                f"  forecast at {FORECAST_AT:.0%} of the steps, for all: {mid} ({low} to {high}); "
                f"used {format_seconds(self.spent.wall_s)}"
            )
        lines.append("  metered until here: what this process does from now on is not counted")
        return "\n".join(lines)


def _spent(spent: Spent) -> str:
    parts = [format_seconds(spent.wall_s)]
    if spent.cost_usd is not None:
        parts.append(f"{spent.cost_usd:.4g} USD")
    if spent.energy_kwh is not None:
        parts.append(f"{spent.energy_kwh:.4g} kWh")
    used = "" if spent.fraction is None else f", {spent.fraction:.1%} of the budget"
    return " and ".join(parts) + used

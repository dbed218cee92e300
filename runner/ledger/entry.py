"""What an attempt enters in the ledger, what it asks of its project, and how a project stands."""

from __future__ import annotations

from dataclasses import dataclass

from outlay.planner.spec.job import Budget, BudgetKind


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of an attempt when it starts."""

    run: str
    """The same for all attempts of one run: its folder, or a name."""
    user: str
    project: str | None = None
    tags: tuple[str, ...] = ()
    tool: str = "run"
    machine: str
    accelerator: str | None = None
    accelerators: int = 1
    price_usd_per_h: float | None = None
    price_source: str | None = None
    predicted_s: tuple[float, float, float] | None = None
    """Low, expected, high of the whole run."""
    predicted_usd: float | None = None
    elapsed_s: float = 0.0
    """Since the attempt began, when it is entered: its start was rented, too."""
    minimum_s: float = 0.0
    """Shortest time that is billed."""
    upper_kw: float | None = None
    """At most so much power, PUE included; null = not known."""
    kgco2e_per_kwh: float | None = None

    def known(self) -> dict[str, float | None]:
        """The columns of what an attempt has used when it is entered, should nothing follow."""
        price, hours = self.price_usd_per_h, self.elapsed_s / 3600
        kwh = None if self.upper_kw is None else self.upper_kw * hours
        return {
            "wall_s": self.elapsed_s,
            "cost_usd": None if price is None else price * max(hours, self.minimum_s / 3600),
            "gpu_hours": hours * self.accelerators,
            "energy_kwh": kwh,
            "co2e_kg": None
            if kwh is None or self.kgco2e_per_kwh is None
            else kwh * self.kgco2e_per_kwh,
        }


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a step and a save of an attempt took at most, with a margin; null = not measured."""

    step_s: float | None = None
    save_s: float | None = None


NOT_KNOWN = Took()


@dataclass(frozen=True, kw_only=True)
class Want:
    """What an attempt asks of one budget of its project."""

    kind: BudgetKind
    amount: float | None
    """Null = all that is left."""
    least: float = 0.0
    """Less is refused."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """How a project budget stands."""

    budget: Budget
    charged: float
    """Spent and reserved, in the unit of the budget."""
    spent: float
    alive: int
    """Attempts that hold a reservation now."""

    @property
    def left(self) -> float:
        return max(0.0, self.budget.amount - self.charged)

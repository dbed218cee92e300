"""`RUN/limits.json`: how a run is metered and what it does at its limits, apart from the plan."""

from __future__ import annotations

import getpass
import math
import os
from dataclasses import dataclass, field

from outlay.planner.project_cost import usual
from outlay.planner.spec.job import Budget
from outlay.profiles.errors import UnknownName, UsageError
from outlay.runner.control import Policy

SCHEMA_LIMITS = "outlay/limits@1"


def _user() -> str:
    """Who pays: the login name, or the number where a container has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Set by the flags of `run` and `resume`; ranks read them."""

    when_over: Policy = "anneal"
    """What is done when the forecast exceeds the budget."""
    walltime_s: float | None = None
    """Of one attempt: a queue ends it after so long."""
    minimum_s: float = 0.0
    """Shortest time that is billed for an attempt."""
    power_w: float | None = None
    """Most that all of this machine draws; null = what the hardware says."""
    pue: float | None = None
    """Power of the whole building over that of the machine; null = the planner's assumption."""
    kgco2e_per_kwh: float | None = None
    carbon_source: str | None = None
    user: str = field(default_factory=_user)
    project: str | None = None
    tags: tuple[str, ...] = ()
    ledger: str | None = None
    """The ledger's file, or `off`; null = OUTLAY_LEDGER, or the user's own."""
    drawn: tuple[Budget, ...] = ()
    """What the project's budgets allow this run, beside the plan's own budgets."""
    schema: str = SCHEMA_LIMITS

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--walltime", self.walltime_s, 0.0),
            ("--power-w", self.power_w, 0.0),
            ("--kgco2e-per-kwh", self.kgco2e_per_kwh, 0.0),
        ):
            if value is not None and not least < value < math.inf:
                raise UsageError(f"{value:g} makes no sense", where=flag, do="give more than 0")
        if self.pue is not None and not 1 <= self.pue < 10:
            raise UsageError(f"{self.pue:g} makes no sense", where="--pue", why="it is at least 1")
        if self.ledger is not None and not self.ledger.strip():
            raise UsageError("no file is named", where="--ledger", do="give its path, or `off`")
        if not 0 <= self.minimum_s < math.inf:
            raise UsageError(f"{self.minimum_s:g} s makes no sense", where="--minimum-billing")

    def used_pue(self) -> tuple[float, str]:
        """(PUE, where it is from)."""
        if self.pue is not None:
            return self.pue, "--pue"
        assumed = usual().pue
        return assumed.expected, f"assumed ({assumed.source})"


def carbon_of_region(region: str) -> tuple[float, str]:
    """(kg CO2e a kWh, where it is from)."""
    from outlay.profiles.offers import carbon_intensities

    known = carbon_intensities()
    if region not in known:
        raise UnknownName("region", region, known, where="--region")
    row = known[region]
    return row.gco2e_per_kwh / 1e3, f"{region}, {row.basis}, {row.year}: {row.source}"

"""What a run says about its compression: events as it goes, and how it stands at the end."""

from __future__ import annotations

from typing import Any

from outlay.runner.compress.training import Compressor
from outlay.runner.events import EventLog

EVENT = "compress"


class Progress:
    """Steers the compressor of a run, where it has one, and writes what changes (rank 0)."""

    def __init__(self, compressor: Compressor | None, log: EventLog, *, lead: bool) -> None:
        self.compressor, self.log, self.lead = compressor, log, lead
        self.report: dict[str, Any] | None = None
        """How it stood at the end: the zeros, counted; null where nothing is pruned."""

    def before_step(self, step: int, total: int) -> None:
        """`step` of `total` (from 0) is next. Collective."""
        changed = self.compressor.before_step(step, total) if self.compressor is not None else {}
        if changed and self.lead:
            self.log.write(EVENT, step + 1, **changed)

    def at_end(self, step: int) -> None:
        """Count the zeros by matrix and in all, and say so. Collective."""
        report = self.compressor.report() if self.compressor is not None else {}
        if not report:
            return
        self.report = report
        if self.lead:
            self.log.write(EVENT, step, **report)
            if report["zeros"] < report["wanted"]:
                self.log.write("warning", step, message=_short_of(report))


def _short_of(report: dict[str, Any]) -> str:
    return (
        f"{report['zeros']:,} of {report['weights']:,} weights are zero, {report['sparsity']:.2%}, where "
        f"{report['asked']:.2%} were asked for: the run ended before its last masks were chosen"
    )

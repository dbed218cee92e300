"""Short tries of what comes after the last step, so that the room that is kept for it is measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from outlay.runner.budget import SHUTDOWN_S, Meter, UpperBound
from outlay.runner.votes import Votes

EXPORT_UPPER_S = 1.0
"""Upper bound of an export that is tried: a guess is 1.5 times its time and half a second, a timed
one 1.3 times and 0.1 s, so that the try costs less than the room it gives back up to about 0.3 s."""
TRIED_BATCHES = 3
EVALUATION_MARGIN = 0.15
"""Over the root of the tried batches; small, for the last evaluation gives up in time by itself."""
SCRATCH = ".export-rehearsal"


def try_export(
    export: Callable[[Path], bool], bound: UpperBound, folder: Path, votes: Votes, *, lead: bool
) -> None:
    """Export, time it and drop it, where rank 0's bound says that this is short."""
    cheap = lead and not bound.measured and bound.upper_s() <= EXPORT_UPPER_S
    if votes.largest(int(cheap)) == [0]:
        return
    began_s = time.monotonic()
    wrote = export(folder / SCRATCH)
    bound.add(time.monotonic() - began_s)
    if wrote:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def evaluate_within(
    evaluate: Callable[[int], float], batches: int, meter: Meter, votes: Votes, *, lead: bool
) -> float | None:
    """Mean loss of all held-out batches, one by one; null where the budget ends before the last."""
    longest_s, losses = 0.0, []
    for index in range(batches):
        short = lead and not meter.affords(1.3 * longest_s + SHUTDOWN_S)
        if votes.largest(int(short)) == [1]:
            return None
        began_s = time.monotonic()
        losses.append(evaluate(index))
        longest_s = max(longest_s, time.monotonic() - began_s)
    return sum(losses) / len(losses)


def try_evaluation(evaluate: Callable[[int], object], batches: int, bound: UpperBound) -> None:
    """Time a few held-out batches, after a first: evaluation is bounded by them until one was done."""
    if bound.measured:
        return
    evaluate(1)
    began_s, tried = time.monotonic(), min(TRIED_BATCHES, batches)
    evaluate(tried)
    each_s = (time.monotonic() - began_s) / tried
    bound.guess((1 + EVALUATION_MARGIN / tried**0.5) * batches * each_s + 0.05)

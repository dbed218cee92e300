"""What a run's own events say of its speed: the least that a start must hold beside the start itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

TAIL_BYTES = 2**18
"""Of the events, the latest: a thousand steps."""


def least_work_s(events: Path) -> float:
    """Seconds of the shortest step and the shortest save that are noted; 0 where none is.

    One of each is the least that a start can be for: with less nothing new would be kept.
    """
    shortest: dict[str, float] = {}
    for line in _tail(events):
        try:
            event = json.loads(line)
            took_s = float(event["data"][{"step": "step_s", "save": "save_s"}[event["kind"]]])
        except (ValueError, KeyError, TypeError):  # another kind, or a line that was torn
            continue
        shortest[event["kind"]] = min(took_s, shortest.get(event["kind"], took_s))
    return sum(shortest.values())


def _tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES))
            return handle.read().splitlines()
    except OSError:
        return []

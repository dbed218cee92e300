"""Whether the process of an attempt still lives. No wall clock is read: one that jumps breaks nothing.

In the same boot and PID namespace the kernel answers: a process is its number and its start time.
Elsewhere (another container, another machine) an attempt is over when its count of heartbeats has not
changed while a watcher's own monotonic clock went on by LEASE_S.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEASE_S = 60.0
"""Without a heartbeat for so long, an attempt that cannot be asked after is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that the kernel can be asked after."""

    space: str
    """Boot and PID namespace: only within one do process numbers mean the same."""
    pid: int
    ticks: int
    """Its start, in the kernel's ticks since boot: numbers are used again, pairs are not."""

    def known_dead(self) -> bool | None:
        """None = this process cannot tell."""
        if self.space != here():
            return None
        ticks = process_ticks(self.pid)
        if ticks is None and _hidden(self.pid):
            return None
        return ticks != self.ticks


@cache
def here() -> str:
    """This boot and PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        # without /proc nothing can be asked after; no other process must share the name
        return f"unknown {os.getpid()} {time.monotonic_ns()}"
    return f"{boot} {namespace}"


def process_ticks(pid: int) -> int | None:
    """When a living process began; None for none, and for one that is only waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    state, *rest = fields.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _hidden(pid: int) -> bool:
    """/proc may be mounted so that other users' processes do not show; signals still find them."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def this_process() -> Owner:
    return Owner(space=here(), pid=os.getpid(), ticks=process_ticks(os.getpid()) or 0)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a watcher has last seen of an attempt that it cannot ask after."""

    watcher: str
    beats: int
    since_s: float
    """On the watcher's monotonic clock, when it first saw that count."""

    def over(self, beats: int, now_s: float) -> tuple[bool, Watch]:
        """(whether the attempt is taken for dead, what to note instead)."""
        if self.watcher != here() or self.beats != beats or now_s < self.since_s:
            return False, Watch(watcher=here(), beats=beats, since_s=now_s)
        return now_s - self.since_s > LEASE_S, self

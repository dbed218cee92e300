"""What a rank can say about itself: memory, and the Measurement of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from outlay.planner.spec.measurement import Measurement
from outlay.planner.spec.plan import Plan
from outlay.runner.events import utc_now

_PACKAGES = ("outlay", "torch", "deepspeed", "transformers", "tokenizers", "numpy")


def memory_now_bytes() -> int:
    """Peak of the CUDA allocator, or resident memory of this process where there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # VmRSS, from a file that the kernel writes in a third of the time of `status`
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def status_bytes(key: str) -> int:
    """A size out of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_memory(gather: Callable[[int], list[int]]) -> tuple[str | None, tuple[int, ...]]:
    """(kind, peak by rank). On CPU nothing: it takes a run of its own (`memory_probe`)."""
    if not torch.cuda.is_available():
        return None, ()
    return "allocated", tuple(gather(int(torch.cuda.max_memory_allocated())))


def software() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def measurement(
    plan: Plan,
    *,
    name: str,
    step_times_s: list[float],
    left_out: int,
    memory_kind: str | None,
    memory_bytes: tuple[int, ...],
    cost_usd: float | None,
) -> Measurement:
    """Median and 5th to 95th percentile of the steps after the first `left_out`."""
    timed = np.array(step_times_s[left_out:])
    low, median, high = np.percentile(timed, [5, 50, 95]) if len(timed) else (None, None, None)
    return Measurement(
        id=f"{name}-{os.getpid()}",
        measured_at=utc_now(),
        accelerator=plan.cluster.accelerator.name,
        ranks=plan.strategy.world,
        model=plan.model.name,
        parameters=plan.model.parameters,
        seq_len=plan.job.seq_len,
        global_batch=plan.job.global_batch,
        precision=plan.job.precision,
        strategy=plan.strategy,
        software=software(),
        step_s=median,
        step_low_s=low,
        step_high_s=high,
        steps_timed=len(timed),
        tokens_per_s=None if median is None else plan.job.tokens_per_step / median,
        memory_kind=memory_kind,
        memory_bytes=memory_bytes,
        cost_usd=cost_usd,
        steps_left_out=min(left_out, len(step_times_s)),
    )

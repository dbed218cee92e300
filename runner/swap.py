"""Where offload to NVMe keeps its files: RUN/swap, or a folder of the run's own on the drive that was named.

What lies there is worth nothing once the ranks have ended: it is removed before they start and after.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_bytes

SWAP = "swap"
KEYS = ("offload_optimizer", "offload_param")


def uses_nvme(plan: Plan) -> bool:
    """Whether anything of the plan goes to NVMe."""
    return "nvme" in (plan.strategy.offload_optimizer, plan.strategy.offload_param)


def with_drive(plan: Plan, drive: str | None) -> Plan:
    """The plan with `--nvme-path` in its DeepSpeed section; null leaves it as it is."""
    if drive is None:
        return plan
    if not uses_nvme(plan):
        raise UsageError("the plan offloads nothing to NVMe", where="--nvme-path")
    if not Path(drive).is_dir():
        raise UsageError("no such folder", where=f"--nvme-path {drive}")
    return _with_path(plan, str(Path(drive).absolute()))


def swap_folder(plan: Plan, root: Path) -> Path:
    """RUN/swap; where the plan names a drive, a folder there that no other run has."""
    sections = plan.deepspeed.get("zero_optimization", {})
    named = next((p for key in KEYS if (p := sections.get(key, {}).get("nvme_path"))), None)
    if named is None:
        return root / SWAP
    digest = hashlib.sha256(str(root.absolute()).encode()).hexdigest()
    return Path(named) / f"outlay-{digest[:12]}"


def placed(plan: Plan, root: Path) -> Plan:
    """The plan as the ranks of the run in `root` build it: with the folder for its swapped states."""
    return _with_path(plan, str(swap_folder(plan, root).absolute())) if uses_nvme(plan) else plan


def named(plan: Plan) -> bool:
    """Whether the plan says where, or has nothing to put there."""
    sections = plan.deepspeed.get("zero_optimization", {})
    used = [sections[key] for key in KEYS if sections.get(key, {}).get("device") == "nvme"]
    return all(section.get("nvme_path") for section in used)


def in_temporary(plan: Plan) -> tuple[Plan, Path]:
    """For an engine outside of a run (measuring, exporting): a folder that it removes when it closes."""
    folder = Path(tempfile.mkdtemp(prefix="outlay-swap-"))
    return _with_path(plan, str(folder)), folder


def _with_path(plan: Plan, path: str) -> Plan:
    config: dict[str, Any] = copy.deepcopy(plan.deepspeed)
    for key in KEYS:
        section = config.get("zero_optimization", {}).get(key, {})
        if section.get("device") == "nvme":
            section["nvme_path"] = path
    return dataclasses.replace(plan, deepspeed=config)


def make_room(plan: Plan, root: Path) -> None:
    """An empty folder, with the space that the plan needs, on a drive that takes direct writes."""
    if not uses_nvme(plan):
        return
    folder = swap_folder(plan, root)
    clear(plan, root)
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError("no folder for NVMe", where=str(folder), why=str(error)) from None
    _require_direct(folder)
    needed = plan.estimate.get("memory", {}).get("nvme_bytes") or 0
    if needed > free:
        raise NotFeasible(
            "too little space for what the plan offloads to NVMe",
            where=str(folder),
            why=f"{format_bytes(needed)} are needed, {format_bytes(free)} are free",
            do="free some, or name another drive with --nvme-path",
        )


def _require_direct(folder: Path) -> None:
    """DeepSpeed's operator reads and writes past the page cache, which not every file system takes."""
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        raise UsageError(
            "this file system takes no direct writes (O_DIRECT)",
            where=str(folder),
            why=str(error),
            do="name a folder on a local drive with --nvme-path",
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def clear(plan: Plan, root: Path) -> None:
    """Remove what the ranks swapped out."""
    if uses_nvme(plan):
        shutil.rmtree(swap_folder(plan, root), ignore_errors=True)

"""Which GPUs CUDA will see: CUDA_VISIBLE_DEVICES, read as CUDA reads it.

https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html:
indices or (the beginning of) UUIDs; what follows the first entry that names no GPU is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from outlay.planner.spec.cluster import Gpu
from outlay.profiles.errors import UsageError

VARIABLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
NOTHING = ("", "-1", "nodevfiles", "none", "void")
"""First entries that hide every GPU on purpose; container runtimes and Slurm write the words."""


def visible(
    gpus: Sequence[Gpu], *, count: int, environment: Mapping[str, str] = os.environ
) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs to use, in CUDA's order, and notes. `count` includes those that did not answer."""
    value = environment.get(VARIABLE)
    if value is None:
        return tuple(gpus), ()
    entries = [entry.strip() for entry in value.split(",")]
    if entries[0].lower() in NOTHING:
        return (), (f"{VARIABLE}={value!r} hides all {count} GPUs of this machine",)
    notes = _order_note(gpus, entries, environment)
    chosen: list[Gpu] = []
    for position, entry in enumerate(entries):
        if entry.isdigit() and int(entry) < count and not _by_index(gpus, int(entry)):
            continue  # It is there and does not answer; the reader has said so.
        gpu = _find(gpus, entry, value)
        if gpu is None:
            if position == 0:
                raise _unknown(gpus, entry, value)
            ignored = ",".join(entries[position:])
            note = f"{VARIABLE}: {entry!r} names no GPU here, so CUDA ignores {ignored!r}"
            return tuple(chosen), (*notes, note)
        if gpu in chosen:
            raise UsageError(
                f"{VARIABLE}={value!r} names GPU {gpu.index} twice",
                why="CUDA shows no GPU at all then",
                do="name each GPU once",
            )
        chosen.append(gpu)
    return tuple(chosen), notes


def _order_note(
    gpus: Sequence[Gpu], entries: list[str], environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Between GPUs of different kinds an index means another GPU to CUDA than to nvidia-smi."""
    mixed = len({gpu.name for gpu in gpus}) > 1
    by_bus = environment.get(ORDER) == "PCI_BUS_ID"
    if not mixed or by_bus or not any(entry.isdigit() for entry in entries):
        return ()
    return (
        f"{VARIABLE} is read in nvidia-smi's order; CUDA numbers the fastest GPU 0"
        f" unless {ORDER}=PCI_BUS_ID is set: UUIDs are safe",
    )


def _find(gpus: Sequence[Gpu], entry: str, value: str) -> Gpu | None:
    if entry.startswith("MIG-"):
        raise UsageError(
            f"{VARIABLE}={value!r} names a MIG slice of a GPU",
            why="outlay plans for whole GPUs",
            do=f"set {VARIABLE} to the UUIDs of whole GPUs (nvidia-smi -L)",
        )
    if entry.isdigit():
        return _by_index(gpus, int(entry))
    matches = [gpu for gpu in gpus if entry and gpu.uuid.lower().startswith(entry.lower())]
    if len(matches) > 1:
        raise UsageError(
            f"{VARIABLE}={value!r}: {entry!r} begins the UUID of {len(matches)} GPUs",
            why=", ".join(gpu.uuid for gpu in matches),
            do="write more of the UUID",
        )
    return matches[0] if matches else None


def _by_index(gpus: Sequence[Gpu], index: int) -> Gpu | None:
    return next((gpu for gpu in gpus if gpu.index == index), None)


def _unknown(gpus: Sequence[Gpu], entry: str, value: str) -> UsageError:
    here = ", ".join(f"{gpu.index} ({gpu.name}, {gpu.uuid})" for gpu in gpus) or "none that answers"
    return UsageError(
        f"{VARIABLE}={value!r}: {entry!r} names no GPU of this machine",
        why=f"there are: {here}",
        do=f"use these indices or UUIDs, or unset {VARIABLE}",
    )

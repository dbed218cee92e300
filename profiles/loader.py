"""Loads the catalog of accelerators, and any YAML of this package. Files are read once.

    accelerators/*.yaml     one block an accelerator
    accelerators/sources.yaml   what the short names of sources in those files mean

Nodes for rent are in `offers`, which also has electricity and carbon; they can be had here too.
Parsing YAML is the slow part, so one accelerator is looked up by its block of text: the files are
cut at the lines that start in column 0, and only the block that is wanted is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import yaml

from outlay.profiles.errors import FileError, UnknownName
from outlay.profiles.offers import (
    Instance,
    instance,
    instances,
    package_files,
    package_text,
    read_instances,
)
from outlay.profiles.units import MIB, format_bytes

__all__ = [
    "Accelerator",
    "Instance",
    "accelerator",
    "accelerators",
    "aliases",
    "instance",
    "instances",
    "match_nvml",
    "nearest_memory",
    "read_instances",
    "read_yaml",
]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU, TPU or CPU socket. Datasheet figures; null where no source is known."""

    name: str
    """Catalog name, lower case with dashes: `h100-sxm`, `rtx-4090`, `cpu`."""
    title: str
    vendor: str
    kind: Literal["gpu", "cpu", "tpu", "other"]
    architecture: str | None = None
    compute_capability: str | None = None
    memory_bytes: int | None = None
    """As marketed."""
    usable_bytes: int | None = None
    """What the driver reports in all (NVML total), before any context."""
    memory_bytes_per_s: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    """Peak dense rate by precision (fp32, tf32, fp16, bf16, fp8, fp4); FLOP/s. One that is neither
    here nor in `unknown` (as `flops.fp8`) is not accelerated by the hardware."""
    sm_count: int | None = None
    tdp_w: float | None = None
    pcie_bytes_per_s: float | None = None
    """Host link, one direction; bytes/s."""
    nvlink_bytes_per_s: float | None = None
    """NVLink or xGMI of one accelerator, one direction; bytes/s. Null or 0 = none."""
    nvlink_pair_bytes_per_s: float | None = None
    """What two accelerators alone have of it where the links are point to point (xGMI), one
    direction; bytes/s. Null = all of it, or unknown."""
    nvlink_domain: int | None = None
    """Accelerators that one such link domain joins."""
    form_factor: str | None = None
    nvml_names: tuple[str, ...] = ()
    deepspeed: bool = True
    """DeepSpeed trains there."""
    sources: dict[str, str] = field(default_factory=dict)
    """Field → where the figure comes from."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Field that is null → why."""


_NUMBERS: dict[str, tuple[str, float]] = {
    "memory_gb": ("memory_bytes", 1e9),
    "usable_mib": ("usable_bytes", MIB),
    "memory_gb_per_s": ("memory_bytes_per_s", 1e9),
    "sm_count": ("sm_count", 1),
    "tdp_w": ("tdp_w", 1),
    "pcie_gb_per_s": ("pcie_bytes_per_s", 1e9),
    "nvlink_gb_per_s_per_direction": ("nvlink_bytes_per_s", 1e9),
    "nvlink_pair_gb_per_s_per_direction": ("nvlink_pair_bytes_per_s", 1e9),
    "nvlink_domain": ("nvlink_domain", 1),
}
"""Key in the files → field of Accelerator, and what one unit of the key is in the field's."""

_WHOLE = {"memory_bytes", "usable_bytes", "sm_count", "nvlink_domain"}
_ENTRY = re.compile(r"^(?=[a-z0-9][a-z0-9.-]*:)", re.MULTILINE)
_ALIASES = re.compile(r"^  aliases: \[(.*)\]$", re.MULTILINE)
_LEGEND = "accelerators/sources.yaml"

MEMORY_TOLERANCE = 0.10
"""How far a GPU's total memory may be from its entry's: ECC takes 1/16, drivers differ by 1-2 %."""


def read_yaml(name: str) -> Any:
    """A YAML file of this package, parsed; `name` is relative to `profiles/`."""
    return yaml.load(package_text(name), Loader=_Loader)


@cache
def _blocks() -> dict[str, tuple[str, str]]:
    """Catalog name → (file, the text of its entry), without parsing any."""
    found = {}
    for name in package_files("accelerators", ".yaml"):
        if name != _LEGEND:
            for block in _ENTRY.split(package_text(name))[1:]:
                found[block.partition(":")[0]] = (name, block)
    return found


@cache
def aliases() -> dict[str, str]:
    """Other spelling → catalog name."""
    found = {}
    for name, (_, block) in _blocks().items():
        for match in _ALIASES.finditer(block):
            found.update(dict.fromkeys(re.findall(r"[\w.-]+", match[1]), name))
    return found


@cache
def _legend() -> dict[str, str]:
    return {
        key: f"{value['what']}, {value['date']}" if "date" in value else value["what"]
        for key, value in read_yaml(_LEGEND).items()
    }


def _cite(text: str, where: str) -> str:
    """`"mle+dbg: remark"` → the full sources and the remark."""
    keys, _, remark = text.partition(": ")
    try:
        full = "; ".join(_legend()[key] for key in keys.split("+"))
    except KeyError as error:
        raise UnknownName("source", str(error.args[0]), _legend(), where=where) from None
    return f"{full} ({remark})" if remark else full


def _field_names(key: str, flops: Iterable[str]) -> list[str]:
    """Key in a file → the fields that it speaks of: `flops_t` → every precision that is given."""
    if key == "flops_t":
        return [f"flops.{precision}" for precision in flops] or ["flops"]
    if key.startswith("flops_t."):
        return [key.replace("flops_t", "flops", 1)]
    return [_NUMBERS[key][0] if key in _NUMBERS else key]


def _scale(value: float | None, name: str, unit: float) -> float | None:
    if value is None:
        return None
    return round(value * unit) if name in _WHOLE else float(value) * unit


def _build(name: str, raw: dict[str, Any], where: str) -> Accelerator:
    rates = {key: float(round(rate * 1e12)) for key, rate in raw.pop("flops_t", {}).items()}
    cited = {
        target: _cite(text, where)
        for key, text in raw.pop("sources", {}).items()
        for target in _field_names(key, rates)
    }
    unknown = {
        target: reason
        for key, reason in raw.pop("unknown", {}).items()
        for target in _field_names(key, rates)
    }
    raw.pop("aliases", None)
    numbers: dict[str, Any] = {
        target: _scale(raw.pop(key, None), target, unit) for key, (target, unit) in _NUMBERS.items()
    }
    try:
        return Accelerator(
            name=name, flops=rates, sources=cited, unknown=unknown,
            nvml_names=tuple(raw.pop("nvml_names", ())), **numbers, **raw,
        )  # fmt: skip
    except TypeError as error:
        raise FileError(f"{name}: {error}", where=where) from None


@cache
def _accelerator(name: str) -> Accelerator:
    where, block = _blocks()[name]
    return _build(name, yaml.load(block, Loader=_Loader)[name], where)


def accelerator(name: str) -> Accelerator:
    """The entry of that name or alias, in any case; UnknownName with the nearest if none is."""
    wanted = name.strip().lower()
    wanted = aliases().get(wanted, wanted)
    if wanted not in _blocks():
        raise UnknownName("accelerator", name, [*_blocks(), *aliases()])
    return _accelerator(wanted)


def accelerators() -> dict[str, Accelerator]:
    """The whole catalog by name. Parses every file: for one entry `accelerator` is faster."""
    return {name: _accelerator(name) for name in _blocks()}


def match_nvml(name: str, total_bytes: int) -> Accelerator:
    """The entry of a GPU as NVML names it; its total memory decides between entries of one name.

    Refused where no entry has the name, or none of that name has about that memory (a slice of a
    GPU, or a variant that the catalog lacks): its figures would be another part's.
    """
    wanted = name.strip().lower()
    maybe = (_accelerator(key) for key, (_, block) in _blocks().items() if wanted in block.lower())
    named = [a for a in maybe if wanted in {known.lower() for known in a.nvml_names}]
    near = nearest_memory(named, total_bytes)
    if near is None:
        known = [
            f"{nvml.lower()} ({a.name})" for a in accelerators().values() for nvml in a.nvml_names
        ]
        raise UnknownName("GPU", f"{name} with {format_bytes(total_bytes)}", known)
    return near


def nearest_memory(entries: Iterable[Accelerator], total_bytes: int) -> Accelerator | None:
    """The entry whose memory is nearest to `total_bytes`, if within MEMORY_TOLERANCE of it."""
    sized = [
        (abs(total_bytes / size - 1), e)
        for e in entries
        if (size := e.usable_bytes or e.memory_bytes)
    ]
    if not sized:
        return None
    off, entry = min(sized, key=lambda pair: pair[0])
    return entry if off <= MEMORY_TOLERANCE else None

"""Loads the catalog: accelerators, efficiency figures. Files are read when asked for, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from outlay.profiles.errors import UnknownName

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
    """Peak dense rate by precision (fp32, tf32, fp16, bf16, fp8, fp4); FLOP/s."""
    sm_count: int | None = None
    tdp_w: float | None = None
    pcie_bytes_per_s: float | None = None
    """Host link, one direction; bytes/s."""
    nvlink_bytes_per_s: float | None = None
    """NVLink or xGMI of one accelerator, one direction; bytes/s. Null or 0 = none."""
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


def read_yaml(name: str) -> Any:
    """A YAML file of this package, parsed; `name` is relative to `profiles/`."""
    return yaml.load((files("outlay.profiles") / name).read_text(encoding="utf-8"), Loader=_Loader)

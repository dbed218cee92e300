"""Plan: the file that joins planner and runner. `outlay run plan.yaml` needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.strategy import Strategy

SCHEMA_PLAN = "outlay/plan@1"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model, complete enough to build it without asking anybody."""

    name: str
    source: str
    parameters: int
    config: dict[str, Any]
    """The transformers config, whole."""
    weights: str | None = None
    """Folder with safetensors to start from; null = random initialization."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another strategy that was looked at."""

    strategy: Strategy
    verdict: str
    step_s: float | None
    device_bytes: float | None
    why: str
    """Why it lost, with numbers."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What more of one thing would give, found by planning again for it."""

    what: str
    """compute | memory speed | memory | links | network | host link | accelerators."""
    change: str
    step_s: float
    faster: float
    """Now/then − 1."""
    strategy: str | None = None
    """What would be chosen there; null = the same strategy."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The chosen strategy with its estimate, the alternatives, why they lost, the DeepSpeed config."""

    created: str
    outlay_version: str
    model: ModelSource
    job: Job
    cluster: Cluster
    strategy: Strategy
    estimate: dict[str, Any]
    """As `outlay estimate --format json` prints it (schema outlay/estimate@1)."""
    deepspeed: dict[str, Any]
    """The generated DeepSpeed configuration."""
    considered: int
    """Strategies looked at."""
    feasible: int
    alternatives: tuple[Alternative, ...] = ()
    target: str = "runner"
    """Whose trainer it is for: runner | deepspeed | trainer | megatron; `outlay run` takes the first."""
    legal: int | None = None
    """Of those looked at, what no rule forbids."""
    limited_by: str | None = None
    """Of what more would help most."""
    gains: tuple[Gain, ...] = ()
    """What twice as much of each thing would give."""
    schema: str = field(default=SCHEMA_PLAN)

"""Measurement: the same fields as an estimate, observed. Event and Outcome: what a run writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from outlay.planner.spec.strategy import Strategy

SCHEMA_MEASUREMENT = "outlay/measurement@1"
SCHEMA_EVENT = "outlay/event@1"
SCHEMA_OUTCOME = "outlay/outcome@1"

RunState = Literal["done", "budget", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one run (or one `--measure` of a strategy) showed. Null where it was not measured."""

    id: str
    measured_at: str
    accelerator: str
    ranks: int
    model: str
    parameters: int
    seq_len: int
    global_batch: int
    precision: str
    strategy: Strategy
    software: dict[str, str]
    """Package → version: python, torch, deepspeed, transformers, outlay."""
    step_s: float | None
    """Median over the steps timed."""
    step_low_s: float | None
    """5th percentile."""
    step_high_s: float | None
    """95th percentile."""
    steps_timed: int
    tokens_per_s: float | None
    memory_kind: str | None
    """allocated, reserved, device, host_growth, …"""
    memory_bytes: tuple[int, ...] = ()
    """Peak by rank, in that kind."""
    memory_before_bytes: tuple[int, ...] = ()
    """By rank, before the model was built (host_growth only)."""
    steps_left_out: int = 0
    """First steps that are not timed, since they allocate and warm up."""
    cost_usd: float | None = None
    energy_kwh: float | None = None
    energy_source: str | None = None
    schema: str = field(default=SCHEMA_MEASUREMENT)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of `events.jsonl`."""

    time: str
    """UTC, ISO 8601."""
    elapsed_s: float
    """Since the supervisor started, monotonic."""
    kind: str
    """start, rank_ready, step, eval, save, warning, question, answer, stop, export, end."""
    step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    schema: str = field(default=SCHEMA_EVENT)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`RUN/outcome.json`: how a run ended. The supervisor decides its exit code from this alone."""

    state: RunState
    exit_code: int
    reason: str
    steps: int
    tokens: int
    wall_s: float
    """Of all that is rented, from the start of the supervisor to its end; over all resumes."""
    cost_usd: float | None
    train_loss: float | None
    heldout_loss: float | None
    checkpoint: str | None
    export: str | None
    heldout_unigram: float | None = None
    """Loss of a unigram model on the same held-out tokens, nats a token: what any model must beat."""
    energy_kwh: float | None = None
    """With PUE; null = not metered."""
    energy_source: str | None = None
    co2e_kg: float | None = None
    compression: dict[str, Any] | None = None
    """Zeros as counted at the end, by matrix and in all; null = nothing was pruned."""
    schema: str = field(default=SCHEMA_OUTCOME)

"""The peak of a rank: the largest of its phases on the heaviest stage of its pipeline.

What is alive in a phase is a sum of two sides: the weights' (which depends on the layout of the ranks)
and the batch's (which depends on the micro-batch). A search of a million candidates has a few thousand
of each, so both are computed once, and a candidate costs their sum and a maximum. What only the answer
shows (parts, phases, positions) is worked out when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.phases import Alive, Working

PARTS = (
    "parameters",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "communication_buffers",
    "workspace",
    "runtime",
    "fragmentation",
)
POSITIONS = ("first", "middle", "last")
_CHUNK = 1 << 14
"""Candidates a pass: the arrays of one pass stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Both sides of every phase, on their own tables: [3, kinds of layout] and [3, kinds of batch]."""

    states: tuple[Alive, ...]
    working: tuple[Working | None, ...]
    """As many as `states`; null where the batch adds nothing."""
    exists: Array
    """[3, kinds of layout]: whether a pipeline has that position."""
    runtime: Array
    """[kinds of layout]: what torch does not count."""
    fragmentation: float
    least_fragmentation: float

    def taller(self, layout: Array, batch: Array) -> Array:
        """Allocated bytes at the peak, [n], of candidates with these rows of the tables."""
        gone = ~self.exists
        alone = np.zeros(self.runtime.shape)
        both: list[tuple[Array, Array]] = []
        for one, more in zip(self.states, self.working, strict=True):
            total = np.where(gone, -np.inf, one.total)
            if more is None:
                alone = np.maximum(alone, total.max(axis=0))
            else:
                both += [(total[p], more.total[p]) for p in range(len(POSITIONS))]
        peak = np.empty(len(layout))
        for start in range(0, len(layout), _CHUNK):
            piece = slice(start, start + _CHUNK)
            rows, columns = layout[piece], batch[piece]
            most = alone[rows]
            for a, b in both:
                np.maximum(most, a[rows] + b[columns], out=most)
            peak[piece] = most
        return peak


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Arrays of n candidates, in bytes; parts are those alive at the peak and sum to the total."""

    sides: Sides
    layout: Array
    """Row of each candidate in the weights' tables."""
    batch: Array
    """Row of each candidate in the batch's tables."""
    allocated: Array
    """What torch allocates at the peak."""
    device: Array
    """With fragmentation and what torch does not count (runtime)."""
    least: Array
    """Device bytes below which it cannot run: before it fails, torch's allocator gives back what it
    only keeps cached, so less than the usual fragmentation remains."""

    def take(self, index: Array) -> Memory:
        """Of the candidates that a mask or an index array selects."""
        return Memory(
            sides=self.sides, layout=self.layout[index], batch=self.batch[index],
            allocated=self.allocated[index], device=self.device[index], least=self.least[index],
        )  # fmt: skip

    @cached_property
    def _totals(self) -> Array:
        """[phases, 3, n] allocated bytes."""
        rows = []
        for one, more in zip(self.sides.states, self.sides.working, strict=True):
            total = one.total[:, self.layout]
            rows.append(total if more is None else total + more.total[:, self.batch])
        return np.where(self.sides.exists[:, self.layout], np.stack(rows), 0.0)

    def _on_device(self, allocated: Array) -> Array:
        whole = 1 + self.sides.fragmentation
        return np.asarray(allocated * whole + self.sides.runtime[self.layout])

    @cached_property
    def peak_position(self) -> Array:
        """Index into POSITIONS."""
        return np.asarray(self._totals.max(axis=0).argmax(axis=0))

    @cached_property
    def peak_phase(self) -> Array:
        """Index into PHASES."""
        return np.asarray(self._at_peak_position.argmax(axis=0))

    @property
    def _at_peak_position(self) -> Array:
        return self._totals[:, self.peak_position, np.arange(len(self.layout))]

    @property
    def by_position(self) -> Array:
        """[3, n] device bytes; 0 where there is no such position."""
        whole = self._on_device(self._totals.max(axis=0))
        return np.where(self.sides.exists[:, self.layout], whole, 0.0)

    @property
    def by_phase(self) -> Array:
        """[phases, n] device bytes at the position of the peak: of a step's phases, or of all PHASES."""
        return self._on_device(self._at_peak_position)

    @property
    def each_phase(self) -> Array:
        """[phases, n] the same, each phase at the position where it is largest."""
        return self._on_device(self._totals.max(axis=1))

    @cached_property
    def parts(self) -> dict[str, Array]:
        """Device bytes alive at the peak."""
        s, position = self.sides, self.peak_position
        zero = np.zeros(len(self.layout))

        def alive(sides: tuple[Alive | Working | None, ...], name: str, row: Array) -> Array:
            chosen = zero
            for k, one in enumerate(sides):
                part = getattr(one, name, None)
                if part is not None:
                    chosen = np.where(self.peak_phase == k, part[position, row], chosen)
            return chosen

        return {
            "parameters": alive(s.states, "parameters", self.layout),
            "gradients": alive(s.states, "gradients", self.layout),
            "optimizer_states": alive(s.states, "optimizer_states", self.layout),
            "activations": alive(s.working, "activations", self.batch),
            "logits": alive(s.working, "logits", self.batch),
            "communication_buffers": alive(s.states, "communication", self.layout),
            "workspace": alive(s.states, "workspace", self.layout),
            "runtime": s.runtime[self.layout],
            "fragmentation": s.fragmentation * self.allocated,
        }

    def in_kind(self, kind: str) -> Array:
        """The peak as a measurement of that `memory_kind` would show it; device bytes by default."""
        runtime, waste = self.parts["runtime"], self.parts["fragmentation"]
        whole: Array
        if kind.startswith("allocated") or kind in ("active", "host_growth"):
            whole = self.allocated
        elif kind == "reserved":
            whole = self.allocated + waste
        else:
            return self.device
        if kind.endswith("_last_rank"):
            whole = (self.by_position[2] - runtime) * (whole / (self.allocated + waste))
        return whole


def runtime_bytes(c: Candidates, figures: Mapping[str, float]) -> Array:
    """Context and libraries, and each communicator that the layout makes, [n]."""
    world = c.dp * c.tp * c.pp * c.cp * c.sp
    groups = sum((n > 1).astype(float) for n in (world, c.dp, c.tp, c.pp, c.cp, c.sp, c.ep))
    return np.asarray(
        figures["memory.runtime_bytes"] + groups * figures["memory.runtime_bytes_per_group"]
    )


def peak_of(sides: Sides, layout: Array, batch: Array) -> Memory:
    """The peak of candidates with these rows of both sides' tables."""
    allocated = sides.taller(layout, batch)
    runtime = sides.runtime[layout]
    return Memory(
        sides=sides, layout=layout, batch=batch, allocated=allocated,
        device=allocated * (1 + sides.fragmentation) + runtime,
        least=allocated * (1 + sides.least_fragmentation) + runtime,
    )  # fmt: skip

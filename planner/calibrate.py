"""Measurements → the efficiency figures of step time, and how wide their intervals are.

A figure is its prior's centre (profiles/efficiency/priors.yaml) times what the measurements say of all
accelerators, of one architecture and of one part; so a part without data borrows from its relatives.
Sources weigh alike but for the square root of their size. Nothing in the model knows a source.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlay.planner.cases import Case, express, read_rows
from outlay.planner.estimate.buckets import reduce_buckets
from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.efficiency import architecture_of, efficiency_for
from outlay.planner.estimate.operators import speed_of
from outlay.planner.estimate.step import estimate_step
from outlay.planner.fit import Fit, least_squares
from outlay.planner.spec.cluster import Cluster
from outlay.profiles.errors import FileError, OutlayError
from outlay.profiles.loader import read_yaml

SCHEMA_PRIORS = "outlay/priors@1"
NOISE = 0.10
"""Relative width of one measurement's error, model error included."""
FULL_WEIGHT = 4
"""A source with more rows than this adds as the square root of its size."""
_DIFFERENCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What was believed of one figure."""

    value: float
    transform: str
    """log | logit."""
    spread: float
    source: str
    architecture: float | None = None
    accelerator: float | None = None
    centres: dict[str, float] = dataclasses.field(default_factory=dict)
    """Architecture → the centre there, where it is not `value`."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One number that is fitted: a figure's deviation at one level."""

    figure: str
    level: str
    """spread (all of the kind) | architecture | accelerator."""
    where: str
    """Name of the efficiency file that the level writes."""
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement that the project can express."""

    id: str
    source: str
    case: Case
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that differ in their strategy only, estimated in one call."""

    rows: tuple[int, ...]
    case: Case
    candidates: Candidates


def priors(kind: str) -> dict[str, Prior]:
    """Figure → what was believed; kind is gpu or cpu."""
    raw = read_yaml("efficiency/priors.yaml")
    if raw.get("schema") != SCHEMA_PRIORS:
        raise FileError(f"schema is {raw.get('schema')!r}", where="efficiency/priors.yaml")
    return {name: Prior(**value) for name, value in raw[kind].items()}


def measured_s(row: Mapping[str, str], case: Case) -> float | None:
    """Seconds of a step: measured, else from tokens a second a GPU; None where neither is given."""
    if text := (row.get("measured_step_s") or "").strip():
        return float(text)
    if text := (row.get("measured_tokens_per_s_per_gpu") or "").strip():
        return case.strategy.global_batch * case.job.seq_len / float(text) / case.cluster.ranks
    return None


def load(files: Iterable[str | Path], cluster: Cluster | None = None) -> list[Row]:
    """Rows with a step time that can be expressed. `cluster`: the machine that CPU rows ran on."""
    rows: list[Row] = []
    for path in files:
        for raw in read_rows(path):
            try:
                case = express(raw, machine=cluster)
            except OutlayError:
                continue
            seconds = measured_s(raw, case)
            if not seconds or raw.get("oom") == "1":
                continue
            if (
                speed_of(case.cluster, case.job.precision, efficiency_for(case.cluster.accelerator))
                is None
            ):
                continue
            case = dataclasses.replace(case, strategy=case.stated or case.strategy)
            source = (raw.get("source") or "unnamed").strip()
            rows.append(Row(id=raw.get("id") or "", source=source, case=case, measured_s=seconds))
    return rows


def batches(rows: Sequence[Row]) -> list[Batch]:
    """Rows grouped by model, job, hardware and software."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        case = row.case
        job = dataclasses.replace(case.job, global_batch=1, steps=1)
        a = case.cluster
        key = (
            case.spec,
            job,
            a.accelerator.name,
            a.nodes,
            a.ranks_per_node,
            a.inter,
            case.software,
        )
        groups[key].append(i)
    return [
        Batch(
            rows=tuple(members),
            case=rows[members[0]].case,
            candidates=Candidates.of([rows[i].case.strategy for i in members]),
        )
        for members in groups.values()
    ]


def parameters(rows: Sequence[Row], believed: Mapping[str, Prior]) -> list[Parameter]:
    """What is fitted: every figure for all, and its levels for the hardware that the rows name."""
    accelerators = {r.case.cluster.accelerator.name: r.case.cluster.accelerator for r in rows}
    kind = "cpu" if all(a.kind == "cpu" for a in accelerators.values()) else "gpu"
    architectures = sorted({architecture_of(a) for a in accelerators.values()})
    found = []
    for name, p in believed.items():
        found.append(Parameter(figure=name, level="spread", where=kind, deviation=p.spread))
        if p.architecture:
            found += [
                Parameter(figure=name, level="architecture", where=a, deviation=p.architecture)
                for a in architectures
                if a
            ]
        if p.accelerator:
            found += [
                Parameter(figure=name, level="accelerator", where=a, deviation=p.accelerator)
                for a in sorted(accelerators)
            ]
    return found


def apply(prior: Prior, shift: Array | float, architecture: str = "") -> Array:
    """The figure at a deviation from its prior's centre."""
    centre = prior.centres.get(architecture, prior.value)
    if prior.transform == "log":
        return np.asarray(centre * np.exp(shift))
    odds = np.log(centre / (1.0 - centre)) + shift
    return np.asarray(1.0 / (1.0 + np.exp(-odds)))


class StepModel:
    """Log seconds of all rows as a function of the parameters, with finite-difference derivatives.

    The candidates of a batch are repeated once a parameter with that one moved, so that the
    whole derivative is one call.
    """

    def __init__(
        self, rows: Sequence[Row], params: Sequence[Parameter], believed: Mapping[str, Prior]
    ) -> None:
        self.count = len(rows)
        self.params = params
        self.believed = believed
        self.batches = batches(rows)
        self.relevant = [self._concerns(b) for b in self.batches]

    def _concerns(self, batch: Batch) -> list[int]:
        a = batch.case.cluster.accelerator
        names = {"gpu", "cpu", architecture_of(a), a.name}
        return [j for j, p in enumerate(self.params) if p.where in names]

    def figures(self, batch: Batch, relevant: Sequence[int], shifts: Array) -> dict[str, Any]:
        """Figures [copies·rows]; `shifts` is [parameters, copies]."""
        n = len(batch.candidates)
        found: dict[str, Any] = dict(efficiency_for(batch.case.cluster.accelerator))
        total: dict[str, Array] = {}
        for j in relevant:
            name = self.params[j].figure
            total[name] = total.get(name, 0.0) + shifts[j]
        architecture = architecture_of(batch.case.cluster.accelerator)
        for name, shift in total.items():
            found[name] = np.repeat(apply(self.believed[name], shift, architecture), n)
        return found

    def _seconds(self, batch: Batch, figures: dict[str, Any], copies: int) -> Array:
        case, n = batch.case, len(batch.candidates)
        c = batch.candidates.take(np.tile(np.arange(n), copies))
        speed = speed_of(case.cluster, case.job.precision, figures)
        assert speed is not None
        step = estimate_step(
            case.spec, case.job, c, case.cluster, speed, bucket=reduce_buckets(case.spec, c),
            figures=figures, software=case.software, tabled=False,
        )  # fmt: skip
        return np.asarray(np.log(step.time_s)).reshape(copies, n)

    def __call__(self, theta: Array) -> tuple[Array, Array]:
        value = np.zeros(self.count)
        slope = np.zeros((self.count, len(self.params)))
        for batch, relevant in zip(self.batches, self.relevant, strict=True):
            copies = 1 + len(relevant)
            shifts = np.repeat(theta[:, None], copies, axis=1)
            shifts[relevant, np.arange(1, copies)] += _DIFFERENCE
            logs = self._seconds(batch, self.figures(batch, relevant, shifts), copies)
            rows = list(batch.rows)
            value[rows] = logs[0]
            slope[np.ix_(rows, relevant)] = ((logs[1:] - logs[0]) / _DIFFERENCE).T
        return value, slope

    def value(self, theta: Array) -> Array:
        """Log seconds alone."""
        value = np.zeros(self.count)
        for batch, relevant in zip(self.batches, self.relevant, strict=True):
            figures = self.figures(batch, relevant, theta[:, None])
            value[list(batch.rows)] = self._seconds(batch, figures, 1)[0]
        return value


def weights(sources: Array) -> Array:
    """Weight of each row: 1 in small sources, falling so that a large one adds as its square root."""
    _, inverse, counts = np.unique(sources, return_inverse=True, return_counts=True)
    size = counts[inverse].astype(float)
    return np.asarray(np.where(size <= FULL_WEIGHT, 1.0, np.sqrt(FULL_WEIGHT * size) / size))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fit with its leave-one-source-out residuals (log measured over predicted)."""

    rows: tuple[Row, ...]
    params: tuple[Parameter, ...]
    fit: Fit
    residual: Array
    left_out: Array
    """Each row predicted by a fit without its source."""


def calibrate(
    files: Sequence[str | Path], *, cluster: Cluster | None = None, leave_out: bool = True
) -> Calibration:
    """Fit the step-time figures to the measurements of `files`."""
    rows = load(files, cluster)
    if not rows:
        raise FileError(
            "no row has a step time that can be expressed", where=", ".join(map(str, files))
        )
    kind = "cpu" if rows[0].case.cluster.kind == "cpu" else "gpu"
    rows = [r for r in rows if (r.case.cluster.kind == "cpu") == (kind == "cpu")]
    believed = priors(kind)
    params = parameters(rows, believed)
    model = StepModel(rows, params, believed)
    sources = np.array([r.source for r in rows])
    target = np.log([r.measured_s for r in rows])
    prior = np.array([p.deviation for p in params])
    fit = least_squares(model, target, weights(sources), NOISE, prior, np.zeros(len(params)))
    residual = target - model.value(fit.theta)
    left = residual.copy()
    if leave_out:
        for name in np.unique(sources):
            left[sources == name] = _without(name, rows, params, believed, target, fit.theta)
    return Calibration(
        rows=tuple(rows), params=tuple(params), fit=fit, residual=residual, left_out=left
    )


def _without(
    name: str,
    rows: Sequence[Row],
    params: Sequence[Parameter],
    believed: Mapping[str, Prior],
    target: Array,
    start: Array,
) -> Array:
    """Residuals of one source's rows under a fit that never saw them."""
    sources = np.array([r.source for r in rows])
    kept, out = np.flatnonzero(sources != name).tolist(), np.flatnonzero(sources == name).tolist()
    if not kept:
        return target[out] - StepModel([rows[i] for i in out], params, believed).value(
            np.zeros(len(params))
        )
    model = StepModel([rows[i] for i in kept], params, believed)
    prior = np.array([p.deviation for p in params])
    fit = least_squares(model, target[kept], weights(sources[kept]), NOISE, prior, start)
    return np.asarray(
        target[out] - StepModel([rows[i] for i in out], params, believed).value(fit.theta)
    )

"""What one's own runs say of the planner's step time: a shift and a narrower interval, at once.

Each `outlay run` and `outlay calibrate --measure` appends a row to one file of this user:
OUTLAY_MEASUREMENTS, else $XDG_DATA_HOME/outlay/measurements.csv (`off` = neither written nor read).

Model: the log of measured over predicted seconds is a Gaussian process over the distance of
planner/nearest.py, whose variance is that of the calibrated interval. COMMON of it is the same for every
run on one kind of accelerator; NEAR is shared the less, the further apart two jobs are; the rest is each
strategy's own, and no other run tells it. The figures are the variogram of the published runs, each
predicted without its source (`python -m benchmarks.variogram`).
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from outlay.planner.estimate.candidates import Array
from outlay.planner.nearest import LOGS, OF_A_JOB, WORDS, features_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import FileError

FEATURES = tuple(name for name in (*LOGS, *WORDS) if name in OF_A_JOB)
COLUMNS = ("measured_at", "outlay", "id", "machine", "measured_s", "predicted_s", *FEATURES)
VARIABLE = "OUTLAY_MEASUREMENTS"
COMMON = 0.15
"""Share of the variance that all runs on one kind of accelerator have in common."""
NEAR = 0.45
"""Share that two runs of the same job have in common beyond that."""
REACH = 4.0
"""Distance of two jobs over which NEAR falls by e."""
NOISE = 0.05
"""Relative error of one measured step time: two runs of the same plan differ by about that."""
MOST = 200
"""Rows used, the newest."""
_Z90 = 1.6448536269514722


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What own runs change. `factor` multiplies the step time."""

    factor: float
    half_width: float
    runs: int


def path() -> Path | None:
    """The file of own measurements; None where it is switched off."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() == "off":
        return None
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "outlay" / "measurements.csv"


def machine_of(cluster: Cluster) -> str:
    """What two runs must share: the accelerator; of CPUs the model and the number of cores, too."""
    a, host = cluster.accelerator, cluster.host
    if a.kind != "cpu" or host is None:
        return a.name
    return f"{host.cpu_model}, {host.cores} cores"


def append(
    *,
    spec: ModelSpec,
    job: Job,
    cluster: Cluster,
    strategy: Strategy,
    software: str,
    measured_s: float,
    predicted_s: float,
    name: str,
    measured_at: str,
) -> Path | None:
    """One run more; `predicted_s` is the planner's own figure, without correction. One write of one
    line in append mode, so that runs which end together do not mix. Returns the file."""  # fmt: skip
    target = path()
    if target is None:
        return None
    features = features_of(spec, job, cluster, strategy, software=software)
    row = {
        "measured_at": measured_at, "outlay": version("outlay"), "id": name, "machine": machine_of(cluster),
        "measured_s": f"{measured_s:.6g}", "predicted_s": f"{predicted_s:.6g}",
        **{key: features[key] for key in FEATURES},
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = not target.exists() or target.stat().st_size == 0
    with target.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    return target


def read(target: Path) -> tuple[Mapping[str, str], ...]:
    """Its rows, the newest MOST of this version of outlay. Raises FileError with the line."""
    try:
        changed = target.stat().st_mtime_ns
    except FileNotFoundError:
        return ()
    return _read(target, changed)


@cache
def _read(target: Path, changed_ns: int) -> tuple[Mapping[str, str], ...]:
    reader = csv.DictReader(target.read_text(encoding="utf-8", errors="replace").splitlines())
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FileError(
            "its columns are not those of own measurements",
            where=f"{target}:1",
            do=f"move it away, or set {VARIABLE} to another file or to off",
        )
    rows = []
    for row in reader:
        for key in ("measured_s", "predicted_s", *(k for k in LOGS if k in FEATURES)):
            if not _positive(row[key]):
                raise FileError(
                    f"{row[key]!r} is not a positive number",
                    where=f"{target}:{reader.line_num}: {key}",
                )
        if row["outlay"] == version("outlay"):
            rows.append(row)
    return tuple(rows[-MOST:])


def _positive(text: str | None) -> bool:
    try:
        return text is not None and 0 < float(text) < math.inf
    except ValueError:
        return False


def separation(one: Mapping[str, str], other: Mapping[str, str]) -> float:
    """Distance of two jobs, whatever their strategies."""
    logs = sum(
        far * abs(math.log2(float(one[name]) / float(other[name])))
        for name, far in LOGS.items()
        if name in FEATURES
    )
    return logs + sum(
        far for name, far in WORDS.items() if name in FEATURES and one[name] != other[name]
    )


def _covariance(a: list[Mapping[str, str]], b: list[Mapping[str, str]]) -> Array:
    """Correlation of the errors of two lists of runs on one machine, of different strategies."""
    far = np.array([[separation(x, y) for y in b] for x in a]).reshape(len(a), len(b))
    return np.asarray(COMMON + NEAR * np.exp(-far / REACH))


def correction(
    spec: ModelSpec, job: Job, cluster: Cluster, *, software: str, half_width: float
) -> Correction | None:
    """Posterior of the log error at this question (Rasmussen & Williams 2006, eq. 2.25 and 2.26), from own
    runs on the same kind of machine; None where there are none. `half_width`: of the 90 % interval without
    them."""
    target = path()
    rows = (
        [] if target is None else [r for r in read(target) if r["machine"] == machine_of(cluster)]
    )
    if not rows:
        return None
    variance = (math.log1p(half_width) / _Z90) ** 2
    asked: list[Mapping[str, str]] = [
        features_of(spec, job, cluster, Strategy(), software=software)
    ]
    known: list[Mapping[str, str]] = list(rows)
    residual = np.log([float(r["measured_s"]) / float(r["predicted_s"]) for r in rows])
    alone = variance * (1.0 - COMMON - NEAR) + NOISE**2
    among = variance * _covariance(known, known) + alone * np.eye(len(rows))
    across = variance * _covariance(asked, known)[0]
    gain = np.linalg.solve(among, across)
    left = max(variance - float(gain @ across), 0.0) + NOISE**2
    width = math.expm1(_Z90 * math.sqrt(min(left, variance)))
    return Correction(factor=math.exp(float(gain @ residual)), half_width=width, runs=len(rows))

"""The measured runs most like a question, with what we would have predicted for them.

`profiles/measurements/step_times.csv` holds every published run that the project can express with its
measured and predicted seconds of a step; `python -m benchmarks.accuracy` writes it. The distance of two
runs adds what separates them, feature by feature; 1 is about the difference of twice the parameters.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from outlay.planner.estimate.candidates import Array
from outlay.planner.estimate.efficiency import architecture_of
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import FileError
from outlay.profiles.offers import package_text

TABLE = "measurements/step_times.csv"
LOGS = {
    "parameters": 1.0, "ranks": 0.3, "seq_len": 0.3, "micro_batch": 0.15, "tp": 0.4, "pp": 0.3, "cp": 0.5,
    "ep": 0.3,
}  # fmt: skip
"""Distance of a doubling."""
WORDS = {
    "accelerator": 0.7, "architecture": 2.0, "software": 1.0, "mixture": 2.0, "checkpointing": 0.5,
    "width": 0.7, "sharding": 0.5,
}  # fmt: skip
"""Distance of a difference. width: bits of the linear layers; sharding: stages 0 and 1, 2, or 3."""
FEATURES = (*LOGS, *WORDS)
COLUMNS = ("id", "source", "what", "measured_s", "predicted_s", *FEATURES)
SHOWN = 3
_BITS = {"fp32": "32", "tf32": "32", "fp8": "8", "nvfp4": "4"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """The measured runs; arrays [n]."""

    rows: tuple[dict[str, str], ...]
    logs: Array
    """[features of LOGS, n], log2."""
    words: tuple[Array, ...]
    """By feature of WORDS, text."""


def features_of(
    spec: ModelSpec, job: Job, cluster: Cluster, s: Strategy, *, software: str
) -> dict[str, str]:
    """What the distance compares, as the table writes it."""
    a = cluster.accelerator
    return {
        "parameters": f"{parameter_counts(spec).total}", "ranks": f"{cluster.ranks}",
        "seq_len": f"{job.seq_len}", "micro_batch": f"{s.micro_batch}", "tp": f"{s.tp}", "pp": f"{s.pp}",
        "cp": f"{s.cp}", "ep": f"{s.ep}", "accelerator": a.name,
        "architecture": architecture_of(a) or a.kind, "software": software,
        "mixture": "yes" if any(b.mlp.experts for b in spec.blocks) else "no",
        "checkpointing": s.activation_checkpointing, "width": _BITS.get(job.precision, "16"),
        "sharding": str(max(1, s.zero)),
    }  # fmt: skip


def describe(spec: ModelSpec, job: Job, cluster: Cluster, s: Strategy, framework: str) -> str:
    """One run in words."""
    split = "".join(
        f" {name}={value}"
        for name, value in (("tp", s.tp), ("pp", s.pp), ("cp", s.cp), ("ep", s.ep))
        if value > 1
    )
    return (
        f"step_s of {spec.name}, {cluster.ranks} x {cluster.accelerator.name}, {job.precision}, "
        f"{framework or 'deepspeed'}, zero={s.zero}{split} micro_batch={s.micro_batch} "
        f"grad_accum={s.grad_accum} seq_len={job.seq_len} checkpointing={s.activation_checkpointing}"
    )


@cache
def table() -> Table:
    """The file, read once. Raises FileError where its columns are not COLUMNS."""
    reader = csv.DictReader(package_text(TABLE).splitlines())
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FileError("its columns are not those of planner/nearest.py", where=TABLE)
    rows = tuple(reader)
    return Table(
        rows=rows,
        logs=np.log2(np.array([[float(r[name]) for r in rows] for name in LOGS])),
        words=tuple(np.array([r[name] for r in rows]) for name in WORDS),
    )


def distances(asked: dict[str, str], t: Table | None = None) -> Array:
    """From the run with these features to each row of the table."""
    t = t or table()
    mine = np.log2([float(asked[name]) for name in LOGS])
    weight = np.array(list(LOGS.values()))
    found = weight @ np.abs(t.logs - mine[:, None])
    for (name, far), column in zip(WORDS.items(), t.words, strict=True):
        found = found + far * (column != asked[name])
    return np.asarray(found)


OF_A_JOB = ("parameters", "ranks", "seq_len", "accelerator", "architecture", "software", "mixture",
            "width")  # fmt: skip
"""Features that a question has before any strategy."""


def job_distance(
    spec: ModelSpec, job: Job, cluster: Cluster, *, software: str, without: str = ""
) -> float:
    """From a question to the measured run most like it, whatever the strategy; `without` leaves out a
    source."""
    t, asked = table(), features_of(spec, job, cluster, Strategy(), software=software)
    usable = np.array([row["source"] != without for row in t.rows])
    found = np.zeros(len(t.rows))
    for row, (name, far) in enumerate(LOGS.items()):
        if name in OF_A_JOB:
            found = found + far * np.abs(t.logs[row] - np.log2(float(asked[name])))
    for (name, far), column in zip(WORDS.items(), t.words, strict=True):
        if name in OF_A_JOB:
            found = found + far * (column != asked[name])
    return float(found[usable].min())


def nearest(
    spec: ModelSpec, job: Job, cluster: Cluster, s: Strategy, *, software: str
) -> list[dict[str, Any]]:
    """`nearest` of an estimate: SHOWN measured runs, each of another configuration, the most alike first."""
    t = table()
    found: list[dict[str, Any]] = []
    for i in np.argsort(
        distances(features_of(spec, job, cluster, s, software=software)), kind="stable"
    ):
        row = t.rows[int(i)]
        if any(row["what"] == shown["what"] for shown in found):
            continue
        found.append(
            {"id": row["id"], "source": row["source"], "what": row["what"],
             "measured": float(row["measured_s"]), "predicted": float(row["predicted_s"])}
        )  # fmt: skip
        if len(found) == SHOWN:
            break
    return found

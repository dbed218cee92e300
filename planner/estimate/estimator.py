"""Strategies in, estimates out: one array program for one candidate or a million."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.buckets import reduce_buckets
from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.efficiency import Efficiency, efficiency_for
from outlay.planner.estimate.host import Host, host_memory
from outlay.planner.estimate.interval import interval, risk_above, verdict_index, widened
from outlay.planner.estimate.memory import (
    Memory,
    estimate_memory,
    held_weights,
)
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.phases import WholeRun
from outlay.planner.estimate.software import CPU_DEEPSPEED, DEEPSPEED, Software
from outlay.planner.estimate.stages import stage_loads
from outlay.planner.estimate.step import Step, estimate_step, speed_of
from outlay.planner.nearest import job_distance
from outlay.planner.own_runs import Correction, correction
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """n candidates with their figures; arrays [n]."""

    candidates: Candidates
    memory: Memory
    memory_low: Array
    memory_high: Array
    risk: Array
    """Probability of running out of memory."""
    verdict: Array
    """Index into VERDICTS."""
    step: Step | None
    """Null where the accelerator's speed is unknown."""
    step_low: Array | None
    step_high: Array | None
    figures: Efficiency
    corrected: Correction | None = None
    """What own runs changed; null where there are none."""

    def __len__(self) -> int:
        return len(self.candidates)

    def take(self, index: Array) -> Estimates:
        """The estimates that a mask or an index array selects; memory parts included."""
        s = self.step
        return Estimates(
            candidates=self.candidates.take(index),
            memory=self.memory.take(index),
            memory_low=self.memory_low[index],
            memory_high=self.memory_high[index],
            risk=self.risk[index],
            verdict=self.verdict[index],
            step=s and s.take(index),
            step_low=None if self.step_low is None else self.step_low[index],
            step_high=None if self.step_high is None else self.step_high[index],
            figures=self.figures,
            corrected=self.corrected,
        )


def software_for(cluster: Cluster) -> Software:
    """DeepSpeed's conventions on this kind of hardware."""
    return CPU_DEEPSPEED if cluster.kind == "cpu" else DEEPSPEED


def evaluate(
    spec: ModelSpec,
    job: Job,
    cluster: Cluster,
    c: Candidates,
    *,
    software: Software | None = None,
    own: bool = True,
) -> Estimates:
    """Memory and step time of every candidate, under DeepSpeed's conventions unless told otherwise."""
    memory = evaluate_memory(spec, job, cluster, c, software=software)
    return with_step(spec, job, cluster, memory, software=software, own=own)


def evaluate_memory(
    spec: ModelSpec, job: Job, cluster: Cluster, c: Candidates, *, software: Software | None = None,
    step_only: bool = False,
) -> Estimates:  # fmt: skip
    """Memory of every candidate and its risk, without the time: a search drops what does not fit first.

    Of the run's worst phase; `step_only`: of a training step, as published measurements are.
    """
    software = software or software_for(cluster)
    figures = efficiency_for(cluster.accelerator)
    bucket = reduce_buckets(spec, c)
    run = None if step_only else WholeRun(on_host=cluster.kind == "cpu")
    memory = estimate_memory(
        spec, job, c, bucket=bucket, figures=figures, software=software, run=run
    )
    width = figures["interval.memory_fraction"]
    low, high = interval(memory.device, width)
    risk = risk_above(memory.least, float(cluster.usable_bytes), width)
    usual_risk = risk_above(memory.device, float(cluster.usable_bytes), width)
    if cluster.ram_bytes is not None and cluster.kind != "cpu" and not step_only:
        need = host_of(spec, job, cluster, c, memory, software, figures)
        risk = np.where(lacks(need, cluster), 1.0, risk)
    return Estimates(
        candidates=c,
        memory=memory,
        memory_low=low,
        memory_high=high,
        risk=risk,
        verdict=verdict_index(risk, usual_risk),
        step=None,
        step_low=None,
        step_high=None,
        figures=figures,
    )


def lacks(need: Host, cluster: Cluster) -> Array:
    """Which candidates need more of a node's memory or drives than it is known to have, [n]."""
    ram = np.inf if cluster.ram_bytes is None else cluster.ram_bytes
    nvme = np.inf if cluster.node_nvme_bytes is None else cluster.node_nvme_bytes
    return np.asarray((need.total > ram) | (need.nvme > nvme))


def host_of(
    spec: ModelSpec, job: Job, cluster: Cluster, c: Candidates, memory: Memory,
    software: Software, figures: Efficiency,
) -> Host:  # fmt: skip
    """Host memory and NVMe of one node for every candidate."""
    loads = stage_loads(spec, job.seq_len, c.pp, uniform=software.uniform_stages)
    return host_memory(
        held_weights(spec, job, c, loads, software), c, job,
        parameters=parameter_counts(spec).total, bucket=reduce_buckets(spec, c),
        ranks_per_node=cluster.ranks_per_node,
        device=memory.device if cluster.kind == "cpu" else None, figures=figures,
    )  # fmt: skip


def with_step(
    spec: ModelSpec,
    job: Job,
    cluster: Cluster,
    e: Estimates,
    *,
    software: Software | None = None,
    own: bool = True,
) -> Estimates:
    """The same candidates with their step times; null still where the accelerator's speed is unknown.
    `own`: corrected by this user's own runs on such a machine (planner/own_runs.py)."""
    figures, c = e.figures, e.candidates
    family = (software or software_for(cluster)).family
    speed = speed_of(cluster, job.precision, figures)
    if speed is None:
        return e
    step = estimate_step(
        spec, job, c, cluster, speed,
        bucket=reduce_buckets(spec, c), figures=figures, software=software or software_for(cluster),
    )  # fmt: skip
    kind = "measured_rates" if speed.measured else "datasheet"
    width = figures[f"interval.step_fraction_{kind}"]
    if not speed.measured:
        far = job_distance(spec, job, cluster, software=family)
        width = widened(width, far, figures["interval.step_distance"])
    found = correction(spec, job, cluster, software=family, half_width=width) if own else None
    if found is not None:
        step, width = step.scaled(found.factor), found.half_width
    low, high = interval(step.time_s, width)
    return dataclasses.replace(e, step=step, step_low=low, step_high=high, corrected=found)

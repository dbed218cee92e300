"""Strategies in, estimates out: one array program for one candidate or a million."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlay.planner.cost import run_cost
from outlay.planner.estimate.buckets import reduce_buckets
from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.compute import model_flops_per_token, recomputed_flops_per_token
from outlay.planner.estimate.efficiency import Efficiency, efficiency_for
from outlay.planner.estimate.interval import VERDICTS, interval, risk_above, verdict_index, widened
from outlay.planner.estimate.memory import PHASES, POSITIONS, Memory, estimate_memory
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.software import CPU_DEEPSPEED, DEEPSPEED, Software
from outlay.planner.estimate.step import Step, estimate_step, speed_of
from outlay.planner.nearest import job_distance, nearest
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import plain
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec

SCHEMA_ESTIMATE = "outlay/estimate@1"


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

    def __len__(self) -> int:
        return len(self.candidates)

    def take(self, index: Array) -> Estimates:
        """The estimates that a mask or an index array selects; memory parts included."""
        m, s = self.memory, self.step
        memory = Memory(
            parts={k: v[index] for k, v in m.parts.items()},
            allocated=m.allocated[index],
            device=m.device[index],
            least=m.least[index],
            peak_phase=m.peak_phase[index],
            peak_position=m.peak_position[index],
            by_position=m.by_position[:, index],
            by_phase=m.by_phase[:, index],
        )
        step = s and Step(parts={k: v[index] for k, v in s.parts.items()}, time_s=s.time_s[index])
        return Estimates(
            candidates=self.candidates.take(index),
            memory=memory,
            memory_low=self.memory_low[index],
            memory_high=self.memory_high[index],
            risk=self.risk[index],
            verdict=self.verdict[index],
            step=step,
            step_low=None if self.step_low is None else self.step_low[index],
            step_high=None if self.step_high is None else self.step_high[index],
            figures=self.figures,
        )


def software_for(cluster: Cluster) -> Software:
    """DeepSpeed's conventions on this kind of hardware."""
    return CPU_DEEPSPEED if cluster.kind == "cpu" else DEEPSPEED


def evaluate(
    spec: ModelSpec, job: Job, cluster: Cluster, c: Candidates, *, software: Software | None = None
) -> Estimates:
    """Memory and step time of every candidate, under DeepSpeed's conventions unless told otherwise."""
    memory = evaluate_memory(spec, job, cluster, c, software=software)
    return with_step(spec, job, cluster, memory, software=software)


def evaluate_memory(
    spec: ModelSpec, job: Job, cluster: Cluster, c: Candidates, *, software: Software | None = None
) -> Estimates:
    """Memory of every candidate and its risk, without the time: a search drops what does not fit first."""
    software = software or software_for(cluster)
    figures = efficiency_for(cluster.accelerator)
    bucket = reduce_buckets(spec, c)
    memory = estimate_memory(spec, job, c, bucket=bucket, figures=figures, software=software)
    width = figures["interval.memory_fraction"]
    low, high = interval(memory.device, width)
    risk = risk_above(memory.least, float(cluster.usable_bytes), width)
    usual_risk = risk_above(memory.device, float(cluster.usable_bytes), width)
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


def with_step(
    spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, *, software: Software | None = None
) -> Estimates:
    """The same candidates with their step times; null still where the accelerator's speed is unknown."""
    figures, c = e.figures, e.candidates
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
        family = (software or software_for(cluster)).family
        far = job_distance(spec, job, cluster, software=family)
        width = widened(width, far, figures["interval.step_distance"])
    low, high = interval(step.time_s, width)
    return dataclasses.replace(e, step=step, step_low=low, step_high=high)


def _memory_dict(e: Estimates, spec: ModelSpec, i: int) -> dict[str, Any]:
    m, c = e.memory, e.candidates
    checkpoint = 3 * 4 * parameter_counts(spec).total
    stages = [
        {"stage": name, "device_bytes": round(float(m.by_position[p, i]))}
        for p, name in enumerate(POSITIONS)
        if m.by_position[p, i] > 0 and (int(c.pp[i]) > 1 or p == 0)
    ]
    parts = {name: round(float(values[i])) for name, values in m.parts.items()}
    offloaded = bool(c.offload_optimizer[i]) or bool(c.offload_param[i])
    return {
        "allocated_bytes": round(float(m.allocated[i])),
        "reserved_bytes": round(float(m.allocated[i] + m.parts["fragmentation"][i])),
        "device_bytes": round(float(m.device[i])),
        "low_bytes": round(float(e.memory_low[i])),
        "high_bytes": round(float(e.memory_high[i])),
        "parts": parts,
        "peak_phase": PHASES[int(m.peak_phase[i])],
        "peak_rank": POSITIONS[int(m.peak_position[i])] if int(c.pp[i]) > 1 else "every",
        "phases": {
            "load": None,
            "step": round(float(m.device[i])),
            "eval": None,
            "save": None,
        },
        "stages": stages,
        "host_bytes": None if offloaded else 0,
        "nvme_bytes": None if offloaded else 0,
        "disk_bytes": checkpoint,
    }


def _step_dict(e: Estimates, i: int) -> dict[str, Any] | None:
    if e.step is None or e.step_low is None or e.step_high is None:
        return None
    return {
        "time_s": float(e.step.time_s[i]),
        "low_s": float(e.step_low[i]),
        "high_s": float(e.step_high[i]),
        "parts": {name: float(values[i]) for name, values in e.step.parts.items()},
    }


def _throughput(
    spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, i: int
) -> dict[str, Any] | None:
    if e.step is None:
        return None
    seconds = float(e.step.time_s[i])
    tokens_per_s = job.tokens_per_step / seconds
    per_gpu = tokens_per_s / e.candidates.strategy(i).world
    model_flops = model_flops_per_token(spec, job.seq_len) * per_gpu
    s = e.candidates.strategy(i)
    again = recomputed_flops_per_token(
        spec, job.seq_len, s.activation_checkpointing, s.recompute_layers
    )
    hardware = model_flops + again * per_gpu
    peak = cluster.accelerator.flops.get(job.precision)
    return {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": per_gpu,
        "samples_per_s": job.global_batch / seconds,
        "model_tflops_per_gpu": model_flops / 1e12,
        "mfu": model_flops / peak if peak else None,
        "hfu": hardware / peak if peak else None,
    }


def _run_dict(job: Job, cluster: Cluster, e: Estimates, i: int) -> dict[str, Any]:
    base: dict[str, Any] = {"steps": job.steps, "tokens": job.tokens}
    if e.step is None or e.step_low is None or e.step_high is None:
        return base | dict.fromkeys(("time_s", "gpu_hours", "energy_kwh", "co2e_kg", "cost_usd"))
    cost = run_cost(
        cluster, float(e.step_low[i]), float(e.step.time_s[i]), float(e.step_high[i]), job.steps
    )
    return base | {
        "time_s": cost.time_s.expected,
        "gpu_hours": cost.gpu_hours,
        "energy_kwh": cost.energy_kwh,
        "co2e_kg": None,
        "cost_usd": plain(cost.cost_usd),
    }


def _assumptions(cluster: Cluster, e: Estimates, job: Job) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"what": name, "value": figure.value, "source": f"{figure.kind}: {figure.source}"}
        for name, figure in e.figures.guesses()
    ]
    rows += [{"what": "probe", "value": None, "source": note} for note in cluster.notes]
    if e.step is None:
        rows.append({
            "what": "step time unknown",
            "value": None,
            "source": f"no {job.precision} rate is known for {cluster.accelerator.name}: "
            "measure it with `outlay probe --measure`",
        })  # fmt: skip
    rows.append({
        "what": "the run",
        "value": None,
        "source": "steps only: set-up, evaluation, saves and export are not in time, cost and energy",
    })  # fmt: skip
    return rows


def estimate_dict(
    spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, i: int
) -> dict[str, Any]:
    """Candidate `i` in the format that `outlay estimate --format json` prints."""
    counts = parameter_counts(spec)
    headroom = cluster.usable_bytes - float(e.memory.device[i])
    verdict = VERDICTS[int(e.verdict[i])]
    return {
        "schema": SCHEMA_ESTIMATE,
        "strategy": plain(e.candidates.strategy(i)),
        "job": plain(job),
        "cluster": plain(cluster),
        "model": {
            "name": spec.name,
            "source": spec.source,
            "parameters": counts.total,
            "active_parameters": counts.active,
            "trainable_parameters": counts.total,
            "flops_per_token": model_flops_per_token(spec, job.seq_len),
        },
        "fits": verdict != "no",
        "verdict": verdict,
        "oom_probability": float(np.round(e.risk[i], 4)),
        "headroom_bytes": round(headroom),
        "memory": _memory_dict(e, spec, i),
        "step": _step_dict(e, i),
        "throughput": _throughput(spec, job, cluster, e, i),
        "run": _run_dict(job, cluster, e, i),
        "assumptions": _assumptions(cluster, e, job),
        "nearest": nearest(
            spec, job, cluster, e.candidates.strategy(i), software=software_for(cluster).family
        ),
    }

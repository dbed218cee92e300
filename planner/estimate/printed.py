"""One candidate of an estimate in the format that `outlay estimate --format json` prints."""

from __future__ import annotations

from typing import Any

import numpy as np

from outlay.planner.cost import ranged, run_cost
from outlay.planner.estimate.advice import changes
from outlay.planner.estimate.besides import besides_steps
from outlay.planner.estimate.candidates import Array
from outlay.planner.estimate.compute import model_flops_per_token, recomputed_flops_per_token
from outlay.planner.estimate.disk import disk_parts
from outlay.planner.estimate.estimator import (
    Estimates,
    evaluate,
    evaluate_memory,
    host_of,
    software_for,
)
from outlay.planner.estimate.exported import compression_dict
from outlay.planner.estimate.interval import VERDICTS
from outlay.planner.estimate.memory import (
    POSITIONS,
    adapter_parameters,
)
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.phases import PHASES, STEP_PHASES
from outlay.planner.nearest import nearest
from outlay.planner.own_runs import path as own_path
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import plain
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.units import format_bytes

SCHEMA_ESTIMATE = "outlay/estimate@1"


def _step_s(spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, i: int) -> float | None:
    """Of the same candidate under another job; null where the time is not estimated."""
    if e.step is None:
        return None
    one = e.candidates.take(np.array([i]))
    step = evaluate(spec, job, cluster, one).step
    return None if step is None else float(step.time_s[0])


def _memory_dict(
    e: Estimates, spec: ModelSpec, job: Job, cluster: Cluster, i: int
) -> dict[str, Any]:
    m, c = e.memory, e.candidates
    stages = [
        {"stage": name, "device_bytes": round(float(m.by_position[p, i]))}
        for p, name in enumerate(POSITIONS)
        if m.by_position[p, i] > 0 and (int(c.pp[i]) > 1 or p == 0)
    ]
    parts = {name: round(float(values[i])) for name, values in m.parts.items()}
    return {
        "allocated_bytes": round(float(m.allocated[i])),
        "reserved_bytes": round(float(m.allocated[i] + m.parts["fragmentation"][i])),
        "device_bytes": round(float(m.device[i])),
        "low_bytes": round(float(e.memory_low[i])),
        "high_bytes": round(float(e.memory_high[i])),
        "parts": parts,
        "peak_phase": PHASES[int(m.peak_phase[i])],
        "peak_rank": POSITIONS[int(m.peak_position[i])] if int(c.pp[i]) > 1 else "every",
        "phases": _phases_dict(m.each_phase[:, i]),
        "stages": stages,
        **_beside_the_device(e, spec, job, cluster, i),
    }


def _beside_the_device(
    e: Estimates, spec: ModelSpec, job: Job, cluster: Cluster, i: int
) -> dict[str, Any]:
    """Host memory and NVMe of a node, disk of the run; null for other software than DeepSpeed."""
    if len(e.memory.each_phase) < len(PHASES):
        keys = ("host_bytes", "host_parts", "nvme_bytes", "disk_bytes", "disk_parts")
        return dict.fromkeys(keys)
    one = e.take(np.array([i]))
    host = host_of(spec, job, cluster, one.candidates, one.memory, software_for(cluster), e.figures)
    disk = disk_parts(spec, job, e.candidates.strategy(i))
    return {
        "host_bytes": round(float(host.total[0])),
        "host_parts": {name: round(float(values[0])) for name, values in host.parts.items()},
        "nvme_bytes": round(float(host.nvme[0])),
        "disk_bytes": sum(disk.values()),
        "disk_parts": disk,
    }


def _phases_dict(bytes_by_phase: Array) -> dict[str, int | None]:
    """Peaks of load, step, eval and save on the heaviest rank of each; null where it is not known."""
    known = {PHASES[k]: round(float(v)) for k, v in enumerate(bytes_by_phase)}
    step = round(float(bytes_by_phase[:STEP_PHASES].max()))
    return {"load": known.get("load"), "step": step,
            "eval": known.get("eval"), "save": known.get("save")}  # fmt: skip


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


RUN_KEYS = (
    "time_s", "gpu_hours", "energy_kwh", "energy_low_kwh", "energy_high_kwh", "co2e_kg", "co2e_low_kg",
    "co2e_high_kg", "region", "cost_usd",
)  # fmt: skip


def _run_dict(spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, i: int) -> dict[str, Any]:
    base: dict[str, Any] = {"steps": job.steps, "tokens": job.tokens}
    if e.step is None or e.step_low is None or e.step_high is None:
        return base | dict.fromkeys((*RUN_KEYS, "besides"))
    besides = besides_steps(
        spec, job, cluster, e.candidates.strategy(i), figures=e.figures,
        step_s=float(e.step.time_s[i]), parts={k: float(v[i]) for k, v in e.step.parts.items()},
    )  # fmt: skip
    cost = run_cost(
        cluster, float(e.step_low[i]), float(e.step.time_s[i]), float(e.step_high[i]), job
    )
    return base | {
        "time_s": cost.time_s.expected,
        "gpu_hours": cost.gpu_hours,
        **ranged("energy", "kwh", cost.energy_kwh),
        **ranged("co2e", "kg", cost.co2e_kg),
        "region": cost.region,
        "cost_usd": plain(cost.cost_usd),
        "besides": plain(besides),
    }


def _assumptions(cluster: Cluster, e: Estimates, job: Job) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"what": name, "value": figure.value, "source": f"{figure.kind}: {figure.source}"}
        for name, figure in e.figures.guesses()
    ]
    rows += [{"what": "probe", "value": None, "source": note} for note in cluster.notes]
    if e.corrected is not None:
        rows.append({
            "what": "own measurements",
            "value": e.corrected.factor,
            "source": f"{e.corrected.runs} own runs on such a machine ({own_path()}): the planner's step time "
            f"times this, half width of the interval {e.corrected.half_width:.0%}",
        })  # fmt: skip
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
        "source": "steps only: set-up is not in time, cost and energy; nor evaluation, saves, export (`besides`)",
    })  # fmt: skip
    return rows


def _changes(
    spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, i: int
) -> list[dict[str, Any]] | None:
    """What would make it fit; null for software other than DeepSpeed, whose rules are not known."""
    if VERDICTS[int(e.verdict[i])] == "ok":
        return []
    if len(e.memory.each_phase) < len(PHASES):
        return None
    strategy = e.candidates.strategy(i)
    return changes(
        spec, job, cluster, strategy, lambda job, c: evaluate_memory(spec, job, cluster, c)
    )


def _tight(cluster: Cluster, e: Estimates, i: int) -> list[dict[str, Any]]:
    """Why a footprint near or above what is usable may still run: said where the verdict is tight."""
    if VERDICTS[int(e.verdict[i])] != "tight":
        return []
    usual, least = format_bytes(float(e.memory.device[i])), format_bytes(float(e.memory.least[i]))
    return [{
        "what": "verdict tight",
        "value": None,
        "source": f"usually {usual} of {format_bytes(cluster.usable_bytes)}; torch's allocator gives back what it "
        f"only caches before it fails, down to {least}: the risk of running out is of that",
    }]  # fmt: skip


def _host_said(
    cluster: Cluster, e: Estimates, memory: dict[str, Any], i: int
) -> list[dict[str, Any]]:
    """Said where a node has too little for what goes there, or states go to a host that nobody knows."""
    c, need, ram = e.candidates, memory["host_bytes"], cluster.ram_bytes
    rows = []
    for what, needed, there in (
        ("host memory", need, ram), ("NVMe", memory["nvme_bytes"], cluster.node_nvme_bytes)
    ):  # fmt: skip
        if needed and there is not None and needed > there and cluster.kind != "cpu":
            source = f"a node has {format_bytes(there)} and needs {format_bytes(needed)}: it cannot run there"
            rows.append({"what": what, "value": there, "source": source})
    if rows or ram is not None or not (c.offload_optimizer[i] or c.offload_param[i]):
        return rows
    shown = "unknown" if need is None else format_bytes(need)
    source = f"not known of this hardware, so not in the verdict: offload needs {shown} a node"
    return [{"what": "host memory", "value": None, "source": source}]


def estimate_dict(
    spec: ModelSpec, job: Job, cluster: Cluster, e: Estimates, i: int
) -> dict[str, Any]:
    """Candidate `i` in the format that `outlay estimate --format json` prints."""
    counts = parameter_counts(spec)
    headroom = cluster.usable_bytes - float(e.memory.device[i])
    verdict = VERDICTS[int(e.verdict[i])]
    memory = _memory_dict(e, spec, job, cluster, i)
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
            "trainable_parameters": counts.total
            if job.finetune is None
            else round(adapter_parameters(spec, job.finetune)),
            "flops_per_token": model_flops_per_token(spec, job.seq_len),
        },
        "fits": verdict != "no",
        "verdict": verdict,
        "oom_probability": float(np.round(e.risk[i], 4)),
        "headroom_bytes": round(headroom),
        "memory": memory,
        "changes": _changes(spec, job, cluster, e, i),
        "step": _step_dict(e, i),
        "throughput": _throughput(spec, job, cluster, e, i),
        "run": _run_dict(spec, job, cluster, e, i),
        "compression": compression_dict(
            spec,
            job,
            cluster,
            None if e.step is None else float(e.step.parts["forward"][i]),
            lambda other: _step_s(spec, other, cluster, e, i),
            quantizes=int(e.candidates.tp[i]) == 1,
        ),
        "assumptions": _assumptions(cluster, e, job)
        + _tight(cluster, e, i)
        + _host_said(cluster, e, memory, i),
        "nearest": nearest(
            spec, job, cluster, e.candidates.strategy(i), software=software_for(cluster).family
        ),
    }

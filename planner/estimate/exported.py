"""What a compressed model will be when it is exported: its size in each packing, and whether a limit can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from outlay.planner.compression import check_job, matrices
from outlay.planner.distillation import teacher_spec
from outlay.planner.estimate.compression import cache_bytes, exported_bytes, teacher_of
from outlay.planner.estimate.compute import model_flops_per_token
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.states import width_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.compress import BLOCK_PARTS, Part, Qat
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.profiles.units import format_bytes

CHOICES = (None, Packing(bits=8), Packing(bits=8, dynamic=True), Packing(bits=4, group=32))
"""What is shown; null = dense."""
TRAINED = (Qat(bits=8, activation_bits=8), Qat(bits=4))
"""Quantization-aware training that is shown beside them."""


def smallest_bytes(spec: ModelSpec, width: int) -> int:
    """Every matrix that can be packed at 4 bits in groups of 32 (8 where those do not divide it), an untied
    head too: less `outlay export --at-most` cannot do."""
    parts: tuple[Part, ...] = BLOCK_PARTS if spec.tie_embeddings else (*BLOCK_PARTS, "head")
    total = width * parameter_counts(spec).total
    for m in matrices(spec, parts):
        packing = Packing(bits=8) if m.inputs % 32 else Packing(bits=4, group=32)
        packed = packing.matrix_bytes(m.outputs, m.inputs, width, mixed=True)
        total += m.count * (packed - width * m.outputs * m.inputs)
    return total


def planned_packing(spec: ModelSpec, job: Job) -> tuple[str, int]:
    """(what `outlay export` writes unless told otherwise, its bytes). A mixture is made as large as it may be."""
    width, compress = width_of(job.precision), job.compress
    dense = exported_bytes(spec, width, None)
    if compress is None:
        return "none", dense
    if compress.qat is not None:
        packing = Packing.of_training(compress.qat)
        return packing.name, exported_bytes(spec, width, packing)
    limit = None if compress.export_bytes is None else int(compress.export_bytes)
    if limit is None or dense <= limit:
        return "none", dense
    return "mixed", max(limit, smallest_bytes(spec, width))


def require_export_size(spec: ModelSpec, job: Job) -> None:
    """Raise NotFeasible where the exported weights cannot be as small as the job wants."""
    compress = job.compress
    if compress is None or compress.export_bytes is None:
        return
    limit, (name, size) = int(compress.export_bytes), planned_packing(spec, job)
    if size <= limit:
        return
    least = smallest_bytes(spec, width_of(job.precision))
    raise NotFeasible(
        f"{spec.name} does not become {format_bytes(limit)} when exported", where="compress.export_bytes",
        why=f"as {name} its weights take {format_bytes(size)}; 4 bits in every matrix {format_bytes(least)}",
        do="a larger limit, bf16, qat of 4 bits, `outlay shrink` first, or a smaller student to distil",
    )  # fmt: skip


def compression_dict(
    spec: ModelSpec, job: Job, cluster: Cluster, forward_s: float | None,
    step_s: Callable[[Job], float | None] = lambda _: None, *, quantizes: bool = True,
) -> dict[str, Any] | None:  # fmt: skip
    """The estimate's `compression`; null where the job does not compress.

    `forward_s`: of one step; `step_s`: a step's time under another job, null = unknown; `quantizes`: whether
    quantization-aware training runs under this strategy.
    """
    compress = job.compress
    if compress is None:
        return None
    name, size = planned_packing(spec, job)
    masked = () if compress.pruning is None else matrices(spec, compress.pruning.parts)
    weights = sum(m.weights for m in masked)
    teacher = teacher_of(job)
    return {
        "quantize": name,
        "export_bytes": size,
        "limit_bytes": compress.export_bytes,
        "choices": [
            _choice(spec, other, cluster, packing, step_s(other))
            for packing, other in _jobs(spec, job, quantizes)
        ],
        "masked_weights": weights,
        "zeros": None
        if compress.pruning is None
        else round(weights * compress.pruning.final_sparsity),
        "teacher_parameters": None if teacher is None else parameter_counts(teacher).total,
        "cached_logits_bytes": cache_bytes(spec, job),
        **_caching(spec, job, cluster, forward_s),
    }


def _caching(
    spec: ModelSpec, job: Job, cluster: Cluster, forward_s: float | None
) -> dict[str, float | None]:
    """Before the first step the teacher reads every window of the run once: a step's forward pass times the
    ratio of their FLOPs, for every step. Null where nothing is kept, or speed or price are unknown."""
    distill = None if job.compress is None else job.compress.distill
    if distill is None or distill.top_k is None or forward_s is None:
        return {"caching_s": None, "caching_usd": None}
    flops = [model_flops_per_token(s, job.seq_len) for s in (teacher_spec(distill), spec)]
    seconds = job.steps * forward_s * flops[0] / flops[1]
    price = cluster.price_usd_per_h
    return {"caching_s": seconds, "caching_usd": None if price is None else price * seconds / 3600}


def _jobs(spec: ModelSpec, job: Job, quantizes: bool) -> Iterator[tuple[Packing | None, Job]]:
    """(packing, the job that trains for it): packed after training, then trained for what the model allows."""
    assert job.compress is not None
    said = job.compress
    kept = (said.pruning, said.distill, said.export_bytes)
    after = None if kept == (None, None, None) else replace(said, qat=None)
    for packing in CHOICES:
        yield packing, replace(job, compress=after)
    for qat in TRAINED if quantizes else ():
        other = replace(job, compress=replace(said, qat=qat))
        try:
            check_job(other, spec)
        except UsageError:
            continue
        yield Packing.of_training(qat), other


def _choice(
    spec: ModelSpec, job: Job, cluster: Cluster, packing: Packing | None, step_s: float | None
) -> dict[str, Any]:
    """`decode_floor_s`: reading every weight once for a token, on this accelerator, by software that keeps
    them packed. The loss of quality is measured after training (`outlay eval`, `outlay export --evaluate`)."""
    size, price = exported_bytes(spec, width_of(job.precision), packing), cluster.price_usd_per_h
    rate = cluster.accelerator.memory_bytes_per_s
    if rate is None and cluster.rates is not None:
        rate = cluster.rates.memory_bytes_per_s
    steps_s = None if step_s is None else job.steps * step_s
    return {
        "quantize": "none" if packing is None else packing.name,
        "trained_for": job.compress is not None and job.compress.qat is not None,
        "bytes": size,
        "decode_floor_s": None if rate is None else size / rate,
        "steps_s": steps_s,
        "steps_usd": None if steps_s is None or price is None else price * steps_s / 3600,
        "loss_difference": "unknown",
    }

"""What a compressed model will be when it is exported: its size in each packing, and whether a limit can hold."""

from __future__ import annotations

from typing import Any

from outlay.planner.compression import matrices
from outlay.planner.distillation import teacher_spec
from outlay.planner.estimate.compression import cache_bytes, exported_bytes, teacher_of
from outlay.planner.estimate.compute import model_flops_per_token
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.states import width_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.compress import BLOCK_PARTS, Part
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import NotFeasible
from outlay.profiles.units import format_bytes

CHOICES = (None, Packing(bits=8), Packing(bits=8, dynamic=True), Packing(bits=4, group=32))
"""What is shown; null = dense."""


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
    spec: ModelSpec, job: Job, cluster: Cluster, forward_s: float | None
) -> dict[str, Any] | None:
    """The estimate's `compression`; null where the job does not compress. `forward_s`: of one step."""
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
        "choices": [_choice(spec, job, cluster, packing) for packing in CHOICES],
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


def _choice(spec: ModelSpec, job: Job, cluster: Cluster, packing: Packing | None) -> dict[str, Any]:
    """`decode_floor_s`: reading every weight once for a token, on this accelerator, by software that keeps
    them packed. The loss of quality is measured after training (`outlay export --evaluate`)."""
    size = exported_bytes(spec, width_of(job.precision), packing)
    rate = cluster.accelerator.memory_bytes_per_s
    if rate is None and cluster.rates is not None:
        rate = cluster.rates.memory_bytes_per_s
    return {
        "quantize": "none" if packing is None else packing.name,
        "bytes": size,
        "decode_floor_s": None if rate is None else size / rate,
        "loss_difference": "unknown",
    }

"""Bytes on disk that a run leaves or passes through: checkpoints, the export, tokenized data."""

from __future__ import annotations

from outlay.planner.estimate.compression import cache_bytes
from outlay.planner.estimate.memory import adapter_parameters
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.estimate.states import (
    PAGED,
    deepspeed_moments,
    optimizer_key,
    width_of,
)
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

CHECKPOINTS_KEPT = 2
"""The newest that `outlay run` keeps (runner/checkpoint.py, `save_checkpoint`)."""
_WIDE_VOCABULARY = 2**16
"""Tokens are stored in two bytes up to here, else in four (runner/data/prepare.py)."""


def checkpoint_bytes(spec: ModelSpec, job: Job, strategy: Strategy) -> int:
    """All files of one checkpoint of DeepSpeed 0.19.8, over all ranks.

    Weights in the precision of the run, but under stage 3, whose weights follow from the master weights;
    fp32 master weights wherever DeepSpeed holds them (not at stage 0 in fp32); the moments. A pipeline's
    last stage has a copy of a tied table. A few kB a rank and a tensor for names are left out. Of adapters
    they alone (transformers' Trainer passes `exclude_frozen_parameters` to DeepSpeed with peft).
    """
    width, zero = width_of(job.precision), strategy.zero
    counts = parameter_counts(spec)
    parameters, root = counts.total, (counts.embedding + counts.final + counts.head) / counts.total
    if strategy.pp > 1 and spec.tie_embeddings:
        parameters += spec.vocab * (spec.embedding_width or spec.hidden)
    if job.finetune is not None:
        parameters = round(adapter_parameters(spec, job.finetune))
    weights = 0 if zero == 3 else width
    master = 0 if zero == 0 and width == 4 else 4
    moments = float(deepspeed_moments(optimizer_key(job), zero, width, root))
    moments = PAGED.get(job.optimizer.name, moments)
    return round((weights + master + moments) * parameters)


def export_bytes(spec: ModelSpec, job: Job) -> int:
    """safetensors in the precision of the run; tied weights once. Adapters beside the whole that they are merged
    into (runner/export.py)."""
    parameters = float(parameter_counts(spec).total)
    if job.finetune is not None:
        parameters += adapter_parameters(spec, job.finetune)
    return round(width_of(job.precision) * parameters)


def disk_parts(spec: ModelSpec, job: Job, strategy: Strategy) -> dict[str, int]:
    """At the fullest moment, while one checkpoint more than those kept is being written.

    `data`: every token of the run stored once; less where the run reads its data several times.
    """
    token_bytes = 2 if spec.vocab <= _WIDE_VOCABULARY else 4
    logits = cache_bytes(spec, job)
    return {
        "checkpoints": (CHECKPOINTS_KEPT + 1) * checkpoint_bytes(spec, job, strategy),
        "export": export_bytes(spec, job),
        "data": token_bytes * job.tokens,
        **({"teacher_logits": logits} if logits else {}),
    }

"""What compressing costs and gives, before anything is spent: bytes on disk of the exported weights, and what
masks, fake quantization, a teacher and cached logits add to a rank's memory and a step's time.

As `outlay run` does it (`runner/compress/`). Arrays are [3, n] (pipeline position × candidate) or [n].
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from outlay.planner.compression import Matrix, matrices
from outlay.planner.distillation import teacher_spec
from outlay.planner.estimate.activations import Execution
from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.estimate.communication import Figures
from outlay.planner.estimate.compute import model_flops_per_token
from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.estimate.phases import Alive, Working, evaluation_working
from outlay.planner.spec.compress import BLOCK_PARTS, Distill
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.packing import Packing

QUANTIZER_BYTES = 166
"""Read and written for each fake-quantized number and micro-batch, in fp32 whatever the model's precision:
64 in the forward pass, the same again in the backward pass, which makes it anew, and 38 for the gradient.
Counted operator by operator under torchao 0.18 (docs/log.md, 2026-11-24)."""
QUANTIZER_ALIVE_BYTES = 24
"""Alive for each number of the matrix at work in its backward pass: the rounded copy, what clamp and masks keep,
and two temporaries."""
QUANTIZER_STARTS = (98.0, 178.0)
"""Operators that a fake-quantized layer starts a micro-batch, of weights alone and with inputs: counted alike."""
SOFT_ROWS_BYTES = 1 << 24
SOFT_ROWS_ALIVE = (3.0, 1.0)
"""fp32 copies of the rows at work (runner/compress/soft_loss.py) with a teacher's logits, and with kept ones."""
SOFT_PASSES = 10
"""Times that the distillation's rows of logits are read or written in fp32 (runner/compress/soft_loss.py)."""
MASK_PASSES = 3 * 2 + 1
"""Weight and both moments read and written at each step, and the mask read, in units of their bytes."""


def exported_bytes(
    spec: ModelSpec, width: int, packing: Packing | None, *, mixed: bool = False
) -> int:
    """safetensors of the whole model, tied weights once; the matrices of the blocks packed, the rest in
    `width` bytes a weight.

    Names and headers of the files are left out: 0.1 to 0.2 kB a tensor, 0.8 % of a model of 1.3 M
    parameters, nothing of a real one. Head and token table are not packed, as transformers does not by
    default.
    """
    total = width * parameter_counts(spec).total
    if packing is None:
        return total
    for m in matrices(spec, BLOCK_PARTS):
        packed = packing.matrix_bytes(m.outputs, m.inputs, width, mixed=mixed)
        total += m.count * (packed - width * m.outputs * m.inputs)
    return total


@functools.lru_cache(maxsize=8)
def _teacher(distill: Distill) -> ModelSpec:
    return teacher_spec(distill)


def teacher_of(job: Job) -> ModelSpec | None:
    """The teacher that works beside the student; null where there is none, or its logits are kept."""
    distill = None if job.compress is None else job.compress.distill
    return None if distill is None or distill.top_k is not None else _teacher(distill)


def cache_bytes(spec: ModelSpec, job: Job) -> int:
    """On disk: fp16 log-probability and token number of each kept token, and a hash for each window.

    Every window of the run once; less where the run reads its data several times.
    """
    distill = None if job.compress is None else job.compress.distill
    if distill is None or distill.top_k is None:
        return 0
    number = 2 if spec.vocab <= 2**16 else 4
    return job.tokens * min(distill.top_k, spec.vocab) * (2 + number) + 8 * (
        job.tokens // job.seq_len
    )


def with_states(
    phases: tuple[Alive, ...], spec: ModelSpec, job: Job, c: Candidates, weights: Array, width: int,
    load: int,
) -> tuple[Alive, ...]:  # fmt: skip
    """The weights' side with what compression keeps beside it. `weights`: of a rank before data parallelism
    divides them; `load`: index of the phase before which none of it exists."""
    compress = job.compress
    if compress is None:
        return phases
    masks = np.zeros_like(weights)
    if compress.pruning is not None:
        share = _masked(spec, job) / parameter_counts(spec).total
        masks = share * weights / np.where(c.zero >= 1, c.dp * c.cp * c.sp, 1)
    teacher, at_work = np.zeros_like(weights), np.zeros_like(weights)
    taught = teacher_of(job)
    if taught is not None and compress.distill is not None:
        whole = float(width * parameter_counts(taught).total)
        split = compress.distill.teacher_zero == 3
        teacher = teacher + (whole / c.dp if split else whole)
        at_work = at_work + (width * float(largest_matrix(taught)) if split else 0.0)
    made = []
    for i, phase in enumerate(phases):
        if i == load:
            made.append(phase)
            continue
        work = at_work if phase.workspace is None else phase.workspace + at_work
        made.append(
            dataclasses.replace(
                phase, fixed=phase.fixed + masks + teacher, parameters=phase.parameters + teacher,
                optimizer_states=phase.optimizer_states + masks, workspace=work,
            )
        )  # fmt: skip
    return tuple(made)


def _masked(spec: ModelSpec, job: Job) -> int:
    pruning = None if job.compress is None else job.compress.pruning
    return 0 if pruning is None else sum(m.weights for m in matrices(spec, pruning.parts))


def _quantized(spec: ModelSpec, job: Job) -> tuple[Matrix, ...]:
    qat = None if job.compress is None else job.compress.qat
    return () if qat is None else matrices(spec, qat.parts)


def with_working(
    phases: tuple[Working | None, ...], spec: ModelSpec, job: Job, c: Candidates, ex: Execution,
) -> tuple[Working | None, ...]:  # fmt: skip
    """The batch's side: (loss, first backward, last backward, …) with fake quantizers and a teacher's pass."""
    if job.compress is None:
        return phases
    loss, first, last, *rest = phases
    assert loss is not None and first is not None and last is not None
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    at_work = np.zeros(len(c))
    for m in _quantized(spec, job):
        inputs = tokens * m.inputs * _quantizes_inputs(job)
        at_work = np.maximum(at_work, QUANTIZER_ALIVE_BYTES * (m.inputs * m.outputs + inputs))
    loss = _with_soft(loss, spec, job, c, ex, tokens)
    # the head's own pass is not quantized: at the loss nothing of it is alive
    return (
        loss,
        dataclasses.replace(first, activations=first.activations + at_work),
        dataclasses.replace(last, activations=last.activations + at_work),
        *rest,
    )


def _quantizes_inputs(job: Job) -> bool:
    qat = None if job.compress is None else job.compress.qat
    return qat is not None and qat.activation_bits is not None


def _with_soft(
    loss: Working, spec: ModelSpec, job: Job, c: Candidates, ex: Execution, tokens: Array
) -> Working:
    """At the loss: beside the text's, the divergence's gradient, as large as the logits; before that the rows
    that it is made from, or what a forward pass of the teacher holds."""
    distill = None if job.compress is None else job.compress.distill
    if distill is None:
        return loss
    gradient, wide = tokens * spec.vocab * ex.width, tokens * spec.vocab * 4.0
    rows = np.minimum(wide, SOFT_ROWS_BYTES)
    teacher, kept = teacher_of(job), np.zeros(len(c))
    # logits and the text's log-probabilities are alive while the rows are worked on
    at_rows = gradient + wide + gradient + SOFT_ROWS_ALIVE[teacher is None] * rows
    if teacher is not None:
        working = evaluation_working(teacher, job, c, ex, np.ones((3, len(c))))
        at_rows = np.maximum(at_rows, gradient + wide + working.total.max(axis=0))
        if distill.hidden > 0:
            kept = tokens * (teacher.layers + 1 + spec.layers) * spec.hidden * ex.width
    else:
        at_rows = at_rows + tokens * min(distill.top_k or 0, spec.vocab) * 10.0
    text = gradient * 0.0 if loss.logits is None else loss.logits
    return dataclasses.replace(
        loss, activations=loss.activations + kept, logits=np.maximum(text + gradient, at_rows)
    )


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Seconds that compression adds, [n]."""

    forward: Array
    """A micro-batch: the teacher, fake quantizers."""
    backward: Array
    """A micro-batch: fake quantizers again and their gradients."""
    step: Array
    """A step: masks."""


def extra_s(
    spec: ModelSpec, job: Job, c: Candidates, forward: Array, memory_bytes_per_s: float | Array,
    figures: Figures, *, start_hidden: bool,
) -> Extra | None:  # fmt: skip
    """`forward`: the student's forward pass of a micro-batch. Null where nothing is compressed.

    The teacher's pass takes the student's by their ratio of FLOPs; that its gathers at `teacher_zero: 3` hide
    behind it is assumed. All else is memory traffic, and starting operators where that is not hidden.
    """
    if job.compress is None:
        return None
    memory_bytes_per_s = memory_bytes_per_s * figures["compression.elementwise_fraction"]
    tokens = c.micro_batch * job.seq_len / (c.cp * c.sp)
    numbers = np.zeros(len(c))
    for m in _quantized(spec, job):
        inputs = tokens * m.inputs * m.count * _quantizes_inputs(job)
        numbers = numbers + m.weights + inputs
    quantizing = numbers * QUANTIZER_BYTES / c.pp / memory_bytes_per_s
    if not start_hidden:
        layers = sum(m.count for m in _quantized(spec, job)) / c.pp
        operators = QUANTIZER_STARTS[_quantizes_inputs(job)] * figures["compute.operator_start_s"]
        quantizing = quantizing + layers * (operators + figures["compute.checkpoint_start_s"])
    taught, soft = np.zeros(len(c)), np.zeros(len(c))
    if job.compress.distill is not None:
        soft = SOFT_PASSES * 4.0 * tokens * spec.vocab / memory_bytes_per_s
    teacher = teacher_of(job)
    if teacher is not None:
        ratio = model_flops_per_token(teacher, job.seq_len) / model_flops_per_token(
            spec, job.seq_len
        )
        taught = forward * ratio
    masked = _masked(spec, job) / (c.tp * c.pp) / np.where(c.zero >= 1, c.dp, 1)
    return Extra(
        forward=taught + soft + quantizing * 64 / QUANTIZER_BYTES,
        backward=quantizing * (1 - 64 / QUANTIZER_BYTES),
        step=masked * 4.0 * MASK_PASSES / memory_bytes_per_s,
    )

"""What `outlay run` does not execute of a compression."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import OFFLOAD, Array, Candidates
from outlay.planner.rules.core import Context, rule

COMPRESS_RULES = (
    "quantizes_whole_matrices",
    "masks_masters_in_memory",
    "pipeline_prunes_one_copy",
    "pattern_divides_slices",
    "quantized_head_makes_logits",
)
"""Those of this file; the runner refuses by them too (runner/refuse.py)."""


@rule(
    "quantizes_whole_matrices",
    "runner",
    "runner/compress/qat.py: DeepSpeed's sliced layers would take the place of the fake-quantized ones",
    lambda s, x: f"quantization-aware training is not run over tensor-parallel slices (tp {s.tp})",
)
def quantizes_whole_matrices(c: Candidates, x: Context) -> Array:
    quantizes = x.job.compress is not None and x.job.compress.qat is not None
    return np.asarray((c.tp > 1) & quantizes)


@rule(
    "quantized_head_makes_logits",
    "runner",
    "runner/loss.py: a fused or chunked loss reads the head's weight itself, past its fake quantizer",
    lambda s, x: (
        f"the head is trained quantized, which loss {s.loss} would not see: plan with --loss plain"
    ),
)
def quantized_head_makes_logits(c: Candidates, x: Context) -> Array:
    qat = x.job.compress.qat if x.job.compress is not None else None
    return np.asarray((c.loss > 0) & (qat is not None and "head" in qat.parts))


@rule(
    "masks_masters_in_memory",
    "runner",
    "runner/compress/masks.py masks fp32 masters in place; DeepSpeed has swapped them out between steps",
    lambda s, x: (
        "pruning is not run with the optimizer's states on NVMe; use --offload-optimizer cpu"
    ),
)
def masks_masters_in_memory(c: Candidates, x: Context) -> Array:
    prunes = x.job.compress is not None and x.job.compress.pruning is not None
    return np.asarray((c.offload_optimizer == OFFLOAD.index("nvme")) & prunes)


@rule(
    "pipeline_prunes_one_copy",
    "runner",
    "runner/stage.py: the first and the last stage each hold a copy of a tied table",
    lambda s, x: (
        f"head and embedding of {x.spec.name} are tied, and both ends of a pipeline (pp {s.pp}) hold a copy: "
        "prune the blocks alone, or plan with --pp 1"
    ),
)
def pipeline_prunes_one_copy(c: Candidates, x: Context) -> Array:
    pruning = x.job.compress.pruning if x.job.compress is not None else None
    tables = pruning is not None and bool({"head", "embedding"} & set(pruning.parts))
    return np.asarray((c.pp > 1) & (tables and x.spec.tie_embeddings))


@rule(
    "pattern_divides_slices",
    "runner",
    "runner/parallel/tensor.py cuts output projections along their inputs",
    lambda s, x: (
        f"a slice of {s.tp} tensor-parallel ranks does not divide into the groups of compress.pruning.pattern; "
        "another pattern, or a smaller --tp"
    ),
)
def pattern_divides_slices(c: Candidates, x: Context) -> Array:
    from outlay.planner.compression import matrices

    pruning = x.job.compress.pruning if x.job.compress is not None else None
    if pruning is None or pruning.pattern is None:
        return np.zeros(len(c), bool)
    group, bad = pruning.kept_of()[1], np.zeros(len(c), bool)
    for matrix in matrices(x.spec, pruning.parts):
        bad |= (c.tp > 1) & (matrix.inputs // c.tp % group != 0)
    return bad

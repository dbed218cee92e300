"""What `outlay run` does not execute of tensor, sequence and expert parallel."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import OFFLOAD, Array, Candidates
from outlay.planner.rules.core import Context, rule

TENSOR_PARALLEL_FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Families that runner/parallel/tensor.py cuts; a test trains each."""
SEQUENCE_PARALLEL_FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Families whose attention takes positions, as Ulysses asks; a test trains each."""
PARALLEL_RULES = (
    "runner_cuts_its_families",
    "runner_splits_sequences_of_its_families",
    "tensor_parallel_alone",
    "nvme_with_data_parallel_alone",
    "ulysses_drops_masks",
)
"""Those of this file; the runner refuses by them too (runner/refuse.py)."""


@rule(
    "runner_cuts_its_families",
    "runner",
    "runner/parallel/tensor.py knows how to cut " + ", ".join(TENSOR_PARALLEL_FAMILIES),
    lambda s, x: (
        f"outlay run does not train {x.spec.family} tensor parallel (tp {s.tp}); it cuts "
        + ", ".join(TENSOR_PARALLEL_FAMILIES)
    ),
)
def runner_cuts_its_families(c: Candidates, x: Context) -> Array:
    return np.asarray((c.tp > 1) & (x.spec.family not in TENSOR_PARALLEL_FAMILIES))


@rule(
    "runner_splits_sequences_of_its_families",
    "runner",
    "runner/parallel/sequence.py was tried with " + ", ".join(SEQUENCE_PARALLEL_FAMILIES),
    lambda s, x: (
        f"outlay run does not train {x.spec.family} sequence parallel (sp {s.sp}); it takes "
        + ", ".join(SEQUENCE_PARALLEL_FAMILIES)
    ),
)
def runner_splits_sequences_of_its_families(c: Candidates, x: Context) -> Array:
    return np.asarray((c.sp > 1) & (x.spec.family not in SEQUENCE_PARALLEL_FAMILIES))


@rule(
    "tensor_parallel_alone",
    "runner",
    "runner/parallel/tensor.py: DeepSpeed's AutoTP makes groups for data and tensor parallel alone "
    "(utils/groups.py, _init_tp_mesh_device); with a pipeline the groups are runner/parallel/grid.py's, which was "
    "not tried with pruning",
    lambda s, x: (
        f"outlay run does not combine tensor parallel (tp {s.tp}) with sp {s.sp}, ep {s.ep}"
        + (f", nor with pp {s.pp} and compression" if s.pp > 1 and x.job.compress else "")
    ),
)
def tensor_parallel_alone(c: Candidates, x: Context) -> Array:
    compressed = (c.pp > 1) & (x.job.compress is not None)
    return np.asarray((c.tp > 1) & ((c.sp > 1) | (c.ep > 1) | compressed))


@rule(
    "nvme_with_data_parallel_alone",
    "runner",
    "runner/swap_state.py was tried with data parallel ranks alone",
    lambda s, x: (
        f"outlay run does not combine offload to NVMe with tp {s.tp}, sp {s.sp}, pp {s.pp}"
    ),
)
def nvme_with_data_parallel_alone(c: Candidates, x: Context) -> Array:
    nvme = (c.offload_optimizer == OFFLOAD.index("nvme")) | (
        c.offload_param == OFFLOAD.index("nvme")
    )
    return np.asarray(nvme & ((c.tp > 1) | (c.sp > 1) | (c.pp > 1)))


@rule(
    "ulysses_drops_masks",
    "runner",
    "runtime/sequence_parallel/ulysses_sp.py, uattn_wrapper: every mask is dropped, so that attention is "
    "causal over the whole sequence; eager attention would need the mask and is refused there",
    lambda s, x: (
        f"sp {s.sp} with attention {x.job.attention} over {x.job.seq_len} tokens of {x.spec.family}: DeepSpeed's "
        "Ulysses runs plain causal attention, no eager one and no window shorter than the sequence"
    ),
)
def ulysses_drops_masks(c: Candidates, x: Context) -> Array:
    windows = [block.attention.window for block in x.spec.blocks]
    short = any(window is not None and window < x.job.seq_len for window in windows)
    return np.asarray((c.sp > 1) & (short or x.job.attention == "eager"))

"""What `outlay emit` has no words for: a plan made for another trainer would be refused when it is written.

Kind `json`: DeepSpeed's JSON, which all of them read. Kind `trainer`: programs on transformers' Trainer, and
Accelerate. Each says who can instead.
"""

from __future__ import annotations

import numpy as np

from outlay.planner.emit.optimizer import TYPES
from outlay.planner.estimate.candidates import CHECKPOINTING, Array, Candidates
from outlay.planner.rules.core import Context, rule
from outlay.planner.spec.job import Job

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""Those that DeepSpeed's JSON has words for; tf32 is torch's switch beside it."""
_ADAM = ("adamw", "adam")


@rule(
    "json_names_the_optimizer",
    "json",
    "runtime/engine.py, `_configure_basic_optimizer`: names of its own and of torch.optim",
    lambda s, x: (
        f"DeepSpeed's JSON has no name for the optimizer {x.job.optimizer.name}, so no `outlay emit` target writes "
        "it; `--for runner` trains with it, or plan with --optimizer adamw"
    ),
)
def json_names_the_optimizer(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.job.optimizer.name not in TYPES)


@rule(
    "json_names_the_precision",
    "json",
    "runtime/config.py reads the blocks bf16 and fp16",
    lambda s, x: f"DeepSpeed's JSON has no words for {x.job.precision}; plan with --precision bf16",
)
def json_names_the_precision(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.job.precision not in PRECISIONS)


@rule(
    "trainer_writes_adam",
    "trainer",
    "planner/emit: learning rate, betas, eps and weight decay are the Trainer's arguments, which are Adam's",
    lambda s, x: (
        f"`outlay emit` writes AdamW and Adam for a Trainer, not {x.job.optimizer.name}; `--for deepspeed` writes "
        "its JSON, `--for runner` trains with it"
    ),
)
def trainer_writes_adam(c: Candidates, x: Context) -> Array:
    return np.full(len(c), x.job.optimizer.name not in _ADAM)


@rule(
    "trainer_shares_by_zero_alone",
    "trainer",
    "planner/emit: a Trainer's arguments have no words for it",
    lambda s, x: (
        f"{s.label()}: for a Trainer `outlay emit` writes ZeRO, offload, micro-batch, and recomputation of all layers "
        "or none; other ways to divide the model, and other losses, need `--for deepspeed` or `--for runner`"
    ),
)
def trainer_shares_by_zero_alone(c: Candidates, x: Context) -> Array:
    divided = (c.tp * c.pp * c.vpp * c.cp * c.sp * c.ep != 1) | (c.sequence_parallel > 0)
    selective = c.activation_checkpointing == CHECKPOINTING.index("selective")
    return np.asarray(divided | selective | (c.recompute_layers >= 0) | (c.loss > 0))


def _unwritten(job: Job, *, encoder_decoder: bool) -> str:
    """What of a job no Trainer's file says; empty where all of it is."""
    method = job.finetune.method if job.finetune else None
    parts = (
        (f"adapters ({method})", method not in (None, "lora")),
        ("compression", job.compress is not None),
        ("an expert capacity", job.expert_capacity is not None),
        ("blocks through torch.compile", job.compile),
        ("an encoder-decoder", encoder_decoder or job.target_len is not None),
    )
    return ", ".join(what for what, present in parts if present)


@rule(
    "trainer_writes_plain_jobs",
    "trainer",
    "planner/emit/order.py: a Trainer would silently train something else",
    lambda s, x: (
        f"no `outlay emit` target of a Trainer writes {_unwritten(x.job, encoder_decoder=x.spec.encoder_decoder)}; "
        "`outlay run` (`--for runner`) may train so, or plan without it"
    ),
)
def trainer_writes_plain_jobs(c: Candidates, x: Context) -> Array:
    return np.full(len(c), bool(_unwritten(x.job, encoder_decoder=x.spec.encoder_decoder)))


@rule(
    "trainer_adapts_q_and_v",
    "trainer",
    "planner/emit/frameworks.py: axolotl and LLaMA-Factory name the matrices as the model's code does",
    lambda s, x: (
        f"LoRA is on q and v, and {x.spec.name} has no such matrices (q, k and v are one, or go through a latent): "
        "plan with --finetune full"
    ),
)
def trainer_adapts_q_and_v(c: Candidates, x: Context) -> Array:
    odd = any(b.attention.fused_qkv or b.attention.kv_rank for b in x.spec.blocks)
    return np.full(len(c), x.job.finetune is not None and odd)

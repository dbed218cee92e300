"""What an emitter gets, and what it gives back."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Order:
    """A plan that DeepSpeed runs as its JSON says, and what a person named besides."""

    plan: Plan
    spec: ModelSpec
    where: str
    """The plan's file."""
    deepspeed: dict[str, Any]
    """The JSON, every value explicit, for the DeepSpeed that was asked for."""
    version: str = "0.19.8"
    """The DeepSpeed that it is for."""
    base_model: str | None = None
    """Hub id or folder of weights and tokenizer, as the nodes see it."""
    data: str | None = None
    """Text to train on, as the nodes see it."""
    hosts: tuple[str, ...] = ()
    """One name a node."""
    image: str | None = None
    """Container image."""
    lines: tuple[str, ...] = ()
    """Further lines for the scheduler, as a person writes them there."""

    @property
    def weights(self) -> str | None:
        return self.base_model or self.plan.model.weights

    @property
    def head(self) -> str:
        """First comment of each file that has comments."""
        return f"Written by outlay {self.plan.outlay_version} from {Path(self.where).name}"

    @property
    def name(self) -> str:
        """The model's name in the characters that job names may have."""
        kept = "".join(
            c if c.isascii() and c.isalnum() else "-" for c in self.plan.model.name.lower()
        )
        return f"outlay-{kept}"[:50].rstrip("-")


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """Files of a folder, and the command that starts them from within it."""

    files: dict[str, str]
    command: str
    notes: tuple[str, ...] = ()
    """What the plan does not say and the files had to."""


def require_plain(order: Order, target: str, *, adapters: bool = False) -> None:
    """Raise UsageError for what a trainer on transformers would silently do otherwise.

    `adapters`: this one trains LoRA and QLoRA.
    """
    plan, strategy, job = order.plan, order.plan.strategy, order.plan.job
    whole = "plan --for trainer; or emit deepspeed, which has the words for it"
    own = "plan --for trainer; or emit deepspeed, where this is your own code's"
    none = "no target writes it; plan without it"
    method = job.finetune.method if job.finetune else None
    problems = [
        ("tensor parallelism", strategy.tp > 1, whole),
        ("pipeline parallelism", strategy.pp > 1, f"{whole}; outlay run trains so"),
        ("sequence parallelism", strategy.sp > 1, whole),
        ("context parallelism", strategy.cp > 1, none),
        ("interleaved pipeline stages", strategy.vpp > 1, none),
        ("Megatron's sequence parallelism", strategy.sequence_parallel, none),
        ("expert parallelism", strategy.ep > 1, own),
        (f"a {strategy.loss} loss", strategy.loss != "plain", own),
        ("selective recomputation", strategy.activation_checkpointing == "selective", own),
        ("recomputation of some layers only", strategy.recompute_layers is not None, own),
        (f"adapters ({method})", method is not None and not (adapters and method == "lora"),
         "emit axolotl and emit llamafactory write LoRA and QLoRA" if method == "lora" else none),
        ("compression", job.compress is not None, "outlay run trains so"),
        ("an expert capacity", job.expert_capacity is not None, "outlay run drops so; or plan without it"),
        ("blocks through torch.compile", job.compile, "outlay run trains so; or plan without it"),
        (f"the optimizer {job.optimizer.name}", job.optimizer.name not in ("adamw", "adam"),
         "emit deepspeed has the words for it"),
        ("an encoder-decoder", job.target_len is not None, none),
    ]  # fmt: skip
    for what, present, do in problems:
        if present:
            raise UsageError(
                f"the plan has {what}, which emit {target} cannot express",
                where=order.where,
                why=f"strategy {strategy.label()}, optimizer {job.optimizer.name}",
                do=do,
            )
    if plan.cluster.kind not in ("gpu", "cpu"):
        raise UsageError(
            f"DeepSpeed's launchers do not start on {plan.cluster.accelerator.title}",
            where=order.where,
        )


def require_gpu(order: Order, target: str) -> None:
    if order.plan.cluster.kind != "gpu":
        raise UsageError(
            f"emit {target} writes for GPUs, and the plan is for {order.plan.cluster.accelerator.title}",
            where=order.where,
            do="emit trainer and emit accelerate write for CPUs",
        )


def required_base_model(order: Order, target: str) -> str:
    """Weights and tokenizer, compared with the plan's model where they lie on this machine."""
    if order.weights is None:
        raise UsageError(
            f"{target} starts from weights and a tokenizer, and the plan names none",
            where=order.where,
            do="pass --base-model, a hub id or a folder as the nodes see it",
        )
    config = Path(order.weights).expanduser() / "config.json"
    if config.is_file():
        _require_same_shape(order, config)
    return order.weights


def _require_same_shape(order: Order, config: Path) -> None:
    from outlay.planner.estimate.parameters import parameter_counts
    from outlay.planner.spec.families import resolve_model

    spec, _ = resolve_model(str(config))
    found, planned = parameter_counts(spec).total, parameter_counts(order.spec).total
    if found != planned:
        raise UsageError(
            "this is another model than the plan's",
            where=f"--base-model {order.weights}",
            why=f"{found:,} parameters, planned {planned:,}",
            do="plan again with --model and this folder",
        )


_TABLES = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def required_text(order: Order, target: str) -> tuple[str, str]:
    """The text's path and its kind: text | json | csv | parquet | arrow."""
    job_data = order.plan.job.data
    path = order.data or (job_data.path if job_data and job_data.format == "text" else None)
    if path is None:
        raise UsageError(
            f"{target}'s file names the text to train on, and the plan has none",
            where=order.where,
            do="pass --data: a .txt file, or .jsonl, .csv or .parquet with a column text",
        )
    suffix = posixpath.splitext(path)[1].lower()
    if suffix != ".txt" and suffix not in _TABLES:
        raise UsageError(
            f"what kind of file is {path!r}?",
            where="--data",
            do=f"end its name in .txt, {', '.join(_TABLES)}",
        )
    return path, _TABLES.get(suffix, "text")

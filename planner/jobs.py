"""Job files and flags → a Job. What nobody said is filled by a stated default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlay.planner.amount import (
    Notes,
    amount_of,
    finetune_of,
    fraction_of,
    money_of,
    project_note,
)
from outlay.planner.amount import data_of as data_of
from outlay.planner.amount import tokens_of as tokens_of
from outlay.planner.assumed import parse_assumed
from outlay.planner.compression import check_compression
from outlay.planner.cost import carbon_of
from outlay.planner.method_flags import CAPPED_FAMILY, take_method_flags
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.compress import Compression, with_flags
from outlay.planner.spec.files import parse, read_mapping
from outlay.planner.spec.job import SCHEMA_JOB, Data, Finetune, Job, Optimizer, Schedule
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError, UsageError
from outlay.profiles.units import parse_count


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """The keys of a job file; the same names as the flags. Everything may be left out."""

    model: str | None = None
    hardware: str | None = None
    data: Data | str | None = None
    epochs: float | None = None
    tokenizer: str | None = None
    packing: bool | None = None
    tokens: str | int | None = None
    steps: int | None = None
    seq_len: int | None = None
    global_batch: int | None = None
    precision: str | None = None
    optimizer: Optimizer | str | None = None
    finetune: Finetune | str | None = None
    compress: Compression | None = None
    schedule: Schedule | None = None
    gradient_clipping: float | None = None
    attention: str | None = None
    compile: bool | None = None
    expert_capacity: float | None = None
    budget: tuple[str, ...] | str | None = None
    currency: str | None = None
    rate: dict[str, float] | tuple[str, ...] | str | None = None
    region: str | None = None
    assume: dict[str, float | str] | tuple[str, ...] | str | None = None
    attempts: int | None = None
    pilot: str | float | None = None
    price_usd_per_h: float | None = None
    inter_node_gbps: float | None = None
    seed: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    schema: str = SCHEMA_JOB


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A job with what was assumed on the way."""

    job: Job
    assumptions: list[dict[str, Any]] = field(default_factory=list)


DEFAULT_SEQ_LEN = 2048
DEFAULT_TOKENS = 1_000_000_000
DEFAULT_BATCH_PER_RANK = 8
MOST_TOKENS = 10**16
CLEARLY_FASTER = 2.0
"""bf16 on CPU must multiply that much faster than fp32 to be chosen: its casts, and operators that
compute in fp32 all the same, use up less."""


def read_job_file(path: str | Path) -> JobFile:
    """A job file; relative data and model paths are relative to it."""
    value = read_mapping(path)
    if value.get("schema", SCHEMA_JOB) != SCHEMA_JOB:
        raise FileError(f"schema is {value['schema']!r}, expected {SCHEMA_JOB!r}", where=str(path))
    file = parse(JobFile, value, path=path)
    if file.tokens is not None and file.steps is not None:
        raise FileError("give tokens or steps, not both", where=str(path))
    if file.epochs is not None and (file.tokens is not None or file.steps is not None):
        raise FileError("give epochs, tokens or steps, not two of them", where=str(path))
    return file


def merge(file: JobFile, flags: dict[str, Any]) -> JobFile:
    """Flags that were given win over the file."""
    given = {k: v for k, v in flags.items() if v not in (None, ())}
    given |= take_method_flags(given, file.optimizer, file.schedule)
    given["compress"] = with_flags(file.compress, given.pop("prune", None), given.pop("qat", None))
    if "steps" in given and "tokens" in given:
        raise UsageError("give --tokens or --steps, not both")
    length = [k for k in ("steps", "tokens", "epochs") if k in given]
    if len(length) > 1:
        raise UsageError("give --epochs, --tokens or --steps, not two of them")
    if length:
        given |= {k: None for k in ("steps", "tokens", "epochs") if k not in length}
    values = {name: getattr(file, name) for name in JobFile.__dataclass_fields__}
    return JobFile(**(values | given))


def default_precision(cluster: Cluster) -> tuple[str, str]:
    """(precision, why). GPUs: bf16 where the catalog has a rate for it, else fp16. CPU: bf16 only
    where this machine's measured matrix rate makes it clearly faster."""
    if cluster.kind != "cpu":
        if "bf16" in cluster.accelerator.flops or not cluster.accelerator.flops:
            return "bf16", "default on accelerators that have it"
        return "fp16", f"{cluster.accelerator.name} has no bf16"
    rates = cluster.rates
    if rates is None or "bf16" not in rates.gemm_flops or "fp32" not in rates.gemm_flops:
        return "fp32", "default on CPU; bf16 was not measured here"
    ratio = rates.gemm_flops["bf16"] / rates.gemm_flops["fp32"]
    if ratio >= CLEARLY_FASTER:
        return "bf16", f"its matrix multiplies measured {ratio:.1f} times as fast as fp32 here"
    return "fp32", f"bf16 matrix multiplies measured {ratio:.1f} times as fast as fp32 here"


def _positive_count(text: str | int) -> int:
    tokens = parse_count(text, where="tokens")
    if not 1 <= tokens <= MOST_TOKENS:
        raise UsageError(f"tokens: {text} makes no sense", do="give a count such as 20B")
    return tokens


def _length(file: JobFile, data: Data | None, seq_len: int, batch: int) -> tuple[int, Notes]:
    """(steps, what was counted or assumed for them); the data is counted where that says something."""
    said_otherwise = file.steps is not None or file.tokens is not None
    if said_otherwise and file.packing is None and file.epochs is None:
        amount, notes = None, list[dict[str, Any]]()
        if data is not None and not Path(data.path).expanduser().exists():
            notes.append({
                "what": "data", "value": data.path, "source": "not found here, so nothing of it was counted"
            })  # fmt: skip
    else:
        packing = file.packing is not False
        amount, notes = amount_of(data, file.epochs, packing=packing, seq_len=seq_len)
    if file.steps is not None:
        return file.steps, notes
    if amount is not None and file.tokens is None:
        steps, source = amount.steps(batch)
        # a length that was asked for is no default: a budget may not shorten it
        asked = file.epochs is not None
        note = {
            "what": "length" if asked else "steps", "value": f"{steps:,} steps" if asked else steps,
            "source": source if asked else f"default: {source}",
        }  # fmt: skip
        return steps, [*notes, note]
    if file.tokens is None:
        source = "default: a round number, to give the run a length"
        notes.append({"what": "tokens", "value": DEFAULT_TOKENS, "source": source})
    tokens = DEFAULT_TOKENS if file.tokens is None else _positive_count(file.tokens)
    return max(1, -(-tokens // (seq_len * batch))), notes


_AS_GIVEN = (
    "schedule", "gradient_clipping", "compile", "expert_capacity", "seed", "eval_every", "save_every", "attempts",
    "region",
)  # fmt: skip
"""What goes into the job as it stands in the file, where it stands there."""


def _default(notes: Notes, what: str, value: Any, why: str) -> Any:
    """A value that nobody gave, and a note that says so."""
    notes.append({"what": what, "value": value, "source": f"default: {why}"})
    return value


def _shape(file: JobFile, spec: ModelSpec, cluster: Cluster, notes: Notes) -> tuple[int, int]:
    """(tokens a sequence, sequences a step)."""
    seq_len, batch = file.seq_len, file.global_batch
    if seq_len is None:
        # 0 positions: the config sets no limit (BLOOM, T5)
        most = min(DEFAULT_SEQ_LEN, spec.max_positions or DEFAULT_SEQ_LEN)
        why = f"at most {DEFAULT_SEQ_LEN} and the model's positions"
        seq_len = _default(notes, "seq_len", most, why)
    if batch is None:
        why = f"{DEFAULT_BATCH_PER_RANK} sequences a rank"
        batch = _default(notes, "global_batch", DEFAULT_BATCH_PER_RANK * cluster.ranks, why)
    for name, value in (("seq_len", seq_len), ("global_batch", batch)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    return seq_len, batch


def warmup_note(schedule: Schedule | None, steps: int) -> Notes:
    """A warm-up that outlasts the training is said: the learning rate never gets to its peak."""
    if schedule is None or schedule.warmup_steps <= steps:
        return []
    why = f"longer than the {steps:,} steps: the learning rate never reaches its peak"
    return [{"what": "schedule_warmup_steps", "value": schedule.warmup_steps, "source": why}]


def resolve_job(file: JobFile, spec: ModelSpec, cluster: Cluster) -> Resolved:
    """Fill what is missing, check what is there. Raises UsageError."""
    notes: Notes = []
    seq_len, batch = _shape(file, spec, cluster, notes)
    precision = file.precision or _default(notes, "precision", *default_precision(cluster))
    data = data_of(file.data, file.tokenizer)
    steps, said = _length(file, data, seq_len, batch)
    notes += said
    optimizer = file.optimizer
    if isinstance(optimizer, str):
        optimizer = parse(Optimizer, {"name": optimizer}, path="--optimizer")
    if file.compile:
        what = "time and memory are those of the model as it is: what torch.compile gains is not estimated"
        notes.append({"what": "compile", "value": "on", "source": what})
    if file.expert_capacity is not None:
        what = "time and memory are those without dropped tokens"
        notes.append({"what": "expert_capacity", "value": file.expert_capacity, "source": what})
    notes += warmup_note(file.schedule, steps)
    attention = file.attention
    if attention is None and spec.family == CAPPED_FAMILY:
        why = "transformers has no sdpa form of its capped scores"
        attention = _default(notes, "attention", "eager", why)
    finetune, said = finetune_of(file.finetune, spec)
    check_compression(file.compress, spec, finetune)
    pilot = fraction_of(file.pilot)
    notes += said + project_note(file.attempts, pilot)
    budget, currency = money_of(file.budget, file.rate, file.currency)
    notes += [currency.note()] if currency else []
    carbon_of(file.region)
    value = {
        "model": spec.name,
        "seq_len": seq_len,
        "global_batch": batch,
        "steps": steps,
        "precision": precision,
        "optimizer": optimizer or Optimizer(),
        "data": data,
        "finetune": finetune,
        "compress": file.compress,
        "packing": file.packing is not False,
        "pilot_fraction": pilot,
        "budget": budget,
        "currency": currency,
        "assume": parse_assumed(file.assume),
        **{k: v for k in _AS_GIVEN if (v := getattr(file, k)) is not None},
    }
    if attention is not None:
        value["attention"] = attention
    return Resolved(job=parse(Job, value, path="job"), assumptions=notes)

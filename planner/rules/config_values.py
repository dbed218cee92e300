"""Rules about values that DeepSpeed reads in another way than they look, and about tiny buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from outlay.planner.read.deepspeed import AUTO, block
from outlay.planner.read.known import known
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_batch import unquoted
from outlay.planner.rules.setup import Setup
from outlay.planner.rules.value_kinds import number_of, stage_of, wrong
from outlay.profiles.units import format_bytes

_Z = "zero_optimization"


@config_rule(
    "stage_as_it_stands",
    "advice",
    "pydantic reads it (tried: deepspeed.initialize); accelerate 1.15, utils/deepspeed.py:244-247 compares it with "
    "== 3 (tried: is_zero3() is false of \"3\")",
)  # fmt: skip
def stage_as_it_stands(s: Setup) -> Iterable[Found]:
    """A stage in quotes, or true: DeepSpeed reads it as a number, and not everybody else does."""
    written = block(s.raw, _Z).get("stage")
    stage = stage_of(written)
    if stage is None or not isinstance(written, str | bool) or written == AUTO:
        return
    hidden = s.meaning.trainer and stage == 3
    said = f'"{written}"' if isinstance(written, str) else str(written).lower()
    yield Found(
        what=f"stage is {said}: DeepSpeed reads it as {stage}"
        + (", while transformers and accelerate, which compare it with 3, see no ZeRO-3: the model is loaded whole "
           "in every process" if hidden else ""),
        where=s.where(_Z, "stage"), do=f"write {stage}", level="changed" if hidden else "",
        edits=tuple(s.meaning.set_deepspeed((_Z, "stage"), stage)),
    )  # fmt: skip


@config_rule(
    "true_as_a_number",
    "changed",
    "pydantic reads true as 1 and false as 0 (tried: reduce_bucket_size true trained with a bucket of 1)",
)
def true_as_a_number(s: Setup) -> Iterable[Found]:
    """true or false where a number is meant: DeepSpeed reads 1 or 0."""
    for dotted, types in known("deepspeed")["blocks"].items():
        path = tuple(dotted.split("."))
        written = s.written(*path)
        for key, kind in types.items() if isinstance(written, dict) else ():
            value = written.get(key)
            number = kind in ("positive", "count", "int", "fraction")
            if number and isinstance(value, bool) and wrong(value, kind) is None:
                yield _taken_as((*path, key), value, s)
    params = s.written("optimizer", "params")
    for key in ("lr", "eps", "weight_decay", "momentum"):
        if isinstance(params, dict) and isinstance(params.get(key), bool):
            yield _taken_as(("optimizer", "params", key), params[key], s)
    if isinstance(s.raw.get("gradient_clipping"), bool):
        yield _taken_as(("gradient_clipping",), s.raw["gradient_clipping"], s)


def _taken_as(path: tuple[str, ...], value: bool, s: Setup) -> Found:
    return Found(
        what=f"{'.'.join(path)} is {str(value).lower()}: DeepSpeed reads it as the number {int(value)}",
        where=s.where(*path), do="write the number, or remove it",
        edits=tuple(s.meaning.remove_deepspeed(path)),
    )  # fmt: skip


_PLAIN_SWITCHES = (
    "prescale_gradients", "disable_allgather", "dump_state", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "dataloader_drop_last", "memory_breakdown",
)  # fmt: skip


@config_rule(
    "top_level_value",
    "illegal",
    "runtime/engine.py:3506, 3554, runtime/config.py:533 calculate with it as it stands (tried: gradient_clipping "
    "null, steps_per_print 0, wall_clock_breakdown \"false\")",
)  # fmt: skip
def top_level_value(s: Setup) -> Iterable[Found]:
    """A value at the top level with which DeepSpeed fails at the first step, or that it reads the other way."""
    for key in ("gradient_clipping", "steps_per_print"):
        value = s.raw.get(key)
        null = key == "gradient_clipping" and key in s.raw and value is None
        if null or isinstance(value, list | dict):
            yield Found(
                what=f"{key} is {'null' if null else repr(value)}: a number is expected, DeepSpeed compares with it",
                where=s.where(key), do="write a number, or remove it",
                edits=tuple(s.meaning.remove_deepspeed((key,))),
            )  # fmt: skip
    if s.raw.get("steps_per_print") == 0 and s.raw.get("steps_per_print") is not False:
        yield Found(
            what="steps_per_print is 0: DeepSpeed divides by it at the first step", where=s.where("steps_per_print"),
            do="remove it, or write a large number", edits=tuple(s.meaning.remove_deepspeed(("steps_per_print",))),
        )  # fmt: skip
    for key in ("wall_clock_breakdown", *_PLAIN_SWITCHES):
        value = s.raw.get(key)
        if not isinstance(value, str) or value == AUTO:
            continue
        meant = value.lower() in ("true", "1", "yes", "on")
        fails = key == "wall_clock_breakdown"
        if meant and not fails:
            continue  # any text is true
        yield Found(
            what=f"{key} is the text {value!r}: "
            + ("DeepSpeed fails with it" if fails else "DeepSpeed reads any text as true"),
            where=s.where(key), do=f"write {str(meant).lower()} without quotes", level="" if fails else "changed",
            edits=tuple(s.meaning.set_deepspeed((key,), meant)),
        )  # fmt: skip


_LEAST_BUCKET = 1_000_000
"""Elements: below, a message of 2 MB in bf16 is limited by its latency (as in estimate/buckets.py)."""

_USUAL_BUCKET = 50_000_000
"""Elements, where the model is not known: 100 MB in bf16."""
_MATRICES_A_LAYER = 4
"""No layer has fewer: two of the attention, two of the MLP."""


def _whole(value: Any) -> int | None:
    number = number_of(unquoted(value) if isinstance(value, str) else value)
    fine = (
        number is not None and math.isfinite(number) and number >= 1 and not isinstance(value, bool)
    )
    return int(number) if fine else None  # type: ignore[arg-type]


@config_rule(
    "bucket_is_tiny",
    "advice",
    "runtime/zero/stage_1_and_2.py: a bucket is reduced when the next gradient does not fit; runtime/utils.py:1033: "
    "elements / allgather_bucket_size gathers a step",
)
def bucket_is_tiny(s: Setup) -> Iterable[Found]:
    """A bucket so small that a step is a crowd of small collectives."""
    if s.stage not in (1, 2, 3):
        return
    keys = ["reduce_bucket_size"]
    keys += ["allgather_bucket_size"] if s.stage < 3 else ["stage3_prefetch_bucket_size"]
    from outlay.planner.rules.config_precision import model_dtype

    width = 4 if model_dtype(s) == "fp32" else 2
    for key in keys:
        size = _whole(block(s.raw, _Z).get(key))
        better, _ = _usual(s)
        if size is None or size >= min(_LEAST_BUCKET, better):
            continue
        yield Found(
            what=f"{key} is {size:,} elements, {format_bytes(size * width)}: "
            + _consequence(s, key, size),
            where=s.where(_Z, key), do=f"write {better}",
            edits=tuple(s.meaning.set_deepspeed((_Z, key), better)),
        )  # fmt: skip


def _usual(s: Setup) -> tuple[int, int | None]:
    """(a bucket in elements that latency no longer limits, elements a rank trains or null)."""
    if s.spec is None:
        return _USUAL_BUCKET, None
    from outlay.planner.estimate.buckets import bucket_sizes
    from outlay.planner.estimate.parameters import parameter_counts

    tp, pp = s.meaning.said("tp") or 1, s.meaning.said("pp") or 1
    better, _ = bucket_sizes(s.spec, tp, pp)
    better += better % 2  # DeepSpeed wants it even of all-gathers
    adapters = s.meaning.said("finetune") is not None  # how many elements train is not known here
    return better, None if adapters else parameter_counts(s.spec).total // (tp * pp)


def _consequence(s: Setup, key: str, size: int) -> str:
    """What comes of it, with the number of collectives where the model is known."""
    better, total = _usual(s)
    if key == "stage3_prefetch_bucket_size":
        return "hardly a weight is fetched in advance, and each all-gather is waited for"
    many = None if total is None else f"with {better:,} about {max(1, total // better):,}"
    if key == "reduce_bucket_size" and s.spec is not None and size < s.spec.hidden**2 // 2:
        said = "each weight's gradient is reduced on its own"
        matrices = _MATRICES_A_LAYER * s.spec.layers // (s.meaning.said("pp") or 1)
        return (
            f"{said}, at least {matrices:,} collectives a backward pass; {many}" if many else said
        )
    said = "gradients are reduced" if key == "reduce_bucket_size" else "the weights are gathered"
    said += " in pieces of that size"
    if total is None:
        return said
    when = "a backward pass" if key == "reduce_bucket_size" else "a step"
    return f"{said}, about {max(1, total // size):,} collectives {when}; {many}"

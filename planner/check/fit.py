"""The nearest change that fits, and the fastest that fits: variants of what the files can say, in one array program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outlay.planner.check.question import Question
from outlay.planner.estimate.buckets import bucket_sizes
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import Estimates, evaluate
from outlay.planner.estimate.interval import VERDICTS
from outlay.planner.read.edits import set_to
from outlay.planner.read.meaning import ARGUMENTS, DocEdit
from outlay.planner.rules import Context, allowed
from outlay.planner.rules.places import arguments, at, is_of, main_edits
from outlay.planner.rules.setup import Setup
from outlay.planner.space import divisors
from outlay.planner.spec.strategy import Loss, Strategy

FASTER = 0.10
"""A faster variant is worth a word from here on: the interval of a step time is wider than less."""
_Z = "zero_optimization"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another strategy that fits, and how the files say it."""

    strategy: Strategy
    changes: tuple[str, ...]
    edits: tuple[DocEdit, ...]
    outside: tuple[str, ...]
    """What has to be set where these files cannot say it."""
    device_bytes: float
    low_bytes: float
    high_bytes: float
    verdict: str
    risk: float
    step_s: float | None


def _micro_batches(s: Strategy, larger: bool) -> list[int]:
    """Micro-batches that keep the global batch."""
    share = s.micro_batch * s.grad_accum
    return [m for m in divisors(share) if larger or m <= s.micro_batch]


def variants(q: Question, s: Setup, *, larger: bool) -> list[Strategy]:
    """Every combination of the knobs; the strategy itself first."""
    now = q.strategy
    sized, gather = bucket_sizes(
        q.spec, now.tp, now.pp, now.ep, swapped=now.offload_optimizer == "nvme"
    )
    stages = [z for z in (range(now.zero, 4) if not larger else range(4)) if now.pp == 1 or z <= 1]
    if not s.uses_deepspeed:
        stages = [now.zero]
    zero = [z for z in stages if z == now.zero or now.dp > 1]
    checkpointing = (
        ("none", "full") if larger else tuple(dict.fromkeys((now.activation_checkpointing, "full")))
    )
    optimizer = ("none", "cpu") if larger else tuple(dict.fromkeys((now.offload_optimizer, "cpu")))
    weights = ("none", "cpu") if larger else tuple(dict.fromkeys((now.offload_param, "cpu")))
    buckets = [(now.reduce_bucket_size, now.allgather_bucket_size)]
    if (now.reduce_bucket_size or 0) > sized:
        buckets.append((sized, gather + gather % 2))
    losses: tuple[Loss, ...] = (
        (now.loss, "fused") if now.loss == "plain" and _loss_edits(s, q) else (now.loss,)
    )
    rows = [now]
    for m, z, c, o, w, (reduce, all_gather), loss in itertools.product(
        _micro_batches(now, larger), zero, checkpointing, optimizer, weights, buckets, losses
    ):
        if (o != "none" and z == 0) or (w != "none" and (z != 3 or o == "none")):
            continue
        rows.append(replace(
            now, micro_batch=m, grad_accum=now.micro_batch * now.grad_accum // m, zero=z,
            activation_checkpointing=c, offload_optimizer=o, offload_param=w,
            reduce_bucket_size=reduce if z else None, allgather_bucket_size=all_gather if z else None, loss=loss,
        ))  # fmt: skip
    return list(dict.fromkeys(rows))


def _weight(before: Strategy, after: Strategy) -> float:
    """How far apart two strategies are: a change each, those that a person notices more counting more."""
    parts = (
        (before.micro_batch != after.micro_batch, 1.0),
        (before.activation_checkpointing != after.activation_checkpointing, 1.0),
        (before.zero != after.zero, 1.0),
        (before.loss != after.loss, 1.0),
        (before.offload_optimizer != after.offload_optimizer, 1.5),
        (before.offload_param != after.offload_param, 1.5),
        (before.reduce_bucket_size != after.reduce_bucket_size and before.zero == after.zero, 0.5),
    )
    return sum(weight for changed, weight in parts if changed)


def _value(s: Setup, name: str, value: int, key: str) -> list[DocEdit]:
    """Edits that give micro-batch or accumulation a value, through the arguments or the DeepSpeed file."""
    edits = s.meaning.set_value(name, value)
    if not edits and s.meaning.framework == "deepspeed" and not s.meaning.trainer:
        edits = s.meaning.set_deepspeed((key,), value)
    return edits


def _offload(s: Setup, part: str, device: str) -> list[DocEdit]:
    path = (_Z, f"offload_{part}")
    section = s.meaning.section
    if section is not None and section.document is None:
        return s.meaning.set_deepspeed((*path, "device"), device)
    if device == "none":
        return s.meaning.remove_deepspeed(path)
    return s.meaning.set_deepspeed(path, {"device": device, "pin_memory": True})


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One difference between two strategies: in words, as edits, and what to set where no file says it."""

    words: str
    edits: list[DocEdit]
    away: str


def _micro_batch_change(s: Setup, before: Strategy, after: Strategy) -> _Change:
    made = _value(s, "micro_batch", after.micro_batch, "train_micro_batch_size_per_gpu")
    if made:
        made += _value(s, "grad_accum", after.grad_accum, "gradient_accumulation_steps")
    return _Change(
        words=f"micro-batch {before.micro_batch} → {after.micro_batch}, "
        f"accumulation {before.grad_accum} → {after.grad_accum}",
        edits=made,
        away=f"per_device_train_batch_size {after.micro_batch}, gradient_accumulation_steps {after.grad_accum}",
    )


def _recomputation_change(s: Setup, after: Strategy) -> _Change:
    on = after.activation_checkpointing == "full"
    said = s.meaning.values.get("checkpointing")
    inverse = said is not None and "disable_gradient_checkpointing" in str(said.place)
    return _Change(
        words=f"recomputation {'on' if on else 'off'}",
        edits=s.meaning.set_value("checkpointing", on is not inverse),
        away=f"gradient_checkpointing {str(on).lower()}",
    )


def _stage_change(s: Setup, before: Strategy, after: Strategy) -> _Change:
    made = s.meaning.set_deepspeed((_Z, "stage"), after.zero)
    save = "stage3_gather_16bit_weights_on_model_save"
    if made and after.zero == 3 and s.meaning.trainer and s.zero.get(save) is not True:
        made = made + s.meaning.set_deepspeed((_Z, save), True)
    words = f"ZeRO stage {before.zero} → {after.zero}"
    return _Change(words=words, edits=made, away=f"ZeRO stage {after.zero}")


def _offload_change(s: Setup, part: str, device: str) -> _Change:
    what = {"optimizer": "optimizer states", "param": "weights"}[part]
    where = "on the host" if device == "cpu" else "on the accelerator"
    return _Change(
        words=f"{what} {where}", edits=_offload(s, part, device), away=f"offload_{part} {device}"
    )


def _bucket_change(s: Setup, after: Strategy) -> _Change:
    made = s.meaning.set_deepspeed((_Z, "reduce_bucket_size"), after.reduce_bucket_size)
    if made and after.zero in (1, 2) and after.allgather_bucket_size is not None:
        made += s.meaning.set_deepspeed((_Z, "allgather_bucket_size"), after.allgather_bucket_size)
    return _Change(
        words=f"buckets of {after.reduce_bucket_size:,} elements",
        edits=made,
        away="smaller buckets, in a DeepSpeed JSON",
    )


_LIGER = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2",
    "qwen3", "qwen3_moe",
)  # fmt: skip
"""Families that liger-kernel has a fused loss for (LLaMA-Factory at ff6d4d1, model_utils/liger_kernel.py)."""
_LIGER_PLUGIN = "axolotl.integrations.liger.LigerPlugin"


def _loss_edits(s: Setup, q: Question) -> list[DocEdit]:
    """Edits that turn liger-kernel's fused loss on; none where the file or the model has no words for it."""
    if q.spec.family not in _LIGER or q.cluster.kind == "cpu" or not s.meaning.trainer:
        return []
    given = arguments(s)
    if ARGUMENTS in s.meaning.documents:
        return [DocEdit(document=ARGUMENTS, edit=set_to("use_liger_kernel", value=True))]
    if is_of(s, "axolotl"):
        if given.get("plugins"):
            return []
        fused = set_to("liger_fused_linear_cross_entropy", value=True)
        return list(main_edits(set_to("plugins", value=[_LIGER_PLUGIN]), fused))
    if is_of(s, "launch") and "per_device_train_batch_size" not in given:
        return []  # whether its script takes the Trainer's arguments is not known
    if is_of(s, "trainer", "llamafactory", "launch"):
        factory = is_of(s, "llamafactory") or "finetuning_type" in given
        key = "enable_liger_kernel" if factory else "use_liger_kernel"
        return list(main_edits(set_to(*at(s, key), value=True)))
    return []


def edits_between(
    s: Setup, q: Question, before: Strategy, after: Strategy
) -> tuple[list[DocEdit], list[str], list[str]]:
    """(edits, what changes in words, what these files cannot say)."""
    found: list[_Change] = []
    if before.micro_batch != after.micro_batch:
        found.append(_micro_batch_change(s, before, after))
    if before.activation_checkpointing != after.activation_checkpointing:
        found.append(_recomputation_change(s, after))
    if before.loss != after.loss:
        words = "a fused loss (liger-kernel has to be installed)"
        found.append(
            _Change(words=words, edits=_loss_edits(s, q), away="liger-kernel's fused loss")
        )
    if before.zero != after.zero:
        found.append(_stage_change(s, before, after))
    for part in ("optimizer", "param"):
        new = getattr(after, f"offload_{part}")
        if getattr(before, f"offload_{part}") != new:
            found.append(_offload_change(s, part, new))
    if after.reduce_bucket_size not in (None, before.reduce_bucket_size):
        found.append(_bucket_change(s, after))
    edits = [edit for change in found for edit in change.edits]
    return edits, [c.words for c in found], [c.away for c in found if not c.edits]


def _usable(q: Question, s: Setup, rows: Sequence[Strategy]) -> Estimates:
    c = Candidates.of(rows)
    x = Context(spec=q.spec, job=q.job, cluster=q.cluster)
    legal = allowed(c, x, kinds=("deepspeed",))
    return evaluate(q.spec, q.job, q.cluster, c.take(np.flatnonzero(legal)))


def _variant(q: Question, s: Setup, e: Estimates, i: int) -> Variant:
    strategy = e.candidates.strategy(i)
    edits, words, outside = edits_between(s, q, q.strategy, strategy)
    return Variant(
        strategy=strategy, changes=tuple(words), edits=tuple(edits), outside=tuple(outside),
        device_bytes=float(e.memory.device[i]), low_bytes=float(e.memory_low[i]), high_bytes=float(e.memory_high[i]),
        verdict=VERDICTS[int(e.verdict[i])], risk=float(e.risk[i]),
        step_s=None if e.step is None else float(e.step.time_s[i]),
    )  # fmt: skip


def nearest_fit(q: Question, s: Setup) -> tuple[Variant | None, Variant | None]:
    """(the nearest variant that is ok, the smallest of all). Variants that the files can say come first."""
    e = _usable(q, s, variants(q, s, larger=False))
    if not len(e.verdict):
        return None, None  # no rule allows it, nor anything near
    ok = np.flatnonzero(e.verdict == 0)
    smallest = _variant(q, s, e, int(np.argmin(e.memory.device)))
    ranked: list[tuple[Any, ...]] = []
    for i in ok:
        strategy = e.candidates.strategy(int(i))
        outside = len(edits_between(s, q, q.strategy, strategy)[2])
        step_s = 0.0 if e.step is None else float(e.step.time_s[i])
        ranked.append((outside, _weight(q.strategy, strategy), step_s, int(i)))
    return (_variant(q, s, e, min(ranked)[-1]) if ranked else None), smallest


def faster(q: Question, s: Setup, step_s: float | None) -> Variant | None:
    """The fastest variant that is ok and that these files can say, where it is clearly faster."""
    if step_s is None:
        return None
    e = _usable(q, s, variants(q, s, larger=True))
    if e.step is None:
        return None
    seconds = np.where(e.verdict == 0, e.step.time_s, np.inf)
    for i in np.argsort(seconds, kind="stable")[:200]:
        if not seconds[i] <= step_s / (1.0 + FASTER):
            return None
        found = _variant(q, s, e, int(i))
        if not found.outside:
            return found
    return None

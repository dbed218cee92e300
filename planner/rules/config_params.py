"""Rules about the params of optimizer and scheduler: unknown names, values that cannot be calculated with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from outlay.planner.read.deepspeed import AUTO, block
from outlay.planner.read.known import known, names
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_batch import unquoted
from outlay.planner.rules.config_keys import near
from outlay.planner.rules.setup import Setup

_TEXTS = (
    "warmup_type",
    "ns_method",
    "line_search_fn",
    "mode",
    "threshold_mode",
    "anneal_strategy",
    "scale_mode",
)
_PAIRS = ("betas", "etas", "step_sizes")
_FREE = (
    *_TEXTS,
    "fp32_optimizer_states",
    "foreach",
    "fused",
    "eps",
    "milestones",
    "scale_fn",
    "step_size_down",
)
_NOT_NEGATIVE = ("lr", "muon_lr", "adam_lr", "eps", "weight_decay", "momentum", "alpha", "lr_decay")  # fmt: skip
_MUON = "MuonWithAuxAdam"


def optimizer_class(s: Setup) -> str | None:
    """The class that DeepSpeed makes of optimizer.type (runtime/engine.py:2377-2550): one of its own, or
    `torch.NAME`; null where it is none that is listed."""
    written = block(s.ds, "optimizer")
    kind = written.get("type")
    if not isinstance(kind, str):
        return None
    lower, on_cpu = kind.lower(), s.offload("optimizer") in ("cpu", "nvme")
    if lower in ("adam", "adamw"):
        params = block(written, "params")
        if params.get("torch_adam"):
            decoupled = lower == "adamw" or params.get("adam_w_mode", True)
            return "torch.AdamW" if decoupled else "torch.Adam"
        return "DeepSpeedCPUAdam" if on_cpu else "FusedAdam"
    native = {
        "adagrad": "DeepSpeedCPUAdagrad" if on_cpu else "torch.Adagrad", "lamb": "FusedLamb", "muon": _MUON,
        "lion": "DeepSpeedCPULion" if on_cpu else "FusedLion",
    }  # fmt: skip
    if lower in names("deepspeed", "optimizers", "native"):
        return native.get(lower)
    return f"torch.{kind}" if kind in known("optimizers")["torch"] else None


def allowed_params(name: str) -> frozenset[str]:
    """What the params may hold for a class of `optimizer_class`."""
    if name.startswith("torch."):
        allowed = names("optimizers", "torch", name.removeprefix("torch."))
        adam = name in ("torch.Adam", "torch.AdamW")
    else:
        allowed = names("optimizers", "deepspeed", name)
        adam = name in ("FusedAdam", "DeepSpeedCPUAdam", _MUON)
    return allowed | names("optimizers", "adam_switches") if adam else allowed


def _params(s: Setup, part: str) -> dict[str, Any]:
    params = s.written(part, "params")
    return params if isinstance(params, dict) else {}


def _unknown(s: Setup, part: str, key: str, allowed: Iterable[str], what: str) -> Found:
    allowed, path = list(allowed), (part, "params", key)
    meant = known("optimizers")["meant"].get(key.lower())
    meant = meant if meant in allowed else near(key, allowed)
    there = meant in _params(s, part)
    pair = meant in _PAIRS and not isinstance(_params(s, part)[key], list)
    if meant is None or there:
        edits, do = s.meaning.remove_deepspeed(path), "remove it"
    elif pair:
        edits, do = [], f"write {meant} with both of its numbers, as in [0.9, 0.999]"
    else:
        edits, do = s.meaning.rename_deepspeed(path, meant), f"write {meant}"
    do += "" if meant else f"; it takes {', '.join(sorted(allowed))}"
    return Found(what=what, where=s.where(*path), do=do, edits=tuple(edits))


@config_rule(
    "optimizer_parameter_unknown",
    "illegal",
    "runtime/engine.py:2476-2550 passes params on as keywords (tried: TypeError); torch 2.13, torch/optim",
)
def optimizer_parameter_unknown(s: Setup) -> Iterable[Found]:
    """A name in optimizer.params that the optimizer's constructor does not have."""
    name = optimizer_class(s)
    if name is None or name == _MUON:
        return
    allowed = allowed_params(name)
    for key in _params(s, "optimizer"):
        if key in allowed or key == "max_grad_norm":
            continue
        only_torch = name == "FusedAdam" and key in allowed_params("torch.AdamW")
        what = f"optimizer.params.{key}: {name} has no such parameter"
        what += ", torch's AdamW has (torch_adam true)" if only_torch else ""
        yield _unknown(s, "optimizer", key, allowed, what)


@config_rule(
    "muon_parameter_unknown",
    "ignored",
    "runtime/engine.py:2413-2422: each half takes its own keys (tried: learning_rate 3 trained with the default lr)",
    versions=">=0.19.8,<0.20",
)
def muon_parameter_unknown(s: Setup) -> Iterable[Found]:
    """A name in Muon's params that neither of its halves reads."""
    if optimizer_class(s) != _MUON:
        return
    allowed = allowed_params(_MUON)
    for key in _params(s, "optimizer"):
        if key not in allowed and key != "max_grad_norm":
            what = f"optimizer.params.{key}: Muon does not read it, and says nothing"
            yield _unknown(s, "optimizer", key, allowed, what)


@config_rule(
    "scheduler_parameter_unknown",
    "illegal",
    "runtime/engine.py:1935 passes params on as keywords (tried: TypeError); runtime/lr_schedules.py",
)
def scheduler_parameter_unknown(s: Setup) -> Iterable[Found]:
    """A name in scheduler.params that the scheduler's constructor does not have."""
    kind = s.written("scheduler", "type")
    if not isinstance(kind, str) or kind not in known("optimizers")["schedulers"]:
        return
    allowed = names("optimizers", "schedulers", kind)
    for key in _params(s, "scheduler"):
        if key not in allowed:
            what = f"scheduler.params.{key}: {kind} has no such parameter"
            yield _unknown(s, "scheduler", key, allowed, what)


@config_rule(
    "scheduler_parameter_missing",
    "illegal",
    "runtime/engine.py:1934-1935: **params of null, or a parameter without a default (tried: TypeError)",
)
def scheduler_parameter_missing(s: Setup) -> Iterable[Found]:
    """A scheduler without params, or without one that has no default."""
    kind, params = s.written("scheduler", "type"), s.written("scheduler", "params")
    if not isinstance(kind, str):
        return
    if params is None:
        yield Found(
            what=f"scheduler {kind} has no params: DeepSpeed unpacks them, and stops with a TypeError",
            where=s.where("scheduler"), do='write "params": {}, or those that are meant',
            edits=tuple(s.meaning.set_deepspeed(("scheduler", "params"), {})),
        )  # fmt: skip
    by_code = known("optimizers")["needs_code"].get(kind)
    if by_code is not None:
        yield Found(
            what=f"scheduler {kind} needs {by_code}, which a JSON cannot hold", where=s.where("scheduler", "type"),
            do="give it to deepspeed.initialize as lr_scheduler, a function of the optimizer",
        )  # fmt: skip
    for key in known("optimizers")["needed"].get(kind, "").split():
        if _params(s, "scheduler").get(key) is None:
            yield Found(
                what=f"scheduler {kind} without {key}, which has no default", where=s.where("scheduler", "params"),
                do=f"write {key}",
            )  # fmt: skip


@config_rule(
    "torch_scheduler_wrapped",
    "illegal",
    "runtime/engine.py:1893: it gets DeepSpeed's wrapper, which is no torch.optim.Optimizer (tried at stages 0 to 3 "
    "in bf16, fp16 and fp32: only stage 0 in fp32 starts)",
)
def torch_scheduler_wrapped(s: Setup) -> Iterable[Found]:
    """A scheduler of torch's where DeepSpeed wraps the optimizer: ZeRO, bf16 or fp16."""
    kind = block(s.ds, "scheduler").get("type")
    half = "bf16" if s.bf16 else "fp16" if s.enabled("fp16") else None
    if kind not in names("deepspeed", "torch_schedulers") or not (s.stage or half):
        return
    steps = _params(s, "scheduler").get("T_max")
    edits = []
    do = "give it to deepspeed.initialize as lr_scheduler, a function of the optimizer"
    if s.meaning.trainer:
        do = "remove the block, and set lr_scheduler_type in the training arguments"
    if kind == "CosineAnnealingLR" and isinstance(steps, int) and not isinstance(steps, bool):
        params = {"total_num_steps": steps, "warmup_num_steps": 1, "cos_min_ratio": 0.0}
        edits = s.meaning.set_deepspeed(
            ("scheduler",), {"type": "WarmupCosineLR", "params": params}
        )
        do = f"write WarmupCosineLR with total_num_steps {steps}, or {do}"
    yield Found(
        what=f"scheduler {kind} is torch's: with " + (f"ZeRO-{s.stage}" if s.stage else str(half))
        + " DeepSpeed gives it a wrapper that it refuses (TypeError: … is not an Optimizer)",
        where=s.where("scheduler", "type"), do=do, edits=tuple(edits),
    )  # fmt: skip


def _no_number(value: Any) -> bool:
    """Not a number that is calculated with; texts that mean one have a rule of their own."""
    if isinstance(value, str):
        return not (value.lower() == AUTO or "$" in value or unquoted(value) is not None)
    return not isinstance(value, int | float) or (isinstance(value, float) and math.isnan(value))


def _pair_fault(value: Any, key: str) -> str | None:
    if value == AUTO or (isinstance(value, str) and value.lower() == AUTO):
        return None
    if not isinstance(value, list):
        return "two numbers in a list are expected"
    if len(value) != 2:
        return f"it has {len(value)} numbers, and two are expected"
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        return "two numbers are expected, without quotes"
    if key == "betas" and not all(0 <= v < 1 for v in value):
        return "each must lie in [0, 1)"
    return None


@config_rule(
    "optimizer_value",
    "illegal",
    "torch 2.13, torch/optim/adam.py and its kin check in the constructor; DeepSpeed's own at the first step (tried)",
)
def optimizer_value(s: Setup) -> Iterable[Found]:
    """A value in optimizer.params that the optimizer refuses, or that makes no sense in it."""
    name = optimizer_class(s)
    if name is None:
        return
    params, allowed = _params(s, "optimizer"), allowed_params(name)
    own = not name.startswith("torch.")
    for key, value in params.items():
        if key not in allowed:
            continue
        fault, better, level = _optimizer_fault(key, value, name)
        if fault is None:
            continue
        path = ("optimizer", "params", key)
        unchecked = own and level == "range"
        yield Found(
            what=f"optimizer.params.{key} is {value!r}: {fault}"
            + (f"; {name} does not check it, and trains with it" if unchecked else ""),
            where=s.where(*path), do=f"write {better}" if better is not None else "correct it, or remove it",
            edits=tuple(
                s.meaning.set_deepspeed(path, better) if better is not None else s.meaning.remove_deepspeed(path)
            ),
            level="advice" if unchecked else "",
        )  # fmt: skip


def _optimizer_fault(key: str, value: Any, name: str) -> tuple[str | None, Any, str]:
    """(what is wrong, the value that is meant or null, `range` where the type is right)."""
    if key in _PAIRS:
        fault = _pair_fault(value, key)
        if fault is None:
            return None, None, ""
        ranged = fault.startswith("each")
        quoted = (
            [unquoted(v) for v in value] if isinstance(value, list) and len(value) == 2 else [None]
        )
        numbers = quoted if all(q is not None and 0 <= q < 1 for q in quoted) else None
        return fault, numbers, "range" if ranged else "type"
    if key == "amsgrad" and value is True and name in ("FusedAdam", "FusedLamb"):
        return f"{name} does not have AMSGrad, and stops with a RuntimeError", False, "type"
    if key not in _NOT_NEGATIVE or name == "torch.Adafactor":
        return None, None, ""
    if _no_number(value):
        return "a number is expected", None, "type"
    if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
        return "it must not be negative", abs(value), "range"
    return None, None, ""


_WARM = ("log", "linear")


def _scheduler_fault(key: str, value: Any, kind: str) -> tuple[str, Any, str] | None:
    """(what is wrong, what is meant or null, the level where it is another than illegal)."""
    if key == "warmup_type":
        if value in _WARM or value == AUTO:
            return None
        return (
            f"it is log or linear; DeepSpeed takes log ({kind})",
            near(str(value), _WARM) or "log",
            "changed",
        )
    if key in _FREE or isinstance(value, bool):
        return None
    if isinstance(value, list):  # one a parameter group: how many there are, the script decides
        return None
    if value is None:
        optional = ("warmup_max_lr", "cycle_second_step_size", "cycle_second_stair_count")
        return (
            None
            if key in optional and kind != "WarmupDecayLR"
            else ("a number is expected", None, "")
        )
    if _no_number(value):
        return "a number is expected", None, ""
    if isinstance(value, str):
        return None
    if (
        key in ("warmup_num_steps", "lr_range_test_step_size")
        and value >= 1
        and isinstance(value, float)
    ):
        return "DeepSpeed wants a whole number without a point", round(value), ""
    if key in ("lr_range_test_step_size", "cycle_first_step_size") and value <= 0:
        return "it must be positive", None, ""
    if key in ("warmup_min_lr", "warmup_max_lr") and value < 0:
        return "a learning rate below zero climbs instead of descending", abs(value), "advice"
    return None


@config_rule(
    "scheduler_value",
    "illegal",
    "runtime/lr_schedules.py:371, 527, 734, 743-749, 826 (tried)",
    versions=">=0.19.4,<0.20",
)
def scheduler_value(s: Setup) -> Iterable[Found]:
    """A value in scheduler.params that the scheduler of DeepSpeed's refuses or replaces."""
    kind, params = s.written("scheduler", "type"), _params(s, "scheduler")
    if not isinstance(kind, str) or kind not in names("deepspeed", "schedulers"):
        return
    for key, value in params.items():
        if key not in names("optimizers", "schedulers", kind):
            continue
        if key == "total_num_steps" and value is None:
            continue  # decay_needs_an_end says it
        fault = _scheduler_fault(key, value, kind)
        if fault is None:
            continue
        what, better, level = fault
        path = ("scheduler", "params", key)
        yield Found(
            what=f"scheduler.params.{key} is {value!r}: {what}", where=s.where(*path), level=level,
            do=f"write {better}" if better is not None else "correct it, or remove it",
            edits=tuple(
                s.meaning.set_deepspeed(path, better) if better is not None else s.meaning.remove_deepspeed(path)
            ),
        )  # fmt: skip


@config_rule(
    "params_are_no_block",
    "illegal",
    "runtime/config.py:723 (tried: AttributeError: … has no attribute 'keys'); runtime/engine.py:1935",
)
def params_are_no_block(s: Setup) -> Iterable[Found]:
    """params of an optimizer or a scheduler that are no block in braces."""
    for part in ("optimizer", "scheduler"):
        params = s.written(part, "params")
        if params is not None and not isinstance(params, Mapping) and s.written(part, "type"):
            yield Found(
                what=f"{part}.params is {params!r}: a block in braces is expected", where=s.where(part, "params"),
                do="write a block of names and values",
                edits=tuple(s.meaning.set_deepspeed((part, "params"), {})),
            )  # fmt: skip

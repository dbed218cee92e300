"""What a configuration says, one row a thing: what, value, where it stands, and the default where it does not say."""

from __future__ import annotations

from typing import Any

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.rules.setup import Setup, batch_of


def says(s: Setup, model_note: str) -> list[dict[str, Any]]:
    """Rows for a person, in the order in which one asks."""
    rows = [_model(s, model_note), _adapters(s)]
    rows += [
        _said(s, what, name)
        for what, name in (
            ("context", "seq_len"), ("precision", "precision"), ("optimizer", "optimizer"),
            ("recomputation", "checkpointing"),
        )
    ]  # fmt: skip
    rows += [_sharding(s), _processes(s), *_batch(s)]
    rows += [_said(s, "steps", "steps"), _said(s, "epochs", "epochs")]
    return [row for row in rows if row is not None]


def _row(what: str, value: Any, where: str = "", default: str = "") -> dict[str, Any]:
    return {"what": what, "value": value, "where": where, "default": default}


def _said(s: Setup, what: str, name: str) -> dict[str, Any] | None:
    found = s.meaning.values.get(name)
    return None if found is None else _row(what, found.value, found.where, found.default)


def _model(s: Setup, note: str) -> dict[str, Any]:
    said = s.meaning.values.get("model")
    value = s.meaning.said("model")
    if s.spec is not None:
        value = f"{s.spec.name}, {parameter_counts(s.spec).total:,} parameters"
    return _row("model", value, said.where if said else "", note)


def _adapters(s: Setup) -> dict[str, Any] | None:
    found = s.meaning.values.get("finetune")
    if found is None or not isinstance(found.value, dict):
        return None
    quant = "whole" if found.value["quant"] == "none" else found.value["quant"]
    text = f"{found.value['method']} rank {found.value['rank']}, frozen weights {quant}"
    return _row("adapters", text, found.where, found.default)


def _sharding(s: Setup) -> dict[str, Any]:
    if not s.uses_deepspeed:
        if s.meaning.missing_file is not None:
            return _row("sharding", "unknown: its DeepSpeed file is missing")
        if s.meaning.framework == "launch" and not s.meaning.trainer:
            return _row("sharding", None, default="the script decides it")
        return _row("sharding", "no DeepSpeed")
    parts = [f"ZeRO-{s.stage}"]
    if s.offload("optimizer") != "none":
        parts.append(f"optimizer on {s.offload('optimizer')}")
    if s.offload("param") != "none" and s.stage == 3:
        parts.append(f"weights on {s.offload('param')}")
    parts += [f"{k} {v}" for k in ("tp", "pp", "sp", "ep") if (v := s.meaning.said(k) or 1) > 1]
    return _row("sharding", ", ".join(parts), s.where("zero_optimization", "stage"))


def _processes(s: Setup) -> dict[str, Any] | None:
    if s.world is None:
        return None
    found = s.meaning.values.get("world")
    return _row("processes", s.world, found.where if found else "", "" if found else "--hardware")


def _batch(s: Setup) -> list[dict[str, Any]]:
    batch = batch_of(s)
    rows = []
    for what, name, value in (
        ("micro-batch", "micro_batch", batch.micro),
        ("accumulation", "grad_accum", batch.accum),
        ("batch a step", "global_batch", batch.whole),
    ):
        if value is not None:
            one = s.meaning.values.get(name)
            rows.append(_row(what, value, one.where if one else "", one.default if one else ""))
    return rows

"""`outlay eval`: models scored on the same text and timed in turn; the file format of the result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outlay.runner.evaluate.front import Worth, beaten_by
from outlay.runner.evaluate.intervals import (
    Measured,
    loss_difference,
    mean_loss,
    median_of,
    ratio_of,
)
from outlay.runner.evaluate.load import Folder, here, load_model
from outlay.runner.evaluate.score import (
    NEW_TOKENS,
    by_unit,
    parameters_of,
    speed_acts,
    timed,
    token_losses,
)
from outlay.runner.evaluate.text import HeldOut, check_tokenizer
from outlay.runner.exported.source import training_usd

SCHEMA_EVAL = "outlay/eval@1"
WARM_UPS = 2


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured."""

    device: str
    threads: int
    software: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Text:
    """What was read."""

    path: str
    windows: int
    seq_len: int
    predicted_tokens: int
    unit: str
    """What is resampled for the intervals of losses: document or window."""
    units: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Median over `repeats`, with the interval of the median."""

    window_s: Measured
    """One window of seq_len tokens, alone."""
    token_s: Measured
    """One generated token, a sequence alone."""
    tokens_per_s: Measured
    """Reading `batch` windows at once."""
    batch: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model."""

    target: str
    folder: str
    packed: str | None
    """Which package unpacks the weights; null = plain tensors."""
    dtype: str
    parameters: int
    nonzero: int | None
    """Null where packed weights are not counted."""
    weights_bytes: int
    folder_bytes: int
    loss: Measured
    """Nats a token."""
    perplexity: Measured
    bits_per_byte: Measured
    speed: Speed | None
    training_usd: float | None
    """Of the run that it comes from; null = unknown."""
    beaten_by: str | None
    """Another target, no larger, with no more loss and (where both are known) no dearer; null = none is."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Another model against the first, on the same tokens and in turn on the same machine."""

    target: str
    against: str
    loss: Measured
    """Nats a token more (worse)."""
    weights: float
    """Bytes of weights, as a ratio."""
    window: Measured | None
    """Time of one window, as a ratio."""
    token: Measured | None
    batch: Measured | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that `outlay eval` measured."""

    evaluated_at: str
    machine: Machine
    text: Text
    models: tuple[Evaluated, ...]
    differences: tuple[Difference, ...]
    schema: str = field(default=SCHEMA_EVAL)


Times = dict[str, npt.NDArray[np.float64]]


def evaluate(
    targets: Sequence[tuple[str, Folder]], text: HeldOut, *, batch: int, repeats: int
) -> Evaluation:
    """Score every target on the text; `repeats` 0 leaves the speed out."""
    device = here()
    unit_name, unit = text.units
    loaded = []
    for _, folder in targets:
        check_tokenizer(text, folder.path, int(folder.config.get("vocab_size", 0)))
    for _, folder in targets:
        loaded.append(load_model(folder, device=device))
    scored = [by_unit(token_losses(model, text.tokens, batch), unit) for model in loaded]
    times = _times(loaded, text, batch, repeats, device) if repeats else [None] * len(loaded)
    models = tuple(
        _evaluated(name, folder, model, losses, text, time, batch)
        for (name, folder), model, losses, time in zip(targets, loaded, scored, times, strict=True)
    )
    models = _weighed(models)
    return Evaluation(
        evaluated_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(device),
        text=Text(
            path=text.path, windows=len(text.tokens), seq_len=text.tokens.shape[1],
            predicted_tokens=int(scored[0][1].sum()), unit=unit_name, units=len(scored[0][1]),
        ),
        models=models,
        differences=tuple(
            _difference(models, scored, times, i) for i in range(1, len(models))
        ),
    )  # fmt: skip


def _times(
    models: list[Any], text: HeldOut, batch: int, repeats: int, device: torch.device
) -> list[Times]:
    """In turn (a b a b …): a slow moment of the machine meets all of them."""
    acts = [speed_acts(model, text.tokens, batch) for model in models]
    found: list[dict[str, list[float]]] = [{name: [] for name in a} for a in acts]
    for turn in range(WARM_UPS + repeats):
        for act, kept in zip(acts, found, strict=True):
            for name, call in act.items():
                took_s = timed(call, device)
                if turn >= WARM_UPS:
                    kept[name].append(took_s)
    return [{name: np.array(values) for name, values in kept.items()} for kept in found]


def _evaluated(
    name: str, folder: Folder, model: Any, losses: tuple[Any, Any], text: HeldOut,
    times: Times | None, batch: int,
) -> Evaluated:  # fmt: skip
    loss = mean_loss(*losses)
    parameters, nonzero = parameters_of(model)
    return Evaluated(
        target=name,
        folder=str(folder.path),
        packed=folder.packed,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=parameters,
        nonzero=nonzero,
        weights_bytes=folder.weights_bytes,
        folder_bytes=folder.folder_bytes,
        loss=loss,
        perplexity=loss.map_exp(),
        bits_per_byte=loss.times(text.tokens_per_byte / np.log(2)),
        speed=None if times is None else _speed(times, text, batch),
        training_usd=training_usd(folder.path),
        beaten_by=None,
    )


def _weighed(models: tuple[Evaluated, ...]) -> tuple[Evaluated, ...]:
    """With what beats each of them."""
    worths = [
        Worth(weights_bytes=m.weights_bytes, loss=m.loss.value, training_usd=m.training_usd)
        for m in models
    ]
    return tuple(
        replace(m, beaten_by=None if i is None else models[i].target)
        for m, i in zip(models, beaten_by(worths), strict=True)
    )


def _speed(times: Times, text: HeldOut, batch: int) -> Speed:
    tokens = batch * text.tokens.shape[1]
    return Speed(
        window_s=median_of(times["window"]),
        token_s=median_of(times["generate"] / NEW_TOKENS),
        tokens_per_s=median_of(tokens / times["batch"]),
        batch=batch,
        repeats=len(times["window"]),
    )


def _difference(
    models: tuple[Evaluated, ...], scored: list[tuple[Any, Any]], times: Sequence[Times | None],
    i: int,
) -> Difference:  # fmt: skip
    first, mine = times[0], times[i]
    ratios: dict[str, Measured | None] = dict.fromkeys(("window", "generate", "batch"))
    if first is not None and mine is not None:
        ratios = {name: ratio_of(first[name], mine[name]) for name in ratios}
    return Difference(
        target=models[i].target,
        against=models[0].target,
        loss=loss_difference(scored[0][0], scored[i][0], scored[0][1]),
        weights=models[i].weights_bytes / models[0].weights_bytes,
        window=ratios["window"],
        token=ratios["generate"],
        batch=ratios["batch"],
    )


def _machine(device: torch.device) -> Machine:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    cores = f" ({os.cpu_count()} cores)" if device.type == "cpu" else ""
    packages = ("torch", "transformers")
    return Machine(
        device=name + cores,
        threads=torch.get_num_threads(),
        software={package: version(package) for package in packages},
    )

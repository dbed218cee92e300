"""Job: what to train, and Budget: what it may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from outlay.planner.spec.compress import Compression
from outlay.planner.spec.strategy import MOST
from outlay.profiles.errors import UsageError
from outlay.profiles.money import Currency, shown
from outlay.profiles.units import SECOND_SUFFIX, split_number

SCHEMA_JOB = "outlay/job@1"

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "nvfp4"]
BudgetKind = Literal["money", "hours", "gpu_hours", "energy", "carbon"]

_BUDGET_UNITS: dict[str, tuple[BudgetKind, float]] = {
    "usd": ("money", 1.0),
    "gpuh": ("gpu_hours", 1.0),
    "kwh": ("energy", 1.0),
    "mwh": ("energy", 1e3),
    "kgco2e": ("carbon", 1.0),
    **{unit: ("hours", seconds / 3600) for unit, seconds in SECOND_SUFFIX.items()},
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One limit. The amount is in USD, wall hours, GPU-hours, kWh or kg CO2e, by kind."""

    kind: BudgetKind
    amount: float

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise UsageError(f"a budget of {self.amount:g} {self.kind} leaves nothing to run with")

    @classmethod
    def parse(
        cls, text: str, *, where: str = "--budget", rates: Mapping[str, float] | None = None
    ) -> Budget:
        """`"5000usd"`, `"72h"`, `"30min"`, `"100gpuh"`, `"20kWh"`, `"5kgCO2e"`; `"5000eur"` where `rates` has
        USD for one eur."""
        amount, unit = split_number(text, where=where)
        kind: BudgetKind = "money"
        if unit in _BUDGET_UNITS:
            kind, factor = _BUDGET_UNITS[unit]
        elif unit in (rates or {}):
            factor = (rates or {})[unit]
        else:
            known = "usd, s, min, h, d, gpuh, kWh, kgCO2e"
            raise UsageError(
                f"{text!r}: unknown unit {unit!r}" if unit else f"{text!r} has no unit", where=where,
                do=f"use one of {known}; another currency at a stated rate: --budget 5000eur --rate eur=1.08",
            )  # fmt: skip
        if not amount > 0:
            raise UsageError(f"{text!r} leaves nothing to run with", where=where)
        return cls(kind=kind, amount=amount * factor)

    def __str__(self) -> str:
        if self.kind == "hours" and self.amount < 1:
            seconds = self.amount * 3600
            return f"{seconds / 60:.6g}min" if seconds >= 60 else f"{seconds:.6g}s"
        if self.kind == "money":
            return f"{self.amount / shown().usd:.6g}{shown().code}"
        unit = {"hours": "h", "gpu_hours": "gpuh", "energy": "kWh", "carbon": "kgCO2e"}
        return f"{self.amount:.6g}{unit[self.kind]}"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Which optimizer, with its numbers."""

    name: Literal[
        "adamw", "adam", "sgd", "lamb", "lion", "adafactor", "rmsprop", "muon",
        "adamw_8bit", "paged_adamw", "paged_adamw_8bit",
    ] = "adamw"  # fmt: skip
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.0
    """Of SGD, RMSprop and Muon; Muon takes 0.95 where it is 0."""
    adam_lr: float | None = None
    """Of what Muon leaves to Adam (tables, norms, biases); null = lr."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "adam_lr"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"optimizer.{key} must be positive and finite, not {value}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"optimizer.momentum must be in [0, 1), not {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"optimizer.weight_decay makes no sense: {self.weight_decay}")


FINETUNE_WORDS = ("full", "lora", "dora", "qlora", "adapter", "adapter_v2")
"""What `--finetune` takes; lora, dora and qlora with a rank, as in qlora:r16."""
_NO_FORMULA = {
    "freeze": "which activations a partly frozen model keeps depends on the layers, and was not measured",
}


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Training of adapters over frozen weights."""

    method: Literal["lora", "dora", "adapter", "adapter_v2"] = "lora"
    rank: int = 8
    """Of the LoRA factors, on the q and v projections."""
    dropout: float = 0.05
    """Before the LoRA factors."""
    alpha: float | None = None
    """The factors' product is scaled by alpha / rank; null = twice the rank."""
    quant: Literal["none", "nf4", "nf4-dq", "int8"] = "none"
    """How the frozen linear layers are held; dq = their scales quantized too."""

    @classmethod
    def parse(cls, text: str, *, where: str = "--finetune") -> Finetune | None:
        """`"full"` is null; `"lora"`, `"lora:r16"`, `"dora:r16"`, `"qlora:r16"` (4-bit NF4 with quantized scales),
        `"adapter"`, `"adapter_v2"`. What has no formula here is refused, not approximated."""
        name, _, detail = text.strip().lower().partition(":")
        if name in _NO_FORMULA:
            raise UsageError(
                f"{name} is not estimated", where=where, why=_NO_FORMULA[name],
                do="name lora, qlora or an adapter; `full` for all weights",
            )  # fmt: skip
        if name not in FINETUNE_WORDS:
            raise UsageError(
                f"unknown method {text!r}",
                where=where,
                do=f"use one of {', '.join(FINETUNE_WORDS)}",
            )
        ranked = name in ("lora", "dora", "qlora")
        if detail and not (ranked and detail[0] == "r" and detail[1:].isdecimal()):
            raise UsageError(
                f"{text!r}: what is {detail!r}", where=where,
                do="a rank is written r16, as in lora:r16 and qlora:r16",
            )  # fmt: skip
        if name == "full":
            return None
        rank = int(detail[1:]) if detail else cls.rank
        if name == "qlora":
            return cls(method="lora", rank=rank, quant="nf4-dq")
        return cls(method=name, rank=rank)  # type: ignore[arg-type]

    @property
    def scale_alpha(self) -> float:
        """Alpha, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"finetune.rank must be at least 1, not {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UsageError(f"finetune.alpha must be positive and finite, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"finetune.dropout must be in [0, 1), not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the steps."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """wsd: warm-up, stable, then a linear decay."""
    warmup_steps: int = 0
    final_fraction: float = 0.1
    """Of the peak learning rate, at the last step."""
    decay_fraction: float = 0.1
    """Of the steps after the warm-up, in which wsd decays."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from."""

    path: str
    """A folder that `outlay data prepare` wrote (dataset.json), a file of rows or text, or a folder."""
    format: Literal["tokens", "text"] = "tokens"
    tokenizer: str | None = None
    """tokenizer.json or its folder; needed for text, found in the folder for tokens."""


@dataclass(frozen=True, kw_only=True)
class Assume:
    """What a person set of the assumptions of totals (profiles/assumptions.yaml)."""

    name: str
    low: float
    """The cheap end; the same as `expected` where one number was given."""
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train. `model` is a reference as typed; the resolved model travels beside it in a plan."""

    model: str
    seq_len: int
    global_batch: int
    """Sequences an optimizer step, over all ranks."""
    steps: int
    """Optimizer steps; tokens = steps·global_batch·seq_len."""
    precision: Precision
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    gradient_clipping: float = 1.0
    objective: Literal["causal_lm"] = "causal_lm"
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    compile: bool = False
    """Each block through torch.compile; the estimate is that of the model as it is."""
    expert_capacity: float | None = None
    """Most (token, choice) pairs that an expert takes of one rank's micro-batch, as a multiple of an even
    share; those with the least weight pass it by. Null = none is dropped."""
    target_len: int | None = None
    """Tokens of the decoder's sequence in an encoder-decoder; null = seq_len."""
    finetune: Finetune | None = None
    """Null = every weight is trained."""
    compress: Compression | None = None
    """What makes the model smaller; null = nothing does."""
    data: Data | None = None
    packing: bool = True
    """Rows are joined end to end; else each is a sequence of its own, cut or padded to seq_len."""
    attempts: int = 1
    """Whole runs that the project pays for."""
    pilot_fraction: float = 0.0
    """Of the steps, run once more before them as a trial."""
    budget: tuple[Budget, ...] = ()
    currency: Currency | None = None
    """What money is shown in; null = USD. Amounts in this file are USD all the same."""
    region: str | None = None
    """Where the electricity is from, as in profiles/carbon.csv and electricity.csv; null = the offer's own."""
    assume: tuple[Assume, ...] = ()
    """Of what totals take for granted, what was set."""
    seed: int = 0
    eval_every: int | None = None
    """Optimizer steps between evaluations on the held-out part; null = at the end only."""
    eval_sequences: int = 64
    """Held-out sequences that one evaluation reads, rounded down to whole batches."""
    save_every: int | None = None
    """Optimizer steps between checkpoints; null = by time, about every minute; and at the end."""
    schema: str = field(default=SCHEMA_JOB)

    @property
    def tokens(self) -> int:
        return self.steps * self.global_batch * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    def __post_init__(self) -> None:
        for key in ("seq_len", "global_batch", "steps", "eval_sequences", "attempts"):
            value: Any = getattr(self, key)
            if value < 1:
                raise UsageError(f"{key} must be at least 1, not {value}")
            if value > MOST:
                raise UsageError(
                    f"{key} of {value:.4g} is more than the largest that makes sense, {MOST:,}"
                )
        if not 0 <= self.gradient_clipping < math.inf:
            raise UsageError(f"gradient_clipping makes no sense: {self.gradient_clipping}")
        if self.expert_capacity is not None and not 0 < self.expert_capacity < math.inf:
            raise UsageError(
                f"expert_capacity must be positive and finite, not {self.expert_capacity}",
                do="leave it out: no token is dropped then",
            )
        if not 0 <= self.pilot_fraction <= 1:
            raise UsageError(f"a pilot of {self.pilot_fraction:.0%} of the run makes no sense")

"""How long a job is by its data, its epochs and its packing; and its method, as flags say them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlay.planner.spec.files import read_mapping
from outlay.planner.spec.job import Budget, Data, Finetune
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import UsageError
from outlay.profiles.money import Currency, currency_of, no_rate, parse_rates
from outlay.profiles.units import format_count, split_number

if TYPE_CHECKING:
    from outlay.planner.data_count import DataCount

DATASET_FILE = "dataset.json"
"""What marks a folder of prepared tokens (runner/data/prepare.py writes it)."""
MOST_EPOCHS = 10_000
Notes = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Amount:
    """One pass over the data, in sequences of the job's length; the ends are of a 90 % interval."""

    sequences: float
    low: float
    high: float
    epochs: float
    says: str

    def steps(self, batch: int) -> tuple[int, str]:
        """(optimizer steps, how they come about)."""
        each = [self.epochs * s / batch for s in (self.sequences, self.low, self.high)]
        # a last batch that is not full is not run
        steps, low, high = (max(1, math.floor(s)) for s in each)
        passes = "one epoch" if self.epochs == 1 else f"{self.epochs:g} epochs"
        says = f"{passes} of {self.says}"
        return steps, says if low == high else f"{says}; {low:,} to {high:,} steps"


def data_of(value: Data | str | None, tokenizer: str | None = None) -> Data | None:
    """A path: a folder that `outlay data prepare` wrote holds tokens, anything else is text."""
    if not isinstance(value, str):
        return value
    prepared = (Path(value).expanduser() / DATASET_FILE).is_file()
    return Data(path=value, format="tokens" if prepared else "text", tokenizer=tokenizer)


def tokens_of(data: Data) -> int | None:
    """Training tokens of a prepared folder; null for text, which is counted when it is prepared."""
    path = Path(data.path).expanduser() / DATASET_FILE
    if data.format != "tokens" or not path.is_file():
        return None
    train = read_mapping(path).get("train")
    tokens = train.get("tokens") if isinstance(train, dict) else None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def check_epochs(epochs: float | None, data: Data | None) -> None:
    """Raise where they mean nothing."""
    if epochs is None:
        return
    if data is None:
        raise UsageError(
            "epochs of what?", where="--epochs", do="pass --data, or --tokens instead of --epochs"
        )
    if not 0 < epochs <= MOST_EPOCHS:
        raise UsageError(f"{epochs:g} epochs make no sense", where="--epochs")


def amount_of(
    data: Data | None, epochs: float | None, *, packing: bool, seq_len: int
) -> tuple[Amount | None, Notes]:
    """(how much one pass is, what was counted and what it means). Raises FileError."""
    check_epochs(epochs, data)
    if data is None:
        if not packing:
            raise UsageError(
                "without packing, the cost depends on how long the rows are", where="--no-packing",
                do="pass --data FILE",
            )  # fmt: skip
        return None, []
    if data.format == "tokens":
        return _prepared(data, epochs, packing=packing, seq_len=seq_len), []
    from outlay.planner.data_count import count_data, describe

    count = count_data(data.path, tokenizer=data.tokenizer)
    notes: Notes = [{"what": "data", "value": describe(count), "source": count.source}]
    notes.append(_padding_note(count, seq_len, packing=packing))
    if packing:
        sizes = [n / seq_len for n in (count.tokens, count.tokens_low, count.tokens_high)]
    else:
        sizes = [float(count.rows)] * 3
    says = f"{count.rows:,} rows" + (
        "" if not packing else f", {format_count(count.tokens)} tokens"
    )
    return Amount(
        sequences=sizes[0], low=sizes[1], high=sizes[2], epochs=epochs or 1.0, says=says
    ), notes


def _prepared(data: Data, epochs: float | None, *, packing: bool, seq_len: int) -> Amount | None:
    if not packing:
        raise UsageError(
            "prepared tokens are packed: they have no rows", where="--no-packing",
            do="pass the file that they were prepared from",
        )  # fmt: skip
    tokens = tokens_of(data)
    if tokens is None:
        if epochs is not None:
            raise UsageError(f"{data.path} does not say how many tokens it has", where="--epochs")
        return None
    each = tokens / seq_len
    return Amount(
        sequences=each, low=each, high=each, epochs=epochs or 1.0,
        says=f"the data's {tokens:,} tokens",
    )  # fmt: skip


def _padding_note(count: DataCount, seq_len: int, *, packing: bool) -> dict[str, Any]:
    """What padding costs, whether it is paid or saved."""
    from outlay.planner.data_count import padding

    p = padding(count, seq_len)
    used = p.trained / p.computed
    cut = (
        f"; {p.rows_cut:,} rows are longer and lose {format_count(p.truncated)} tokens "
        f"({p.truncated / (p.truncated + p.trained):.1%} of all)"
        if p.truncated
        else ""
    )
    per_epoch = (
        f"a row padded or cut to {seq_len:,} tokens each: {format_count(p.computed)} computed an epoch for "
        f"{format_count(p.trained)} trained ({used:.1%}){cut}"
    )
    if packing:
        source = f"rows joined end to end; without: {per_epoch}"
    else:
        times = p.computed / max(1, count.tokens)
        source = (
            f"{per_epoch}; {times:.1f} times the tokens of packed rows, and the price follows them"
        )
    return {"what": "packing", "value": "on" if packing else "off", "source": source}


def finetune_of(value: Finetune | str | None, spec: ModelSpec) -> tuple[Finetune | None, Notes]:
    """(the method, what it takes for granted)."""
    found = Finetune.parse(value) if isinstance(value, str) else value
    if found is None:
        return None, []
    if found.rank > spec.hidden:
        raise UsageError(
            f"rank {found.rank} exceeds the model's width {spec.hidden}", where="--finetune"
        )
    held = {"none": "in the precision of the job", "nf4-dq": "in 4-bit NF4 with quantized scales"}
    text = "frozen weights " + held.get(found.quant, f"in {found.quant}")
    if found.method in ("lora", "dora"):
        text += "; factors on the q and v projections of every block; on all linear layers they take more"
    if found.method == "dora":
        text += "; the time of its norms follows from its operations and was not measured"
    text += "; time has no gradients of frozen weights, MFU counts them all the same"
    return found, [
        {"what": "finetune", "value": f"{found.method} rank {found.rank}", "source": text}
    ]


_USUAL = ("eur", "gbp", "cny", "jpy", "chf", "inr", "krw", "cad", "aud", "sek", "brl", "sgd")
"""Units that are plainly meant as money, for a better refusal only."""


def money_of(
    budget: Sequence[str] | str | None,
    rate: Sequence[str] | str | Mapping[str, float] | None,
    currency: str | None,
) -> tuple[tuple[Budget, ...], Currency | None]:
    """(budgets, what money is shown in: --currency, else that of the first budget of money)."""
    rates = parse_rates(rate)
    texts = (budget,) if isinstance(budget, str) else tuple(budget or ())
    parsed = []
    for text in texts:
        unit = split_number(text, where="--budget")[1]
        if unit in _USUAL and unit not in rates:
            raise no_rate(unit, where=f"--budget {text}")
        parsed.append(Budget.parse(text, rates=rates))
        if currency is None and unit in rates:
            currency = unit
    return tuple(parsed), currency_of(currency, rates)


def fraction_of(value: str | float | None) -> float:
    """`"2%"` or 0.02 of a run."""
    if value is None:
        return 0.0
    text = str(value).strip()
    percent = text.endswith("%")
    number, unit = split_number(text.rstrip("%"), where="--pilot")
    fraction = number / 100 if percent else number
    if unit or not 0 <= fraction <= 1:
        raise UsageError(
            f"a pilot of {text!r} of the run makes no sense", where="--pilot", do="give 2%"
        )
    return fraction


def project_note(attempts: int | None, pilot: float) -> Notes:
    """What the totals of a project hold, where more than one run was asked for."""
    if attempts is None and not pilot:
        return []
    value = f"{attempts or 1} attempt{'s' * ((attempts or 1) != 1)}"
    value += f" and a pilot of {pilot:.3g} of one" if pilot else ""
    source = (
        "whole runs, each set up anew: in the totals of `outlay size`; other figures are of one run"
    )
    return [{"what": "project", "value": value, "source": source}]

"""Nonsense in prices, units, currencies, budgets, deadlines, counts: one clear error, code 2 or 3."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from outlay.profiles.errors import OutlayError
from outlay.runner.cli import cli

SIZE = "size --model llama-3-8b --tokens 1B --hardware nebius --most 8 --dry-run"
BARE = "size --hardware nebius --most 8 --dry-run"
PLAN = "plan --model gpt2 --hardware rtx-4090:1 --tokens 10M --dry-run"
NONSENSE = [
    # prices
    (f"{PLAN} --price-usd-per-h -1", 2, "price"),
    (f"{PLAN} --price-usd-per-h nan", 2, "price"),
    (f"{PLAN} --price-usd-per-h inf", 2, "price"),
    (
        "size --model gpt2 --tokens 1B --hardware h100-sxm:8 --price-usd-per-h -24 --dry-run",
        2,
        "price",
    ),
    ("size --model gpt2 --tokens 1B --price-usd-per-h 24 --dry-run", 2, "price"),
    ("size --model gpt2 --tokens 1B --hardware nebius --price-usd-per-h 24 --dry-run", 2, "price"),
    (f"{SIZE} --buy --purchase-usd h100-sxm", 2, "not a price"),
    (f"{SIZE} --buy --purchase-usd h100-sxm=-5", 2, "not a price"),
    (f"{SIZE} --buy --purchase-usd h1000=5", 2, "unknown accelerator"),
    (f"{SIZE} --purchase-usd h100-sxm=5000", 2, "--buy"),
    ("size --model gpt2 --tokens 1B --hardware t4 --buy --dry-run", 2, "no purchase price"),
    # units and currencies
    (f"{SIZE} --budget 5000", 2, "no unit"),
    (f"{SIZE} --budget 5000bananas", 2, "unknown unit"),
    (f"{SIZE} --budget usd", 2, "not a number"),
    (f"{SIZE} --budget 5,0usd", 2, "not a number"),
    (f"{SIZE} --budget 5000eur", 2, "no rate for EUR"),
    (f"{SIZE} --budget 5000xyz", 2, "unknown unit"),
    (f"{SIZE} --currency eur", 2, "no rate for EUR"),
    (f"{SIZE} --currency euro", 2, "not a currency"),
    (f"{SIZE} --rate eur", 2, "not a rate"),
    (f"{SIZE} --rate eur=0", 2, "makes no sense"),
    (f"{SIZE} --rate eur=1.08 --rate eur=1.2", 2, "two rates"),
    (f"{SIZE} --rate usd=2", 2, "1 USD is 1 USD"),
    # budgets
    (f"{SIZE} --budget 0usd", 2, "nothing to run with"),
    (f"{SIZE} --budget -5usd", 2, "nothing to run with"),
    (f"{SIZE} --budget 1e400usd", 2, "not a finite number"),
    (f"{SIZE} --budget 0.01usd", 3, "nothing that was looked at keeps"),
    (f"{SIZE} --budget 0.01kWh", 3, "nothing that was looked at keeps"),
    (f"{SIZE} --budget 0.001kgCO2e --region FRA", 3, "nothing that was looked at keeps"),
    (f"{SIZE} --budget 1gpuh", 3, "nothing that was looked at keeps"),
    (f"{BARE} --budget 0.0001usd", 3, "nothing that was looked at keeps"),
    # deadlines
    (f"{SIZE} --deadline 0d", 2, "has passed"),
    (f"{SIZE} --deadline -1d", 2, "negative"),
    (f"{SIZE} --deadline 14", 2, "unit"),
    (f"{SIZE} --deadline tomorrow", 2, "not a number"),
    (f"{SIZE} --deadline 1min", 3, "nothing that was looked at keeps"),
    (f"{PLAN} --deadline 1s", 3, "cannot be kept"),
    # counts
    (f"{SIZE} --most 0", 2, "make no sense"),
    (f"{SIZE} --most many", 2, "not a number"),
    (f"{SIZE} --tokens 0", 2, "makes no sense"),
    (f"{SIZE} --tokens 1.5", 2, "not a whole number"),
    (f"{SIZE} --tokens -1B", 2, "negative"),
    (f"{SIZE} --steps 0", 2, "--steps"),
    (f"{SIZE} --seq-len 0", 2, "seq_len"),
    (f"{SIZE} --global-batch -8", 2, "global_batch"),
    (f"{SIZE} --attempts 0", 2, "attempts"),
    (f"{SIZE} --pilot 200%", 2, "pilot"),
    (f"{SIZE} --epochs 3", 2, "not two"),
    ("plan --model gpt2 --hardware h100-sxm:0 --dry-run", 2, "0 accelerators"),
    ("plan --model gpt2 --hardware h100-sxm:8/3 --dry-run", 2, "3"),
    # names and figures
    (f"{SIZE} --region Atlantis", 2, "unknown region"),
    (f"{SIZE} --assume pue", 2, "sets nothing"),
    (f"{SIZE} --assume pue=0.9", 2, "makes no sense"),
    (f"{SIZE} --assume pue=1/2", 2, "neither one number nor three"),
    (f"{SIZE} --assume puee=1.2", 2, "unknown assumption"),
    (f"{SIZE} --assume life_years=inf", 2, "makes no sense"),
    ("size --model gpt2 --hardware nebios --dry-run", 2, "nebius"),
    # models that are sized
    ("size --hardware nebius --dry-run", 2, "nothing to size one by"),
    (f"{BARE} --parameters 0", 2, "makes no sense"),
    (f"{BARE} --parameters 1e20", 2, "makes no sense"),
    (f"{BARE} --reach-loss 1.0", 2, "out of reach"),
    (f"{BARE} --reach-loss nan", 2, "out of reach"),
    (f"{BARE} --parameters 7B --overtrain 0", 2, "over-training"),
    (f"{BARE} --parameters 7B --overtrain inf", 2, "over-training"),
    (f"{BARE} --parameters 7B --reach-loss 2", 2, "not both"),
    (f"{SIZE} --parameters 7B", 2, "--parameters"),
]


@pytest.mark.parametrize(("line", "code", "says"), NONSENSE, ids=[row[0][-40:] for row in NONSENSE])
def test_one_clear_error(line: str, code: int, says: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(cli, line.split())
    error = result.exception
    if isinstance(error, OutlayError):
        text, found = error.message(), error.exit_code
    else:
        assert isinstance(error, SystemExit), result.output
        text, found = result.output, result.exit_code
    assert found == code, text
    assert says in text
    assert len(text.splitlines()) <= 5
    assert not list(tmp_path.iterdir())

"""Money in another currency: at a stated rate, or not at all."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outlay.planner.amount import money_of
from outlay.planner.spec.job import Budget
from outlay.profiles.errors import UsageError
from outlay.profiles.money import Currency, parse_rates, showing, shown
from outlay.profiles.units import format_usd
from outlay.runner.cli import cli

PLAN = ["plan", "--model", "gpt2", "--hardware", "rtx-4090:1", "--price-usd-per-h", "0.54", "--tokens",
        "100M", "--dry-run"]  # fmt: skip
EUR = Currency(code="eur", usd=1.08)


def run(folder: Path, *args: str) -> Result:
    with contextlib.chdir(folder):
        return CliRunner().invoke(cli, list(args), catch_exceptions=True)


def test_a_budget_in_euro_is_the_same_in_dollars() -> None:
    budgets, currency = money_of(["5000eur", "72h"], ["eur=1.08"], None)
    assert budgets == (Budget(kind="money", amount=5400.0), Budget(kind="hours", amount=72.0))
    assert currency == EUR
    with showing(EUR):
        assert str(budgets[0]) == "5000eur"
        assert format_usd(540.0) == "500 EUR"
    assert str(budgets[0]) == "5400usd"
    assert format_usd(540.0) == "540 USD"


def test_what_is_shown_is_asked_for_or_follows_the_budget() -> None:
    assert money_of(["5000usd"], ["eur=1.08"], "eur")[1] == EUR
    assert money_of(["5000eur"], ["eur=1.08"], "usd")[1] is None
    assert money_of(["5000usd", "3000eur"], {"eur": 1.08}, None)[1] is None
    assert money_of((), None, None) == ((), None)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["eur"], "not a rate"), (["eur=x"], "not a rate"), (["eur=nan"], "not a rate"),
        (["eur=0"], "makes no sense"), (["eur=-1"], "makes no sense"), (["euro=1.08"], "not a currency"),
        (["usd=1.1"], "1 USD is 1 USD"), (["eur=1.08", "eur=1.1"], "two rates for EUR"),
    ],
)  # fmt: skip
def test_nonsense_rates(texts: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_rates(texts)


def test_no_rate_no_conversion() -> None:
    for call in (lambda: money_of(["5000eur"], None, None), lambda: money_of((), None, "eur")):
        with pytest.raises(UsageError, match="no rate for EUR is known"):
            call()


def test_every_money_output_and_nothing_left_behind(tmp_path: Path) -> None:
    dollars = run(tmp_path, *PLAN)
    euros = run(tmp_path, *PLAN, "--currency", "eur", "--rate", "eur=1.08", "--budget", "3eur")
    assert dollars.exit_code == euros.exit_code == 0, euros.output
    assert "USD" in dollars.output and "EUR" not in dollars.output
    line = next(row for row in euros.output.splitlines() if row.startswith("cost"))
    assert "EUR (" in line
    assert "3eur holds about" in euros.output
    assert "1 EUR = 1.08 USD" in euros.output
    assert shown().code == "usd"


def test_size_in_euro_is_the_same_answer(tmp_path: Path) -> None:
    args = ["size", "--model", "llama-3-8b", "--tokens", "1B", "--hardware", "nebius", "--most", "8",
            "--dry-run"]  # fmt: skip
    euros = run(tmp_path, *args, "--budget", "900eur", "--rate", "eur=2")
    assert "total EUR" in euros.output and "(your 900)" in euros.output
    one, two = (
        json.loads(run(tmp_path, *args, *more, "--format", "json").stdout)
        for more in (["--budget", "1800usd"], ["--budget", "900eur", "--rate", "eur=2"])
    )
    assert two["job"]["currency"] == {"code": "eur", "usd": 2.0}
    assert [o["usd"] for o in one["options"]] == [o["usd"] for o in two["options"]]

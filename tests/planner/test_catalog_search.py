"""`outlay catalog search`: filters, order, dates beside prices, nonsense refused."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from outlay.planner.commands.catalog import catalog
from outlay.profiles.errors import UsageError


def test_cheapest_first_and_every_price_dated_or_marked() -> None:
    got = CliRunner().invoke(catalog, ["search", "h100", "--at-most", "40"], catch_exceptions=False)
    prices = [float(p) for p in re.findall(r"([\d.]+) USD/h", got.output)]
    assert prices and prices == sorted(prices) and max(prices) <= 40
    assert all(re.search(r"\d{4}-\d\d-\d\d|undated !", line) for line in got.output.splitlines())


@pytest.mark.parametrize(
    "args", [["zzz"], ["--memory", "lots"], ["--vendor", "nobody"], ["--at-most", "inf"]]
)
def test_nonsense(args: list[str]) -> None:
    got = CliRunner().invoke(catalog, ["search", *args])
    assert isinstance(got.exception, UsageError)


@pytest.mark.parametrize("price", ["-1", "0", "cheap"])
def test_a_price_that_is_none(price: str) -> None:
    assert CliRunner().invoke(catalog, ["search", "--at-most", price]).exit_code == 2

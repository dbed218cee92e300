"""Numbers with units: what is written is what is read, and nonsense is one clear error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.profiles.errors import UsageError
from outlay.profiles.units import (
    BYTE_SUFFIX,
    COUNT_SUFFIX,
    SECOND_SUFFIX,
    format_bytes,
    format_count,
    format_seconds,
    format_usd,
    parse_bytes,
    parse_count,
    parse_seconds,
    split_number,
)

Parser = Callable[[str], float]
PARSERS: tuple[Parser, ...] = (parse_count, parse_bytes, parse_seconds)
WHOLE = st.integers(0, 10**12)


@pytest.mark.parametrize(
    ("text", "count"),
    [("20B", 20_000_000_000), ("1.5k", 1500), ("3_000", 3000), ("2t", 2 * 10**12), (" 7 ", 7)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 KiB", 1536),
        ("512", 512),
        ("0.5TiB", 2**39),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("3d", 259200), ("90min", 5400), ("1.5h", 5400), ("10s", 10), ("2m", 120)]
)
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@given(st.integers(0, 9000), st.sampled_from([s for s in COUNT_SUFFIX if s]), st.booleans())
def test_a_count_is_its_number_times_its_suffix(number: int, suffix: str, upper: bool) -> None:
    written = f"{number}{suffix.upper() if upper else suffix}"
    assert parse_count(written) == number * round(COUNT_SUFFIX[suffix])


@given(st.integers(0, 10**6), st.sampled_from(list(BYTE_SUFFIX)))
def test_bytes_are_whole_and_scale(number: int, suffix: str) -> None:
    size = parse_bytes(f"{number}{suffix}")
    assert isinstance(size, int)
    assert size == number * round(BYTE_SUFFIX[suffix])


@given(st.floats(0, 1e9), st.sampled_from(list(SECOND_SUFFIX)))
def test_seconds_scale(number: float, suffix: str) -> None:
    assert parse_seconds(f"{number!r}{suffix}") == number * SECOND_SUFFIX[suffix]


@given(WHOLE)
def test_separators_do_not_change_a_number(number: int) -> None:
    assert parse_count(f"{number:_}") == parse_count(f"{number:,}") == number


@given(st.floats(1, 1e12), st.text("abcdefghijklmnopqrstuvwxyz%/", max_size=6))
def test_the_unit_comes_back_in_lower_case(number: float, unit: str) -> None:
    value, found = split_number(f"{number:.3f} {unit.upper()}")
    assert value == pytest.approx(number, abs=1e-3)
    assert found == unit


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("text", ["", "ten", "nan", "inf", "1e999s", "5 5", "--1", "1..2", "0x10"])
def test_what_is_no_number_is_refused(parse: Parser, text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize("parse", PARSERS)
def test_what_is_negative_is_refused(parse: Parser) -> None:
    with pytest.raises(UsageError, match="cannot be negative"):
        parse("-1s" if parse is parse_seconds else "-1")


def test_a_bare_duration_is_refused_and_the_units_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        parse_seconds("90", where="--deadline")
    assert "--deadline" in str(caught.value)
    assert "min" in caught.value.do and "h" in caught.value.do


def test_a_part_of_a_thing_is_no_count() -> None:
    with pytest.raises(UsageError, match="not a whole number"):
        parse_count("1.5")
    assert parse_count("1.5k") == 1500


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in PARSERS:
        try:
            assert parse(text) >= 0
        except UsageError as error:
            assert str(error)


@given(st.floats(2**30, 2**60))
def test_formatted_bytes_read_back_to_three_digits(size: float) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.005)


@given(st.floats(1, 9e14))
def test_formatted_counts_read_back_to_three_digits(count: float) -> None:
    value, unit = split_number(format_count(count))
    assert value * COUNT_SUFFIX[unit] == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (172800, "2.0 d"),
        (5400, "1.5 h"),
        (150, "2.5 min"),
        (12, "12.0 s"),
        (1.5, "1.50 s"),
        (0.0123, "12 ms"),
        (5e-6, "5 µs"),
    ],
)
def test_formatted_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("usd", "text"), [(1234.5, "1,234 USD"), (2.5, "2.50 USD"), (0.0123, "0.0123 USD")]
)
def test_formatted_money(usd: float, text: str) -> None:
    assert format_usd(usd) == text

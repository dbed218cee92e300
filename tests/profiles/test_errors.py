"""The error tree: what a message contains, and with what code the program ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.profiles import errors
from outlay.profiles.errors import (
    CheckpointError,
    FileError,
    MissingExtra,
    NotFeasible,
    OutlayError,
    UnknownName,
    UsageError,
)


def test_a_message_says_where_what_why_and_what_to_do() -> None:
    error = UsageError("0 GPUs", where="job.yaml:3: gpus", why="a run needs one", do="write 1")
    assert str(error).splitlines() == [
        "job.yaml:3: gpus: 0 GPUs",
        "  why: a run needs one",
        "  do:  write 1",
    ]


@given(st.text(min_size=1), st.text(), st.text())
def test_parts_that_are_empty_leave_no_line(what: str, why: str, do: str) -> None:
    message = OutlayError(what, why=why, do=do).message()
    assert message.startswith(what)
    assert ("  why: " + why in message) == bool(why) or "why: " in what
    assert message.endswith("  do:  " + do) if do else True


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutlayError("x"), errors.EXIT_FAILED),
        (UsageError("x"), errors.EXIT_USAGE),
        (FileError("x"), errors.EXIT_USAGE),
        (UnknownName("thing", "x", ["y"]), errors.EXIT_USAGE),
        (MissingExtra("torch", "run"), errors.EXIT_USAGE),
        (NotFeasible("x"), errors.EXIT_NOT_FEASIBLE),
        (CheckpointError("x"), errors.EXIT_CHECKPOINT),
    ],
)
def test_exit_codes(error: OutlayError, code: int) -> None:
    assert error.exit_code == code


def test_exit_codes_are_told_apart() -> None:
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert len(codes) == len(set(codes)) == 7


def test_an_unknown_name_comes_with_the_nearest() -> None:
    error = UnknownName("accelerator", "H100-SMX", ["h100-sxm", "h100-pcie", "t4"])
    assert error.near[0] == "h100-sxm"
    assert "unknown accelerator 'H100-SMX'" in str(error)
    assert "nearest: h100-sxm" in str(error)


def test_a_name_like_no_other_gets_what_there_is() -> None:
    error = UnknownName("provider", "zzz", ["aws", "gcp"])
    assert error.near == []
    assert "known: aws, gcp" in str(error)


@given(st.lists(st.text("abcdefgh-0123456789", min_size=1, max_size=8), max_size=20))
def test_the_nearest_are_known_names(known: list[str]) -> None:
    error = UnknownName("thing", "abc-1", known)
    assert set(error.near) <= set(known)
    assert len(error.near) <= 4


def test_a_missing_extra_prints_the_install_command() -> None:
    assert "pip install 'outlay[run]'" in str(MissingExtra("deepspeed", "run"))

"""What went wrong in a rank: noted by the rank, told by the supervisor, the real error first."""

from __future__ import annotations

import re
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from outlay.planner.spec.files import check_schema, parse, read_mapping, to_json, write_text
from outlay.profiles.errors import EXIT_FAILED, OutlayError
from outlay.runner.folder import RunFolder

SCHEMA_FAILURE = "outlay/failure@1"
_LOG_LINES = 12

_SECONDARY = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|gloo|socket (timeout|closed)"
    r"|nccl (error|remote)|remote process exited|heartbeat|aborted due to",
    re.IGNORECASE,
)
"""How the other ranks fail when one is gone: they lose the connection to it."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """`failure-rank-N.json`: the exception that ended a rank."""

    rank: int
    kind: str
    message: str
    traceback: str
    exit_code: int
    monotonic_s: float
    secondary: bool
    """It looks like the loss of a connection to another rank that failed first."""
    schema: str = SCHEMA_FAILURE


def note_failure(folder: RunFolder, rank: int, error: BaseException) -> int:
    """Write the failure of this rank; returns its exit code."""
    expected = isinstance(error, OutlayError)
    code = error.exit_code if isinstance(error, OutlayError) else EXIT_FAILED
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    failure = Failure(
        rank=rank,
        kind=type(error).__name__,
        message=message,
        traceback="".join(traceback.format_exception(error)),
        exit_code=code,
        monotonic_s=time.monotonic(),
        secondary=not expected and bool(_SECONDARY.search(message)),
    )
    write_text(folder.failure(rank), to_json(failure))
    return code


def read_failure(path: Path) -> Failure:
    mapping = read_mapping(path)
    check_schema(mapping, SCHEMA_FAILURE, path)
    return parse(Failure, mapping, path=path)


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a run failed, for a person."""

    reason: str
    exit_code: int


def cause_of(folder: RunFolder, deaths: list[tuple[int, int]]) -> Cause:
    """The first real error: an exception that is no lost connection, a signal, what is left."""
    failures = sorted(map(read_failure, folder.failures()), key=lambda f: f.monotonic_s)
    real = [f for f in failures if not f.secondary]
    if real:
        return _told(folder, real[0])
    noted = {f.rank for f in failures}
    silent = [(rank, code) for rank, code in deaths if code != 0 and rank not in noted]
    if silent:
        return _silent(folder, *silent[0])
    if failures:
        return _told(folder, failures[0])
    return Cause(
        reason="the ranks ended without an outcome"
        + "".join(f"; rank {rank} with code {code}" for rank, code in deaths),
        exit_code=EXIT_FAILED,
    )


def _told(folder: RunFolder, failure: Failure) -> Cause:
    return Cause(
        reason=f"rank {failure.rank}: {failure.message}\n  log: {folder.log(failure.rank)}",
        exit_code=failure.exit_code,
    )


def _silent(folder: RunFolder, rank: int, code: int) -> Cause:
    log = folder.log(rank)
    if code >= 0:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        tail = "".join(f"\n  | {line}" for line in lines[-_LOG_LINES:])
        return Cause(reason=f"rank {rank} ended with code {code}{tail}\n  log: {log}", exit_code=1)
    name = signal.Signals(-code).name
    hint = (
        "\n  why: not by this run; most often by the kernel, when the host's memory is used up"
        if -code == signal.SIGKILL
        else ""
    )
    reason = f"rank {rank} was killed by {name}{hint}\n  log: {log}"
    return Cause(reason=reason, exit_code=EXIT_FAILED)

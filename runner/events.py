"""`events.jsonl`: what happened in a run, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from outlay.planner.spec.files import plain
from outlay.planner.spec.measurement import SCHEMA_EVENT, Event
from outlay.profiles.errors import FileError


def utc_now() -> str:
    """ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class EventLog:
    """Appends events. Several processes may write to the same file: each line is one `write`."""

    def __init__(self, path: Path, elapsed_s: Callable[[], float]) -> None:
        self.path = path
        self._elapsed_s = elapsed_s
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, step: int | None = None, **data: Any) -> Event:
        """Append one event. Numbers that are not finite become null, since JSON has none."""
        event = Event(
            time=utc_now(),
            elapsed_s=round(self._elapsed_s(), 4),
            kind=kind,
            step=step,
            data=_finite(plain(data)),
        )
        # its data are plain already
        line = json.dumps(vars(event), ensure_ascii=False, allow_nan=False) + "\n"
        os.write(self._handle, line.encode("utf-8"))
        return event

    def close(self) -> None:
        os.close(self._handle)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value


def cut_torn_line(path: Path) -> bool:
    """Drop what a killed writer left half written at the end; true where there was something."""
    if not path.exists():
        return False
    with path.open("rb+") as handle:
        whole = handle.read()
        keep = whole.rfind(b"\n") + 1
        handle.truncate(keep)
    return keep < len(whole)


def read_events(path: Path) -> Iterator[Event]:
    """The events of a run. A last line without its end is being written, or never was: left out."""
    follower = Follower(path)
    yield from follower.new_events()


class Follower:
    """Reads a growing file: each call gives the events that were completed since the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._line = 0

    def skip_to_end(self) -> None:
        """Leave out what is already there (the attempts before this one)."""
        for _ in self.new_events():
            pass

    def new_events(self) -> Iterator[Event]:
        try:
            with self.path.open("rb") as handle:
                handle.seek(self._position)
                block = handle.read()
        except FileNotFoundError:
            return
        whole = block[: block.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            self._line += 1
            yield self._parse(line)

    def _parse(self, line: bytes) -> Event:
        where = f"{self.path}:{self._line}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise FileError("not a JSON object", where=where, why=str(error)) from None
        if not isinstance(value, dict) or value.get("schema") != SCHEMA_EVENT:
            raise FileError(f"not an event of schema {SCHEMA_EVENT}", where=where)
        try:
            return Event(**value)
        except TypeError as error:
            raise FileError("not an event", where=where, why=str(error)) from None

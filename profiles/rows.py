"""Tables of text: rows whose cells are read with `file:line: column` in every complaint."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from outlay.profiles.errors import FileError

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row of a table; empty = null, and an error names file, line and column."""

    cells: dict[str, str | None]
    where: str

    def at(self, column: str) -> str:
        return f"{self.where}: {column}"

    def maybe(self, column: str) -> str | None:
        if column not in self.cells:
            raise FileError(f"there is no column {column}", where=self.where)
        return self.cells[column] or None

    def text(self, column: str) -> str:
        value = self.maybe(column)
        if value is None:
            raise FileError("is empty", where=self.at(column))
        return value

    def number(self, column: str, unit: float = 1.0) -> float | None:
        value = self.maybe(column)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise FileError(f"{value!r} is not a number of at least 0", where=self.at(column))
        return number * unit

    def whole(self, column: str, unit: float = 1.0) -> int | None:
        number = self.number(column, unit)
        return None if number is None else round(number)

    def count(self, column: str) -> int:
        """A whole number of at least 1."""
        text = self.text(column)
        number = self.number(column) or 0.0
        if number < 1 or number != round(number):
            raise FileError(f"{text!r} is not a whole number of at least 1", where=self.at(column))
        return round(number)

    def need(self, column: str) -> float:
        self.text(column)
        return self.number(column) or 0.0


def text_lines(text: str) -> list[str]:
    """Cut at line ends alone (str.splitlines cuts at more), which stay: a quoted cell may hold some."""
    return io.StringIO(text, newline="").readlines()


def csv_rows(text: str, where: str) -> Iterator[Row]:
    """CSV with `#` comment lines at its head."""
    lines = text_lines(text)
    skip = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    reader = csv.DictReader(lines[skip:])
    for row in reader:
        yield Row(row, f"{where}:{skip + reader.line_num}")


def read_rows(text: str, where: str, build: Callable[[Row], T]) -> tuple[T, ...]:
    return tuple(build(row) for row in csv_rows(text, where))

"""Every error that outlay raises on purpose, in one tree.

    OutlayError                 exit 1   something failed
    ├── UsageError              exit 2   bad flag, bad file, nonsense value
    │   ├── FileError           exit 2   … in a file: `file:line: key`
    │   ├── UnknownName         exit 2   a name that the catalog does not have; says the nearest
    │   └── MissingExtra        exit 2   an optional package is absent; says how to install it
    ├── NotFeasible             exit 3   nothing fits, or the budget is refused before the start
    └── CheckpointError         exit 5   a checkpoint does not verify

A message says what, where, why with the numbers, and what to do. The command line
prints it on stderr and exits with `exit_code`; it never shows a traceback for these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FEASIBLE = 3
EXIT_BUDGET = 4
EXIT_CHECKPOINT = 5
EXIT_RESTART_ME = 75


class OutlayError(Exception):
    """Something failed. `what` is one sentence; the rest is optional and printed in order."""

    exit_code = EXIT_FAILED

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        super().__init__(self.message())

    def message(self) -> str:
        """`where: what: why. do`, on as many lines as there are parts."""
        first = f"{self.where}: {self.what}" if self.where else self.what
        lines = [first]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.do:
            lines.append(f"  do:  {self.do}")
        return "\n".join(lines)


class UsageError(OutlayError):
    """A flag, a file or a value that cannot be meant."""

    exit_code = EXIT_USAGE


class FileError(UsageError):
    """A file that cannot be read or does not say what its format asks for."""


class UnknownName(UsageError):
    """A name that is not in a catalog, with the nearest ones that are."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str = "") -> None:
        names = sorted(set(known))
        near = difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.4)
        hint = "nearest: " + ", ".join(near) if near else _some(names)
        super().__init__(f"unknown {kind} {name!r}", where=where, do=hint)
        self.near = near


def _some(names: list[str], count: int = 12) -> str:
    """The first few, and how many there are."""
    more = f" … {len(names)} in all (outlay catalog list)" if len(names) > count else ""
    return "known: " + ", ".join(names[:count]) + more


class MissingExtra(UsageError):
    """A command needs packages that the base install leaves out."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this command needs the package {package}, which is not installed",
            do=f"pip install 'outlay[{extra}]'",
        )


class NotFeasible(OutlayError):
    """Nothing fits, or the cheapest thing that fits costs more than the budget."""

    exit_code = EXIT_NOT_FEASIBLE


class CheckpointError(OutlayError):
    """A checkpoint is missing a file, or a file is not what its manifest says."""

    exit_code = EXIT_CHECKPOINT

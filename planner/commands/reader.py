"""The reader of what a command prints last may leave early: `outlay plan … | head`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around the printing of an answer that is complete: a reader who has seen enough is no failure (0, not 1)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # So that Python's own flush at the end does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as left:
        # rich's Console turns a broken pipe into this, with stdout on the null device already.
        if not isinstance(left.__context__, BrokenPipeError):
            raise

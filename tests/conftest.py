"""Fixtures that several test folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    """A pool of two living ranks, one thread each; they start at the first call."""
    from outlay.runner.pool import RankPool

    pool = RankPool(2, threads_per_rank=1)
    yield pool
    pool.close()

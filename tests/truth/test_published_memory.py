"""Memory against published measurements: what docs/accuracy.md says must stay so."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy import POOLED_ROWS, PUBLISHED, Scored, leave_one_source_out, score_rows


@pytest.fixture(scope="module")
def rows() -> list[Scored]:
    return score_rows(PUBLISHED)


def _scores(rows: list[Scored], predicted: np.ndarray) -> tuple[float, float]:
    """(median, mean over sources; 90th percentile, pooled over the large sources)."""
    measured = np.array([r.measured for r in rows], float)
    errors = np.abs(predicted / measured - 1)
    sources = np.array([r.source for r in rows])
    by_source = [errors[sources == s] for s in sorted(set(sources))]
    pooled = np.concatenate([e for e in by_source if len(e) >= POOLED_ROWS])
    return float(np.mean([np.median(e) for e in by_source])), float(np.quantile(pooled, 0.9))


def test_errors_of_memory(rows: list[Scored]) -> None:
    known = [r for r in rows if r.measured is not None]
    median, p90 = _scores(known, np.array([r.predicted for r in known]))
    assert median <= 0.05
    assert p90 <= 0.15
    median, p90 = _scores(known, leave_one_source_out(known)[0])
    assert median <= 0.08
    assert p90 <= 0.25


def test_rows_that_ran_out_of_memory_are_found(rows: list[Scored]) -> None:
    failed = [r for r in rows if r.oom]
    assert failed
    assert [r.id for r in failed if r.verdict == "ok"] == []


def test_few_rows_that_ran_are_refused(rows: list[Scored]) -> None:
    ran = [r for r in rows if not r.oom]
    assert sum(r.verdict == "no" for r in ran) <= 0.02 * len(ran)


def test_better_than_rules_of_thumb(rows: list[Scored]) -> None:
    known = [r for r in rows if r.measured is not None]
    ours, _ = _scores(known, np.array([r.predicted for r in known]))
    rule, _ = _scores(known, np.array([r.states_rule for r in known]))
    assert ours < rule / 5

"""Living ranks: results, exceptions, deaths, silence."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from outlay.profiles.errors import UsageError
from outlay.runner.pool import PoolError, RankError, RankPool

pytestmark = pytest.mark.ranks


def test_every_rank_answers_and_knows_which_it_is(ranks: RankPool) -> None:
    answers = ranks.call("ranks:who", "hello", suffix="!")
    assert [a["rank"] for a in answers] == [0, 1]
    assert {a["world"] for a in answers} == {2}
    assert {a["sum"] for a in answers} == {1}
    assert {a["said"] for a in answers} == {"hello!"}
    assert [a["pid"] for a in answers] == ranks.pids
    assert {a["threads"] for a in answers} == {1}
    assert ranks.start_s is not None and ranks.start_s > 0


def test_ranks_live_on_between_calls(ranks: RankPool) -> None:
    before = ranks.call("ranks:who", "a")
    starts = ranks.starts
    after = ranks.call("ranks:who", "b")
    assert [a["pid"] for a in after] == [a["pid"] for a in before]
    assert ranks.starts == starts


def test_no_operator_is_compiled_to_join_the_ranks(ranks: RankPool) -> None:
    assert ranks.call("ranks:shared_memory_op") == [False, False]
    assert not list(ranks.extensions_dir.rglob("*shm_comm*"))


def test_an_exception_comes_back_with_its_traceback(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="failed in rank 1") as caught:
        ranks.call("ranks:fail_in", 1)
    assert set(caught.value.errors) == {1}
    assert "in fail_in" in caught.value.errors[1]
    assert "ValueError: rank 1 does not like this" in caught.value.errors[1]
    assert ranks.alive
    assert ranks.call("ranks:who", "still here")[0]["said"] == "still here"


def test_an_error_of_ours_in_all_ranks_stays_itself(ranks: RankPool) -> None:
    with pytest.raises(UsageError) as caught:
        ranks.call("ranks:refuse_all")
    assert (caught.value.what, caught.value.do) == ("not like this", "like that")
    assert str(caught.value) == "here: not like this\n  do:  like that"
    assert ranks.alive


def test_what_cannot_be_imported_says_so(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="no_such_module"):
        ranks.call("no_such_module:f")


@pytest.mark.processes
def test_dead_hung_and_deserted_ranks_are_named_and_the_pool_starts_anew(tmp_path: Path) -> None:
    with RankPool(2, extensions_dir=tmp_path, grace_s=1.0) as pool:
        with pytest.raises(PoolError, match=r"rank 1 died \(exit code 7\)") as caught:
            pool.call("ranks:die_in", 1)
        assert "last words" in caught.value.why
        assert not pool.alive
        pids = [a["pid"] for a in pool.call("ranks:who", "again")]
        assert pool.starts == 2
        with pytest.raises(PoolError, match="no answer from rank 0 within 1 s"):
            pool.call("ranks:hang_in", 0, timeout_s=1.0)
        assert not any(_lives(pid) for pid in pids)
        with pytest.raises(PoolError, match="no answer from rank 0 after rank 1 failed") as caught:
            pool.call("ranks:fail_before_meeting", 1)
        assert "never came" in str(caught.value)


@pytest.mark.processes
def test_ranks_end_with_the_pool(tmp_path: Path) -> None:
    with RankPool(1, extensions_dir=tmp_path) as pool:
        (pid,) = pool.pids
        assert _lives(pid)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True

"""Optimizer states and weights on a local drive: the mathematics of one process, resume, what is refused.

What trains is long: DeepSpeed's operator for asynchronous files takes minutes to compile.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ranks as r

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import NotFeasible, UsageError
from outlay.runner.host import build_ops, ops_needed, prepare_environment
from outlay.runner.pool import RankPool
from outlay.runner.swap import clear, make_room, placed, swap_folder, with_drive

STEPS, LR = 20, 5e-4
# Only pieces of at least 1 MiB are swapped: each of these matrices is two of 1.1 MiB.
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
}
STATES = {"zero": 3, "offload_optimizer": "nvme"}
ALL = {**STATES, "offload_param": "nvme"}


def nvme_plan(root: Path | None = None, **strategy: Any) -> Plan:
    """At a gentle learning rate: at the other tests' a model of this width swings, and rounding grows."""
    plan = r.tiny_plan(config=LARGE, **{**ALL, **strategy})
    optimizer = dataclasses.replace(plan.job.optimizer, lr=LR)
    config = copy.deepcopy(plan.deepspeed)
    config["optimizer"]["params"]["lr"] = LR
    job = dataclasses.replace(plan.job, optimizer=optimizer)
    plan = dataclasses.replace(plan, job=job, deepspeed=config)
    return plan if root is None else placed(plan, root)


@pytest.fixture(scope="module")
def with_ops(ranks: RankPool) -> RankPool:
    """The ranks, once DeepSpeed's Adam for the host and its asynchronous files are compiled."""
    if not Path("/usr/include/libaio.h").exists():
        pytest.skip("libaio.h is missing: install libaio-dev (.ci/packages does)")
    names = ops_needed(nvme_plan().deepspeed)
    assert names == ("CPUAdamBuilder", "AsyncIOBuilder")
    build_ops(names, prepare_environment(2, 1, "cpu", ranks.extensions_dir))
    return ranks


@pytest.mark.ranks
@pytest.mark.long
def test_two_ranks_with_states_on_nvme_are_one_process(with_ops: RankPool, tmp_path: Path) -> None:
    expected = with_ops.call("ranks:reference", nvme_plan(), STEPS)[0]
    for number, strategy in enumerate((STATES, ALL)):
        plan = nvme_plan(tmp_path / str(number), **{"offload_param": "none", **strategy})
        make_room(plan, tmp_path / str(number))
        first, second = with_ops.call("ranks:train", plan, STEPS)
        r.compare(first, expected)
        assert second["losses"] == first["losses"], strategy
        swapped = {path.name for path in (tmp_path / str(number)).rglob("*.swp")}
        assert any("param" in name for name in swapped) == (strategy is ALL)
        assert any("gradient" in name for name in swapped)


@pytest.mark.ranks
@pytest.mark.long
def test_an_engine_outside_of_a_run_swaps_into_a_folder_that_goes(with_ops: RankPool) -> None:
    before = set(Path(tempfile.gettempdir()).glob("outlay-swap-*"))
    rank = with_ops.call("ranks:train", nvme_plan(), 1)[0]
    assert rank["losses"][0] > 0
    assert set(Path(tempfile.gettempdir()).glob("outlay-swap-*")) <= before


@pytest.mark.ranks
@pytest.mark.long
def test_a_resume_with_states_on_nvme_repeats_the_losses(
    with_ops: RankPool, tmp_path: Path
) -> None:
    plan = nvme_plan(tmp_path)
    make_room(plan, tmp_path)
    went_on = with_ops.call("ranks_saved:train_save_train", plan, str(tmp_path / "c"), 3, 3)
    make_room(plan, tmp_path)
    resumed = with_ops.call("ranks_saved:resume_train", plan, went_on[0]["folder"], 3)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in went_on]


def test_the_folder_is_the_runs_own(tmp_path: Path) -> None:
    run, drive = tmp_path / "run", tmp_path / "drive"
    drive.mkdir()
    plan = nvme_plan()
    assert swap_folder(plan, run) == run / "swap"
    named = with_drive(plan, str(drive))
    folder = swap_folder(named, run)
    assert folder.parent == drive and folder != swap_folder(named, tmp_path / "other")
    sections = placed(named, run).deepspeed["zero_optimization"]
    assert sections["offload_param"]["nvme_path"] == str(folder)
    assert sections["offload_optimizer"]["nvme_path"] == str(folder)
    make_room(named, run)
    (folder / "left").write_text("by a run that was killed")
    make_room(named, run)
    assert folder.is_dir() and not list(folder.iterdir())
    clear(named, run)
    assert drive.is_dir() and not folder.exists()


def test_a_drive_for_nothing_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="offloads nothing to NVMe"):
        with_drive(r.tiny_plan(zero=3), str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        with_drive(nvme_plan(), str(tmp_path / "none"))


def test_too_little_space_is_refused_with_the_numbers(tmp_path: Path) -> None:
    plan = dataclasses.replace(nvme_plan(), estimate={"memory": {"nvme_bytes": 2**60}})
    with pytest.raises(NotFeasible, match="too little space") as caught:
        make_room(plan, tmp_path)
    assert "1.00 EiB are needed" in caught.value.why or "are free" in caught.value.why


def test_a_file_system_without_direct_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match="O_DIRECT"):
        make_room(nvme_plan(), tmp_path)

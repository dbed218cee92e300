"""The environment of a rank, dead locks, and which operators a configuration needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import tiny_plan

from outlay.profiles.errors import OutlayError
from outlay.runner import host


def _lock(folder: Path, age_s: float) -> Path:
    lock = folder / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    stamp = time.time() - age_s
    os.utime(lock, (stamp, stamp))
    return lock


def test_environment_is_whole_and_made_for_ranks(tmp_path: Path) -> None:
    made = host.prepare_environment(2, 3, "cpu", tmp_path / "extensions")
    assert made["PATH"] == os.environ["PATH"]
    assert made["DS_ACCELERATOR"] == "cpu"
    assert (made["OMP_NUM_THREADS"], made["MKL_NUM_THREADS"]) == ("3", "3")
    assert made["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "extensions")
    assert made["TOKENIZERS_PARALLELISM"] == "false"
    assert (tmp_path / "extensions").is_dir()


def test_extensions_follow_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host.default_extensions_dir() == tmp_path / "outlay" / "extensions"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert host.default_extensions_dir() == tmp_path / ".cache" / "outlay" / "extensions"


def test_a_lock_that_nobody_can_hold_is_removed(tmp_path: Path) -> None:
    lock = _lock(tmp_path, age_s=5)
    assert host.remove_dead_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_lock_older_than_every_user_is_removed_and_a_younger_one_kept(tmp_path: Path) -> None:
    environment = {**os.environ, host.EXTENSIONS_VARIABLE: str(tmp_path)}
    user = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment
    )
    try:
        old, held = _lock(tmp_path / "a", age_s=3600), _lock(tmp_path / "b", age_s=-1)
        assert host.remove_dead_locks(tmp_path) == [old]
        assert held.exists()
    finally:
        user.communicate(b"\n", timeout=30)
    assert host.remove_dead_locks(tmp_path) == [held]


def test_operators_follow_optimizer_and_offload() -> None:
    assert host.ops_needed(tiny_plan(zero=1).deepspeed) == ()
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    assert host.ops_needed(adam) == ("FusedAdamBuilder",)
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    assert host.ops_needed({**adam, **offload}) == ("CPUAdamBuilder", "AsyncIOBuilder")
    assert host.ops_needed({"optimizer": {"type": "SGD", "params": {}}}) == ()


def test_an_operator_that_cannot_be_compiled_is_one_error(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        host.EXTENSIONS_VARIABLE: str(tmp_path),
        "PYTHONPATH": str(tmp_path),
    }
    (tmp_path / "deepspeed.py").write_text("raise SystemExit('no compiler here')\n")
    host.build_ops((), environment)
    with pytest.raises(OutlayError, match="could not compile CPUAdamBuilder") as caught:
        host.build_ops(("CPUAdamBuilder",), environment)
    assert "no compiler here" in caught.value.why

"""Checkpoints resume bit for bit; damage is found and named; what is half-written counts for nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks as r
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlay.profiles.errors import EXIT_CHECKPOINT, CheckpointError, UsageError
from outlay.runner import checkpoint
from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks
TWO_STAGES: dict[str, Any] = {"dp": 1, "pp": 2, "grad_accum": 4}
DROPOUT = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}


@pytest.mark.parametrize(
    "plan",
    [
        r.tiny_plan(zero=0),
        r.tiny_plan(zero=1),
        r.tiny_plan(zero=3),
        r.tiny_plan(zero=0, precision="bf16"),
        r.tiny_plan(zero=2, precision="bf16"),
        r.tiny_plan(zero=1, **TWO_STAGES),
        r.tiny_plan("gpt2", zero=1, config=DROPOUT),
        r.tiny_plan("gpt2", zero=1, config=DROPOUT, **TWO_STAGES),
    ],
    ids=["zero0", "zero1", "zero3", "zero0-bf16", "zero2-bf16", "pp", "dropout", "dropout-pp"],
)
def test_a_resume_repeats_the_losses_to_the_last_bit(
    ranks: RankPool, tmp_path: Path, plan: r.Plan
) -> None:
    went_on = ranks.call("ranks_saved:train_save_train", plan, str(tmp_path), 3, 4)
    resumed = ranks.call("ranks_saved:resume_train", plan, went_on[0]["folder"], 4)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in went_on]
    assert resumed[0]["state"]["data"] == {"step": 3}


def test_another_plan_is_refused_with_the_difference(ranks: RankPool, saved: Path) -> None:
    with pytest.raises(UsageError, match="written under another plan") as caught:
        ranks.call("ranks_saved:resume_train", r.tiny_plan(zero=2), str(saved), 1)
    assert "zero: 1 → 2" in caught.value.why


@pytest.fixture(scope="module")
def pristine(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real checkpoint of ZeRO-1 on two ranks, not to be touched."""
    root = tmp_path_factory.mktemp("pristine")
    (folder,) = set(ranks.call("ranks_saved:save_into", r.tiny_plan(zero=1), str(root), [7], 2)[0])
    return Path(folder)


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "root" / pristine.name))


def test_the_manifest_says_what_the_checkpoint_is(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert tuple(manifest) == checkpoint.MANIFEST_KEYS
    assert (manifest["schema"], manifest["step"]) == ("outlay/manifest@1", 7)
    assert (manifest["tokens"], manifest["data"], manifest["ranks"]) == (5, {"sha256": "ab"}, 2)
    assert manifest["strategy"]["zero"] == 1
    assert {"python", "torch", "deepspeed", "outlay"} <= set(manifest["versions"])
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    on_disk = {
        p.relative_to(saved).as_posix(): p.stat().st_size for p in saved.rglob("*") if p.is_file()
    }
    on_disk.pop("manifest.json")
    assert listed == on_disk
    assert {"rng/rank-00000.pt", "rng/rank-00001.pt", "client_state.json"} <= set(listed)
    assert not any("latest" in name for name in listed)
    assert saved.name == "step-00000007"
    checkpoint.verify(saved)


def _shard(folder: Path) -> Path:
    return folder / "shards" / "mp_rank_00_model_states.pt"


def _truncate(folder: Path) -> str:
    size = _shard(folder).stat().st_size
    with _shard(folder).open("r+b") as opened:
        opened.truncate(size - 1)
    return f"expected {size} bytes, found {size - 1}"


def _flip(folder: Path) -> str:
    data = bytearray(_shard(folder).read_bytes())
    data[len(data) // 2] ^= 1
    _shard(folder).write_bytes(data)
    return "expected sha256 .*, found "


def _remove(folder: Path) -> str:
    size = _shard(folder).stat().st_size
    _shard(folder).unlink()
    return f"expected {size} bytes, found none"


DAMAGES = [_truncate, _flip, _remove]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_expected_and_found(
    saved: Path, damage: Callable[[Path], str]
) -> None:
    why = damage(saved)
    with pytest.raises(CheckpointError, match=why) as caught:
        checkpoint.verify(saved)
    assert str(_shard(saved)) in str(caught.value)
    assert caught.value.exit_code == EXIT_CHECKPOINT


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_ranks_refuse_a_damaged_checkpoint(
    ranks: RankPool, saved: Path, damage: Callable[[Path], str]
) -> None:
    why = damage(saved)
    with pytest.raises(CheckpointError, match=why):
        ranks.call("ranks_saved:resume_train", r.tiny_plan(zero=1), str(saved), 1)


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.data())
def test_any_flipped_bit_is_found(saved: Path, data: st.DataObject) -> None:
    files = sorted(p for p in saved.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files), label="file")
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1), label="byte")
    bit = data.draw(st.integers(0, 7), label="bit")
    damaged = bytearray(before)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(CheckpointError):
            checkpoint.verify(saved)
    finally:
        path.write_bytes(before)
    checkpoint.verify(saved)


def test_a_changed_manifest_is_found(saved: Path) -> None:
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match=r"manifest is damaged[\s\S]*expected .*, found"):
        checkpoint.verify(saved)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="manifest is damaged"):
        checkpoint.verify(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match="no manifest"):
        checkpoint.verify(saved)


def test_the_newest_that_verifies_is_taken_and_the_others_explained(saved: Path) -> None:
    root = saved.parent
    newer = Path(shutil.copytree(saved, root / "step-00000100"))
    newest = Path(shutil.copytree(saved, root / "step-00000101"))
    shutil.copytree(saved, root / "step-00000102.partial")
    (root / "notes").mkdir()
    assert checkpoint.newest_valid(root) == (newest, [])
    _flip(newest)
    found, rejected = checkpoint.newest_valid(root)
    assert found == newer
    assert [one.path for one in rejected] == [newest]
    assert "a file has changed" in rejected[0].reason and "expected sha256" in rejected[0].reason
    _remove(newer)
    _truncate(saved)
    found, rejected = checkpoint.newest_valid(root)
    assert found is None
    assert [one.path.name for one in rejected] == [
        "step-00000101",
        "step-00000100",
        "step-00000007",
    ]
    assert checkpoint.newest_valid(root / "nothing") == (None, [])


def test_old_ones_and_what_a_crash_left_are_dropped(ranks: RankPool, saved: Path) -> None:
    root = saved.parent
    (root / "step-00000008.partial" / "shards").mkdir(parents=True)
    folders = ranks.call(
        "ranks_saved:save_into", r.tiny_plan(zero=1), str(root), [10, 11, 12, 12], 2
    )[0]
    assert [Path(folder).name[-2:] for folder in folders] == ["10", "11", "12", "12"]
    assert sorted(p.name for p in root.iterdir()) == ["step-00000011", "step-00000012"]
    assert checkpoint.newest_valid(root) == (root / "step-00000012", [])


def test_what_cannot_be_written_is_one_error_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        ranks.call("ranks_saved:save_into", r.tiny_plan(zero=1), str(tmp_path / "root"), [1], 2)
    assert "root" in caught.value.where
    assert ranks.alive


def test_shards_are_read_without_running_what_they_say(ranks: RankPool, saved: Path) -> None:
    """Even where somebody made the hashes fit."""
    ranks.call("ranks_saved:write_code_into", str(_shard(saved)))
    manifest = json.loads((saved / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"].endswith(_shard(saved).name):
            entry["bytes"] = _shard(saved).stat().st_size
            entry["sha256"] = checkpoint._sha256(_shard(saved))
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(saved)
    with pytest.raises(CheckpointError, match="a shard holds more than numbers") as caught:
        ranks.call("ranks_saved:resume_train", r.tiny_plan(zero=1), str(saved), 1)
    assert str(_shard(saved)) in caught.value.where


def test_the_configuration_is_hashed() -> None:
    plan = r.tiny_plan(zero=1)
    other = dataclasses.replace(plan.job.optimizer, lr=1.0)
    first = checkpoint.config_hash(plan.deepspeed, plan.model.config)
    assert first == checkpoint.config_hash(
        dict(reversed(plan.deepspeed.items())), plan.model.config
    )
    changed = {**plan.deepspeed, "optimizer": {"params": {"lr": other.lr}}}
    assert first != checkpoint.config_hash(changed, plan.model.config)

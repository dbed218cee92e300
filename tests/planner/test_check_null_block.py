"""A ZeRO block that is null stops DeepSpeed 0.19.8, and an optimizer without type is not read by it."""

from pathlib import Path

from outlay.planner.read.known import LATEST, parse_version
from outlay.planner.read.reader import read_configuration
from outlay.planner.rules.config import found_in
from outlay.planner.rules.setup import setup_of


def _names(folder: Path, zero: str, name: str = "wrong_type") -> list[str]:
    path = folder / "ds_config.json"
    path.write_text('{"train_batch_size": 8' + zero + "}")
    rows = found_in(
        setup_of(read_configuration(path), parse_version(LATEST), spec=None, cluster=None)
    )
    return [found.what for rule, found in rows if rule.name == name]


def test_a_null_zero_block_is_refused_and_none_at_all_is_not(tmp_path: Path) -> None:
    (what,) = _names(tmp_path, ', "zero_optimization": null')
    assert "zero_optimization is null" in what
    assert _names(tmp_path, "") == []


def test_an_optimizer_without_type_has_no_effect(tmp_path: Path) -> None:
    name = "optimizer_without_type"
    (what,) = _names(tmp_path, ', "optimizer": {"params": {"lr": 1e-4}}', name)
    assert "reads nothing" in what
    assert _names(tmp_path, ', "optimizer": {"type": "AdamW"}', name) == []

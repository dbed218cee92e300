"""DeepSpeed's own parser reads what `outlay emit deepspeed` writes, at the plan's world size."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from benchmarks.emit_draw import drawn_configs

PLANS = 500


class _DataParallel:
    """What DeepSpeed asks a topology for."""

    def __init__(self, dp: int) -> None:
        self.dp = dp

    def get_data_parallel_world_size(self) -> int:
        return self.dp


def test_deepspeeds_parser_accepts_every_emitted_json(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config as module
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero import config as zero
    from deepspeed.utils import logger

    # without a process group DeepSpeed would take the world to be one rank
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    # DeepSpeed ignores a top-level key that it does not know without a word: so each must be a name
    # that its own constants have.
    names = {v for v in (vars(constants) | vars(module) | vars(zero)).values() if type(v) is str}
    names |= {"bf16", "fp16", "pipeline", "tensor_parallel", "sequence_parallel_size"}
    logger.addHandler(caplog.handler)
    seen_stages = set()
    try:
        with caplog.at_level(logging.WARNING, logger=logger.name):
            for strategy, config in drawn_configs(PLANS):
                assert set(config) <= names, set(config) - names
                parsed: Any = module.DeepSpeedConfig(config, mpu=_DataParallel(strategy.dp))
                assert parsed.train_batch_size == strategy.global_batch
                assert parsed.zero_config.stage == strategy.zero
                assert parsed.gradient_clipping == config["gradient_clipping"]
                for key in ("offload_optimizer", "offload_param"):
                    section = getattr(parsed.zero_config, key)
                    device = "none" if section is None else section.device
                    assert device == getattr(strategy, key)
                    assert device != "nvme" or str(section.nvme_path) == "/nvme"
                seen_stages.add(strategy.zero)
    finally:
        logger.removeHandler(caplog.handler)
    assert seen_stages == {0, 1, 2, 3}
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []

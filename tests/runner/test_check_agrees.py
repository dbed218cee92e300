"""What `outlay check` calls illegal, deepspeed.initialize refuses; what it calls legal, ignored or changed starts."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from outlay.planner.check.answer import Request, check
from outlay.planner.hardware import resolve_hardware
from outlay.planner.read.document import parse_document
from outlay.runner.pool import RankPool

sys.path.insert(0, str(Path(__file__).parent.parent / "planner"))

from test_check import BROKEN, GOOD

NOT_HERE = {
    "pipeline_without_zero_2",
    "secondary_partition_divides",
    "offload_needs_zero",
    "nvme_needs_stage_3",
}
"""A PipelineModule, a world that 3 does not divide, and DeepSpeed's compiled CPU optimizer (test below)."""


def drawn(r: random.Random) -> dict[str, Any]:
    """A random configuration for two CPU ranks; half of them carry a change of BROKEN."""
    config = copy.deepcopy(GOOD)
    config |= {
        "train_micro_batch_size_per_gpu": r.randint(1, 4),
        "gradient_accumulation_steps": r.randint(1, 4),
        "gradient_clipping": r.choice([0.0, 0.5, 1.0]),
        "bf16": {"enabled": r.random() < 0.5},
        "zero_optimization": {
            "stage": r.randint(0, 3),
            "overlap_comm": r.random() < 0.5,
            "reduce_bucket_size": r.choice([1000, 50_000]),
        },
    }
    if r.random() < 0.3:
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": r.randint(1, 9)}}
    if r.random() < 0.3:
        config["data_types"] = {"grad_accum_dtype": r.choice(["fp32", "bf16"])}
    if r.random() < 0.5:
        config |= BROKEN[r.choice(sorted(set(BROKEN) - NOT_HERE))]
    return {k: v for k, v in config.items() if v is not None}


def illegal(config: dict[str, Any]) -> set[str]:
    """The rules that refuse it, by `check`."""
    document = parse_document(json.dumps(config, indent=1), Path("ds.json"), "ds.json")
    found = check(document, "deepspeed", Request(cluster=resolve_hardware("h100-sxm:2"))).value
    return {f["rule"] for f in found["findings"] if f["level"] == "illegal"}


def on_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with torch's Adam: DeepSpeed's own would be compiled."""
    config = copy.deepcopy(config)
    if config["optimizer"]["type"].lower() in ("adam", "adamw"):
        config["optimizer"]["params"]["torch_adam"] = True
    return config


def agree(ranks: RankPool, of_each: int) -> None:
    """Draws until as many legal as illegal ones have been put to DeepSpeed."""
    r = random.Random(6)
    asked = {True: 0, False: 0}
    while min(asked.values()) < of_each:
        config = drawn(r)
        rules = illegal(config)
        refused = bool(rules)
        if asked[refused] == of_each:
            continue
        asked[refused] += 1
        said = ranks.call("ranks_check:initialized", on_cpu(config), timeout_s=120)[0]
        assert said.startswith("refused") is refused, (config, rules, said)


@pytest.mark.ranks
def test_deepspeed_agrees_on_10_legal_and_10_illegal(ranks: RankPool) -> None:
    agree(ranks, 10)


@pytest.mark.ranks
@pytest.mark.long
def test_deepspeed_agrees_on_60_legal_and_60_illegal(ranks: RankPool) -> None:
    agree(ranks, 60)


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(BROKEN) - NOT_HERE))
def test_each_change_of_a_sound_file_is_judged_alike(name: str, ranks: RankPool) -> None:
    config = {k: v for k, v in (copy.deepcopy(GOOD) | BROKEN[name]).items() if v is not None}
    said = ranks.call("ranks_check:initialized", on_cpu(config), timeout_s=120)[0]
    assert said.startswith("refused") is bool(illegal(config)), said

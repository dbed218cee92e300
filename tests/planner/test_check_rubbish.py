"""Configurations with random changes: an answer or one clear error, never anything else."""

from __future__ import annotations

import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from outlay.planner.check.answer import Request, check
from outlay.planner.check.report import markdown, print_check
from outlay.planner.hardware import resolve_hardware
from outlay.planner.read.document import parse_document
from outlay.profiles.errors import OutlayError

CONFIGS = Path(__file__).parent / "configs"
FILES = sorted(p for p in CONFIGS.glob("*/*") if ".ds." not in p.name)
VALUES: list[Any] = [
    None, True, False, 0, -1, 2.5, 1e9, float("inf"), float("nan"), 10**30, "auto", "", "x", "8", [], [1], {},
    {"a": 1}, "nvme",
]  # fmt: skip
KEYS = (
    "zero_optimization", "offload_optimizer", "offload_param", "stage", "bf16", "fp16", "enabled", "optimizer",
    "params", "train_batch_size", "gradient_accumulation_steps", "pipeline", "tensor_parallel",
    "sequence_parallel_size", "expert_parallel", "zenflow", "scheduler", "deepspeed", "deepspeed_config",
    "num_processes", "mixed_precision", "adapter", "quantization_bit", "cutoff_len", "fsdp", "data_types", "ratio",
)  # fmt: skip
WORDS = (
    "",
    "--",
    "-",
    "8",
    "--deepspeed",
    "--num_gpus",
    '"',
    "'",
    "$A",
    "--bf16=",
    "=",
    "\\\n",
    "#",
    "|",
)
CLUSTERS = (None, resolve_hardware("h100-sxm:8"), resolve_hardware("rtx-4090:2"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += places(inner, (*path, key))
    return found


def changed(value: dict[str, Any], r: random.Random) -> dict[str, Any]:
    value = copy.deepcopy(value)
    for _ in range(r.randint(1, 4)):
        found = places(value)
        if not found:
            break
        *above, key = r.choice(found)
        parent: Any = value
        for step in above:
            parent = parent[step]
        parent[r.choice((key, r.choice(KEYS)))] = copy.deepcopy(r.choice(VALUES))
    return value


def rubbish(path: Path, r: random.Random) -> str:
    text = path.read_text()
    if path.suffix in (".sh", ".sbatch"):
        words = text.split(" ")
        for _ in range(r.randint(1, 3)):
            words[r.randrange(len(words))] = r.choice(WORDS)
        return " ".join(words)
    if path.suffix == ".json":
        return json.dumps(changed(json.loads(text), r), indent=1)
    return yaml.safe_dump(changed(yaml.safe_load(text), r), sort_keys=False)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_random_change_is_answered_or_refused(seed: int) -> None:
    r = random.Random(seed)
    path = r.choice(FILES)
    request = Request(
        cluster=r.choice(CLUSTERS), model=r.choice((None, "gpt2")), fix=r.random() < 0.3
    )
    try:
        answer = check(parse_document(rubbish(path, r), path, path.name), None, request)
    except OutlayError as error:
        assert error.message()
        return
    print_check(Console(file=io.StringIO(), width=100), answer.value, write_hint="")
    assert markdown(answer.value)
    assert answer.texts(f"out{path.suffix}")
    json.dumps(answer.value)

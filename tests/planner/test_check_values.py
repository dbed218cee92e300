"""Values that DeepSpeed, torch or transformers refuse: each is named, and the sound form of it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_check import GOOD

from outlay.planner.check.answer import Request, check
from outlay.planner.hardware import resolve_hardware
from outlay.planner.read.document import parse_document

FP32: dict[str, Any] = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 0}}


def found(change: dict[str, Any], model: str | None = None) -> list[dict[str, Any]]:
    """What is said of the sound file with a change."""
    text = json.dumps(GOOD | change, indent=1)
    request = Request(cluster=resolve_hardware("h100-sxm:8"), model=model)
    findings: list[dict[str, Any]] = check(
        parse_document(text, Path("ds.json"), "ds.json"), None, request
    ).value["findings"]
    return findings


def adamw(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def of(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}, "zero_allow_untested_optimizer": True}


COSINE = scheduler("CosineAnnealingLR", T_max=100)
FAULTS: list[tuple[str, str, dict[str, Any], str]] = [
    ("optimizer_parameter_unknown", "illegal", adamw(learning_rate=1e-4), "write lr"),
    ("optimizer_parameter_unknown", "illegal", adamw(lr=1e-4, foreach=False), "torch_adam"),
    ("optimizer_parameter_unknown", "illegal", adamw(torch_adam=True, bias_correction=True), "torch.AdamW"),
    ("optimizer_parameter_unknown", "illegal", of("SGD", lr=1e-3, betas=[0.9, 0.99]), "torch.SGD"),
    ("optimizer_parameter_unknown", "illegal", of("Lion", lr=1e-3, eps=1e-8), "FusedLion"),
    ("muon_parameter_unknown", "ignored", of("Muon", learning_rate=3), "write lr"),
    ("scheduler_parameter_unknown", "illegal", scheduler("WarmupLR", warmup_steps=9), "write warmup_num_steps"),
    ("scheduler_parameter_missing", "illegal", {"scheduler": {"type": "WarmupLR"}}, "no params"),
    ("scheduler_parameter_missing", "illegal", scheduler("OneCycle", cycle_min_lr=1e-5), "cycle_max_lr"),
    ("torch_scheduler_wrapped", "illegal", COSINE, "WarmupCosineLR"),
    ("torch_scheduler_wrapped", "illegal", COSINE | {"zero_optimization": {"stage": 0}}, "bf16"),
    ("optimizer_value", "illegal", adamw(betas=0.9), "two numbers in a list"),
    ("optimizer_value", "illegal", adamw(betas=["0.9", "0.999"]), "write [0.9, 0.999]"),
    ("optimizer_value", "illegal", adamw(betas=[0.9]), "1 numbers"),
    ("optimizer_value", "illegal", adamw(eps="tiny"), "a number"),
    ("optimizer_value", "illegal", adamw(lr=None), "a number"),
    ("optimizer_value", "illegal", adamw(torch_adam=True, lr=-1e-3), "negative"),
    ("optimizer_value", "illegal", adamw(torch_adam=True, betas=[0.9, 1.0]), "[0, 1)"),
    ("optimizer_value", "illegal", adamw(amsgrad=True), "AMSGrad"),
    ("optimizer_value", "advice", adamw(weight_decay=-0.1), "FusedAdam does not check it"),
    ("scheduler_value", "illegal", scheduler("WarmupLR", warmup_num_steps=10.0), "write 10"),
    ("scheduler_value", "illegal", scheduler("WarmupLR", warmup_max_lr="high"), "a number"),
    ("scheduler_value", "changed", scheduler("WarmupLR", warmup_type="cosine"), "takes log"),
    ("params_are_no_block", "illegal", {"optimizer": {"type": "AdamW", "params": ["lr"]}}, "in braces"),
]  # fmt: skip
"""(rule, level, change, words): what was tried with DeepSpeed 0.19.8 on a CPU process."""


@pytest.mark.parametrize(("rule", "level", "change", "words"), FAULTS)
def test_the_value_is_named(rule: str, level: str, change: dict[str, Any], words: str) -> None:
    rows = [f for f in found(change) if f["rule"] == rule]
    assert [f["level"] for f in rows] == [level]
    assert words in rows[0]["what"] + rows[0]["do"]


STAGE = "zero_optimization"
READ: list[tuple[str, str, dict[str, Any], str]] = [
    ("stage_as_it_stands", "advice", {STAGE: {"stage": "2"}}, "reads it as 2"),
    ("stage_as_it_stands", "advice", {STAGE: {"stage": True}}, "reads it as 1"),
    ("stage_as_it_stands", "changed", adamw(lr="auto") | {STAGE: {"stage": "3"}}, "see no ZeRO-3"),
    ("true_as_a_number", "changed", {STAGE: {"stage": 2, "reduce_bucket_size": True}}, "the number 1"),
    ("wrong_type", "illegal", {STAGE: {"stage": 2, "reduce_bucket_size": "5e8"}}, "write 500000000"),
    ("wrong_type", "illegal", {STAGE: {"stage": "two"}}, "number"),
    ("top_level_value", "illegal", {"steps_per_print": 0}, "divides"),
    ("top_level_value", "illegal", {"gradient_clipping": None}, "null"),
    ("top_level_value", "illegal", {"wall_clock_breakdown": "false"}, "without quotes"),
    ("top_level_value", "changed", {"prescale_gradients": "false"}, "any text as true"),
    ("bucket_is_tiny", "advice", {STAGE: {"stage": 2, "reduce_bucket_size": 1000}}, "at least 48 collectives"),
    ("bucket_is_tiny", "advice", {STAGE: {"stage": 2, "allgather_bucket_size": 1000}}, "about 124,439 collectives"),
    ("bucket_is_tiny", "advice", {STAGE: {"stage": 3, "stage3_prefetch_bucket_size": 1000}}, "fetched"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "level", "change", "words"), READ)
def test_how_deepspeed_reads_it_is_said(
    rule: str, level: str, change: dict[str, Any], words: str
) -> None:
    rows = [f for f in found(change, "gpt2") if f["rule"] == rule]
    assert [f["level"] for f in rows] == [level]
    assert words in rows[0]["what"] + rows[0]["do"]


SOUND: list[dict[str, Any]] = [
    adamw(lr=1e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, adam_w_mode=True, bias_correction=True),
    adamw(lr=1e-4, torch_adam=True, foreach=False, fused=False),
    adamw(lr="auto", betas="auto", eps="auto", weight_decay="auto"),
    {"optimizer": {"type": "AdamW"}},
    of("SGD", lr=1e-3, momentum=0.9),
    of("Adafactor", lr=1e-3, eps=[1e-30, 1e-3]),
    of("Muon", muon_lr=1e-3, adam_lr=3e-4),
    of("Adagrad", lr=1e-3, lr_decay=0.1),
    scheduler("WarmupLR", warmup_min_lr=0, warmup_max_lr=1e-4, warmup_num_steps=10, warmup_type="linear"),
    scheduler("WarmupLR", warmup_max_lr=None),
    scheduler("OneCycle", cycle_min_lr=1e-5, cycle_max_lr=1e-4, cycle_momentum=False),
    COSINE | FP32,
    {STAGE: {"stage": "2"}},
    {STAGE: {"stage": True}},
    {STAGE: {"stage": 2, "reduce_bucket_size": "500000000"}},
    {STAGE: {"stage": 2, "reduce_bucket_size": 1000}},
    of("SGD", lr=1e-3) | {"zero_allow_untested_optimizer": "true"},
]  # fmt: skip


@pytest.mark.parametrize("change", SOUND)
def test_what_deepspeed_takes_is_no_fault(change: dict[str, Any]) -> None:
    assert [f for f in found(change) if f["level"] != "advice"] == []


WORDS = [
    ("a.json", '{"output_dir": "x",\n"lr_scheduler_type": "cosin"}', "write cosine"),
    ("a.json", '{"output_dir": "x",\n"optim": "adamw_torch_fussed"}', "write adamw_torch_fused"),
    ("a.json", '{"output_dir": "x",\n"optim": "adam"}', "write adamw_torch"),
    ("a.json", '{"output_dir": "x",\n"save_strategy": "Steps"}', "write steps"),
    ("a.yaml", "output_dir: x\neval_strategy: no\n", 'write "no"'),
    (
        "a.sh",
        "torchrun train.py --output_dir x \\\n --hub_strategy every-save\n",
        "write every_save",
    ),
]


@pytest.mark.parametrize(("name", "text", "says"), WORDS)
def test_the_nearest_word_is_named(name: str, text: str, says: str) -> None:
    value = check(parse_document(text, Path(name), name), None, Request(cluster=None)).value
    (row,) = [f for f in value["findings"] if f["rule"] == "argument_word_unknown"]
    assert (row["level"], row["where"].split(": ")[0]) == ("illegal", f"{name}:2")
    assert says in row["do"]


def test_words_of_transformers_are_no_fault() -> None:
    text = json.dumps(
        {
            "output_dir": "x",
            "optim": "paged_adamw_8bit",
            "lr_scheduler_type": "cosine",
            "save_strategy": "no",
        }
    )
    document = parse_document(text, Path("a.json"), "a.json")
    findings = check(document, None, Request(cluster=None)).value["findings"]
    assert [f["rule"] for f in findings if f["level"] != "advice"] == []

"""LoRA: peft's factors where the planner counts them, the same at every ZeRO stage, exported twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r
from small_families import PECULIAR, plan_of

from outlay.planner.spec.job import Finetune, Optimizer
from outlay.profiles.errors import UsageError
from outlay.runner.pool import RankPool

pytest.importorskip("peft")
STEPS = 20
LORA = Finetune(rank=4, dropout=0.0)
JOB: dict[str, Any] = {"finetune": LORA, "optimizer": Optimizer(lr=1e-2, weight_decay=0.0)}


def _adapted(plan: Any) -> Any:
    """The plan's model with factors that do something (B begins at zero)."""
    import torch

    from outlay.runner.adapters import adapt
    from outlay.runner.model import build_model

    job = plan.job
    model: Any = build_model(plan.model, precision="fp32", attention=job.attention, seed=job.seed)
    adapt(model, job)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return model.eval()


def _lora_plan(family: str, how: Finetune = LORA) -> Any:
    plan = plan_of(family, PECULIAR[family], zero=1)
    job = dataclasses.replace(plan.job, finetune=how)
    return dataclasses.replace(plan, job=job)


def test_every_family_that_the_planner_allows_is_tried() -> None:
    from outlay.planner.rules.runner_methods import ADAPTED
    from outlay.runner.adapters import TARGETS

    assert sorted(TARGETS) == list(ADAPTED)
    assert set(ADAPTED) <= set(PECULIAR)


DORA = dataclasses.replace(LORA, method="dora")
EVERY = [(family, LORA) for family in sorted(set(PECULIAR) - {"phi3"})]


@pytest.mark.parametrize(
    ("family", "how"),
    [*EVERY, ("llama", DORA), ("gpt2", DORA)],
    ids=lambda v: v if isinstance(v, str) else v.method,
)
def test_as_many_numbers_as_planned_and_merged_the_same_logits(family: str, how: Finetune) -> None:
    import torch

    from outlay.planner.estimate.memory import adapter_parameters
    from outlay.planner.spec.families import spec_from_config
    from outlay.runner.adapters import merged, trained
    from outlay.runner.model import build_model

    plan = _lora_plan(family, how)
    model = _adapted(plan)
    spec = spec_from_config(plan.model.config, name=family, source="test")
    assert sum(p.numel() for p in trained(model)) == adapter_parameters(spec, how)
    job = plan.job
    plain: Any = build_model(plan.model, precision="fp32", attention=job.attention, seed=job.seed)
    ids = r.global_batch(2)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        untouched = plain.eval()(input_ids=ids).logits
        plain.load_state_dict(merged(dict(model.state_dict()), plan))
        found = plain(input_ids=ids).logits
    assert (expected - untouched).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_four_bit_weights_merge_to_the_same_logits(quant: Any) -> None:
    import torch

    from outlay.runner.adapters import adapt, merged
    from outlay.runner.model import Filler, build_model, skeleton
    from outlay.runner.quantized import fill

    pytest.importorskip("bitsandbytes")
    plan = _lora_plan("llama")
    how = dataclasses.replace(LORA, quant=quant)
    job = dataclasses.replace(plan.job, finetune=how)
    plan = dataclasses.replace(plan, job=job)
    model: Any = skeleton(plan.model, precision="fp32", attention="sdpa")
    fill(model, Filler(model, plan.model, seed=7, device=torch.device("cpu")), job)
    adapt(model, job)
    ids, plain = (
        r.global_batch(2),
        build_model(plan.model, precision="fp32", attention="sdpa", seed=7),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    linear = [
        m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")
    ]
    assert all(m.weight.dtype == torch.uint8 for m in linear) and len(linear) == 3 * 7
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        plain.load_state_dict(merged(dict(model.state_dict()), plan))
        found: Any = plain.eval()(input_ids=ids)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "how"), [("llama", LORA), ("gpt2", LORA), ("llama", DORA)])
def test_peft_reads_the_adapter_and_transformers_the_merged_folder(
    family: str, how: Finetune, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    plan, ids = _lora_plan(family, how), r.global_batch(2)
    model, job = _adapted(plan), plan.job
    folder = export_safetensors(dict(model.state_dict()), plan, tmp_path / "export")
    base = build_model(plan.model, precision="fp32", attention=job.attention, seed=job.seed)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        whole = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        again = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()  # type: ignore[arg-type]
        adapted = again(input_ids=ids).logits
    torch.testing.assert_close(whole, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=0)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        pytest.param("llama", {"zero": 0}, marks=pytest.mark.long),
        pytest.param("llama", {"zero": 1}, marks=pytest.mark.long),
        ("llama", {"zero": 2, "loss": "chunked"}),
        ("llama", {"zero": 3, "activation_checkpointing": "full"}),
        ("gpt2", {"zero": 3}),
        ("qwen3", {"zero": 2, "method": "dora"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k[:4]}{x}" for k, x in v.items()),
)
def test_every_stage_is_one_process(ranks: RankPool, family: str, strategy: dict[str, Any]) -> None:
    how = dataclasses.replace(LORA, method=strategy.pop("method", "lora"))
    job = {**JOB, "finetune": how}
    expected = ranks.call("ranks:reference", r.tiny_plan(family, job=job), STEPS)[0]
    found = ranks.call("ranks:train", r.tiny_plan(family, job=job, **strategy), STEPS)[0]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-4)
    # the frozen model is random, so there is little to learn; but its factors have moved
    assert all(abs(w).max() > 0.01 for n, w in found["weights"].items() if "lora_B" in n)
    assert list(found["weights"]) == list(expected["weights"])
    for name, weight in expected["weights"].items():
        distance = np.linalg.norm(found["weights"][name] - weight)
        assert distance <= 1e-3 * np.linalg.norm(weight), name


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 2])
def test_four_bits_are_one_process_too(ranks: RankPool, zero: int) -> None:
    pytest.importorskip("bitsandbytes")
    job = {**JOB, "finetune": dataclasses.replace(LORA, quant="nf4-dq")}
    expected = ranks.call("ranks:reference", r.tiny_plan(job=job), STEPS)[0]
    found = ranks.call("ranks:train", r.tiny_plan(job=job, zero=zero), STEPS)[0]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-4)
    assert abs(found["heldout"] - expected["heldout"]) <= 1e-4


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_a_checkpoint_holds_the_factors_alone_and_resumes(
    ranks: RankPool, zero: int, tmp_path: Path
) -> None:
    plan = r.tiny_plan(job=JOB, zero=zero)
    found = ranks.call("ranks:saved_and_resumed", plan, str(tmp_path / "saved"), 4, 4)[0]
    assert found["resumed"] == found["through"]
    held = sum(p.stat().st_size for p in (tmp_path / "saved").rglob("*.pt"))
    assert held < 4 * found["parameters"], "the frozen weights alone would be as much"


@pytest.mark.parametrize(
    ("changes", "strategy", "says"),
    [
        ({"method": "adapter"}, {"zero": 1}, "does not train adapter of llama"),
        ({}, {"dp": 1, "pp": 2}, "adapters data parallel alone"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], strategy: dict[str, Any], says: str) -> None:
    from outlay.runner.refuse import refuse

    how = dataclasses.replace(LORA, **changes)
    with pytest.raises(UsageError, match=says):
        refuse(r.tiny_plan(job={"finetune": how}, **strategy), 2, "cpu")

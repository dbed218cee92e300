"""Distillation: the formulas against plain torch, and the same training from every way to ask a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.distillation import check_distill
from outlay.planner.spec.compress import Compression, Distill
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import FileError, UsageError
from outlay.runner.compress.distill import hidden_distance
from outlay.runner.compress.soft_loss import full_kl, top_kl
from outlay.runner.pool import RankPool

STEPS = 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([1.0, 2.0, 5.0]))
def test_divergence_and_its_gradient_are_torchs(seed: int, k: int, temperature: float) -> None:
    """From all logits and from k: values and gradients as autograd has them; k tell at most as much as all."""
    made = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 7, 12, generator=made) * 3
    used = torch.rand(7, generator=made) < 0.8
    used[0] = True
    p, q = torch.softmax(teacher / temperature, -1), student.clone().requires_grad_()
    soft = torch.softmax(q / temperature, -1)
    expected = (p * (p / soft).log()).sum(-1)[used].mean()
    grad = torch.autograd.grad(expected, q)[0]
    mine = student.clone().requires_grad_()
    full = full_kl(mine, teacher.clone(), used, temperature)
    assert full.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(full, mine)[0], grad, atol=1e-5, rtol=1e-4)
    top = p.log().topk(k)
    soft = torch.softmax(q / temperature, -1)
    inside = soft.gather(-1, top.indices)
    rest = [(1 - x.sum(-1)).clamp(min=1e-7) for x in (top.values.exp(), inside)]
    known = (top.values.exp() * (top.values - inside.log())).sum(-1)
    expected = (known + rest[0] * (rest[0] / rest[1]).log())[used].mean()
    part = top_kl(mine, top.values, top.indices, used, temperature)
    assert part.item() == pytest.approx(expected.item(), abs=1e-5)
    assert -1e-5 <= part.item() <= full.item() + 1e-5
    if k < 12:
        grad = torch.autograd.grad(expected, q)[0]
    torch.testing.assert_close(torch.autograd.grad(part, mine)[0], grad, atol=1e-4, rtol=1e-3)


def test_hidden_distance_is_relative_and_maps_depths() -> None:
    deep = tuple(torch.full((1, 2, 3), float(i)) for i in range(5))
    same = (deep[0], deep[2], deep[4])
    assert float(hidden_distance(same, deep)) == 0
    off = (deep[0], 2 * deep[2], deep[4])
    # |4 - 2|² / |2|² at one of two blocks
    assert float(hidden_distance(off, deep)) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def teacher(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A deeper model than the student, with the same vocabulary and width."""
    folder = tmp_path_factory.mktemp("teacher") / "export"
    plan = r.tiny_plan("llama", config={"num_hidden_layers": 6, "intermediate_size": 192})
    ranks.call("ranks_distill:write_teacher", plan, str(folder))
    return str(folder)


def plan_of(teacher: str, distill: dict[str, Any], **strategy: Any) -> Plan:
    compress = Compression(distill=Distill(teacher=teacher, **distill))
    return r.tiny_plan("llama", steps=STEPS, job={"compress": compress}, **strategy)


def close(found: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=atol)
    for name, weight in expected["weights"].items():
        distance = np.linalg.norm(found["weights"][name] - weight)
        assert distance <= 10 * atol * np.linalg.norm(weight), name


@pytest.mark.ranks
def test_zero_stages_and_a_split_teacher_agree(ranks: RankPool, teacher: str) -> None:
    """ZeRO 0 against 3 to 1e-4, the teacher whole or split, with and without hidden states."""
    both = {"hidden": 0.5, "weight": 0.7}
    expected = ranks.call("ranks_distill:train_distilled", plan_of(teacher, both, zero=0), STEPS)[0]
    for zero, more in ((3, {}), (0, {"teacher_zero": 3}), (3, {"teacher_zero": 3})):
        plan = plan_of(teacher, {**both, **more}, zero=zero)
        close(ranks.call("ranks_distill:train_distilled", plan, STEPS)[0], expected, 1e-4)
    plain = ranks.call("ranks:train", r.tiny_plan("llama", steps=STEPS, zero=0), STEPS)[0]
    assert abs(plain["losses"][0] - expected["losses"][0]) > 0.1, "the teacher had a say"


@pytest.mark.ranks
def test_cached_logits_teach_as_a_live_teacher(
    ranks: RankPool, teacher: str, tmp_path: Path
) -> None:
    """With k = vocabulary: the same training within fp16 of the kept log-probabilities."""
    live = ranks.call("ranks_distill:train_distilled", plan_of(teacher, {}, zero=2), STEPS)[0]
    plan = plan_of(teacher, {"top_k": r.VOCAB}, zero=2)
    cached = ranks.call("ranks_distill:train_distilled", plan, STEPS, str(tmp_path))[0]
    close(cached, live, 2e-3)
    info = json.loads((tmp_path / "cache.json").read_text())
    assert info["windows"] == [STEPS * r.GLOBAL_BATCH // 2] * 2
    size = sum(p.stat().st_size for p in tmp_path.glob("*.bin"))
    assert size == STEPS * r.GLOBAL_BATCH * (r.SEQ_LEN * r.VOCAB * 4 + 8)


@pytest.mark.ranks
def test_a_missing_window_and_a_pipeline_are_refused(ranks: RankPool, teacher: str) -> None:
    with pytest.raises(UsageError, match="distillation is run with data parallelism"):
        plan = plan_of(teacher, {}, zero=1, dp=1, pp=2, grad_accum=4)
        ranks.call("ranks_distill:train_distilled", plan, 1)


def test_teachers_that_cannot_teach(tmp_path: Path) -> None:
    student = spec_from_config(r.CONFIGS["llama"], name="student", source="test")
    with pytest.raises(FileError, match="is no folder"):
        check_distill(Distill(teacher=str(tmp_path / "none")), student)
    with pytest.raises(FileError, match="no safetensors"):
        check_distill(Distill(teacher=str(tmp_path)), student)
    (tmp_path / "model.safetensors").touch()
    config = {**r.CONFIGS["llama"], "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="another vocabulary"):
        check_distill(Distill(teacher=str(tmp_path)), student)
    config = {**r.CONFIGS["llama"], "hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_distill(Distill(teacher=str(tmp_path)), student)
    with pytest.raises(UsageError, match="different widths"):
        check_distill(Distill(teacher=str(tmp_path), hidden=0.1), student)
    with pytest.raises(UsageError, match="more than the vocabulary"):
        check_distill(Distill(teacher=str(tmp_path), top_k=999), student)

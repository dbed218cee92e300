"""Fused and chunked losses are the plain one: the same loss and gradients, alone and in the engine."""

from __future__ import annotations

from typing import Any

import pytest
import ranks as r

from outlay.runner.pool import RankPool

pytest.importorskip("torch")
STEPS = 20
TOKENS, WIDTH, WORDS = 37, 12, 101
FINISHES = [{}, {"scale": 0.25}, {"cap": 2.0}, {"scale": 3.0, "cap": 1.5}]


def _given(dtype: Any, *, bias: bool) -> tuple[Any, ...]:
    """Hidden states [1, n, h], head [v, h], bias, token ids."""
    import torch

    made = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, TOKENS, WIDTH, generator=made).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=made).to(dtype).requires_grad_()
    shift = torch.randn(WORDS, generator=made).to(dtype).requires_grad_() if bias else None
    return hidden, weight, shift, torch.randint(0, WORDS, (1, TOKENS), generator=made)


def _run(how: str, dtype: Any, finish: dict[str, float], *, bias: bool, scale: float) -> list[Any]:
    """[loss, gradients of hidden states, head and bias] with the loss scaled."""
    import torch

    from outlay.runner.loss import WHOLE, Finish, chunked_loss

    hidden, weight, shift, ids = _given(dtype, bias=bias)
    end = Finish(**finish)
    if how == "chunked":
        loss = chunked_loss(hidden, weight, shift, ids, end)
    else:
        logits = end.apply(torch.nn.functional.linear(hidden, weight, shift))
        loss = WHOLE[how](logits, ids)
    (loss * scale).backward()
    grads = [hidden.grad, weight.grad, *([] if shift is None else [shift.grad])]
    return [loss.detach(), *(g.float() / scale for g in grads)]


@pytest.mark.parametrize("how", ["fused", "chunked"])
@pytest.mark.parametrize("finish", FINISHES, ids=lambda f: "-".join(f) or "plain")
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_loss_and_gradients(how: str, finish: dict[str, float], bias: bool) -> None:
    import torch

    expected = _run("plain", torch.float32, finish, bias=bias, scale=3.0)
    found = _run(how, torch.float32, finish, bias=bias, scale=3.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("how", ["fused", "chunked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_as_near_to_fp32_as_the_plain_loss(how: str, dtype: str) -> None:
    """With a loss scale, as fp16 is trained; the plain loss rounds its gradients just as much."""
    import torch

    kind = getattr(torch, dtype)
    exact = _run("plain", torch.float32, {}, bias=False, scale=1.0)
    plain = _run("plain", kind, {}, bias=False, scale=1024.0)
    found = _run(how, kind, {}, bias=False, scale=1024.0)
    for one, other, true in zip(found, plain, exact, strict=True):
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 1e-3 * true.norm()


def test_nothing_is_overwritten_in_an_evaluation() -> None:
    import torch

    from outlay.runner.loss import fused_loss

    logits = torch.randn(1, TOKENS, WORDS)
    before, ids = logits.clone(), torch.randint(0, WORDS, (1, TOKENS))
    with torch.no_grad():
        fused_loss(logits, ids)
    assert torch.equal(logits, before)


def test_a_frozen_head_gets_no_gradient() -> None:
    import torch

    from outlay.runner.loss import Finish, chunked_loss

    hidden, weight, _, ids = _given(torch.float32, bias=False)
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, None, ids, Finish()).backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", {"zero": 1, "loss": "fused"}),
        pytest.param("llama", {"zero": 0, "loss": "chunked"}, marks=pytest.mark.long),
        pytest.param("gpt2", {"zero": 2, "loss": "chunked"}, marks=pytest.mark.long),
        ("llama", {"zero": 3, "loss": "chunked", "activation_checkpointing": "full"}),
        pytest.param("gpt2", {"zero": 3, "loss": "chunked"}, marks=pytest.mark.long),
        ("llama", {"zero": 1, "loss": "chunked", "dp": 1, "pp": 2, "grad_accum": 4}),
        ("gpt2", {"zero": 0, "loss": "chunked", "dp": 1, "pp": 2, "grad_accum": 4}),
        ("qwen3", {"zero": 1, "loss": "fused", "dp": 1, "pp": 2, "grad_accum": 4}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k[:4]}{x}" for k, x in v.items()),
)
def test_engines_train_the_same(ranks: RankPool, family: str, strategy: dict[str, Any]) -> None:
    expected = ranks.call("ranks:reference", r.tiny_plan(family), STEPS)[0]
    first = ranks.call("ranks:train", r.tiny_plan(family, **strategy), STEPS)[0]
    r.compare(first, expected)

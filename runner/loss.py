"""Mean cross entropy of each next token, in three forms: the same numbers, less memory.

plain     torch's: fp32 log-probabilities are kept, and two fp32 gradients appear in the backward pass
fused     the gradient is made in the forward pass and overwrites the logits
chunked   the logits never exist as a whole: head and loss go over the tokens in `CHUNKS` pieces, each
          of which leaves its part of the gradients of hidden states and head, nothing of its width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from outlay.runner.model import IGNORED, causal_lm_loss, next_tokens

if TYPE_CHECKING:
    from outlay.runner.stage import Stage

CHUNKS = 8
"""Pieces of a micro-batch's tokens; the planner's estimate assumes as many."""
_PIECES = 32
"""In which the fused loss goes over the tokens: its temporaries are as large as one of them."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What a decoder does to its head's product: logits = cap · tanh(scale · product / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """The logits, in the order of operations of transformers."""
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Gradient of the product from that of the logits, in place; d tanh = 1 − tanh²."""
        if self.cap is not None:
            assert logits is not None
            gradient.mul_(1 - (logits / self.cap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def finish_of(config: Any) -> Finish:
    """From the keys of Gemma (a cap), Granite (a divisor) and Cohere (a factor)."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale = 1.0 / float(divisor)
    cap = getattr(config, "final_logit_softcapping", None)
    return Finish(
        scale=1.0 if scale is None else float(scale), cap=None if cap is None else float(cap)
    )


def _to_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the rows' cross entropies; the fp32 logits [n, v] become softmax − one-hot, in place."""
    norms = torch.logsumexp(logits, dim=-1)
    used = labels != IGNORED
    targets = labels.clamp(min=0).unsqueeze(-1)
    total = ((norms - logits.gather(-1, targets).squeeze(-1)) * used).sum()
    logits.sub_(norms.unsqueeze(-1)).exp_()
    logits.scatter_add_(-1, targets, torch.full_like(norms, -1.0).unsqueeze(-1))
    logits.mul_(used.unsqueeze(-1))
    return total


class _Fused(torch.autograd.Function):
    """Logits [n, v] → mean loss. The logits are overwritten by their gradient (not yet divided by
    the number of tokens, so that fp16 does not underflow before the loss scale is applied)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = -(-len(logits) // _PIECES)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        wanted = ctx.needs_input_grad[0]
        values = logits.detach()
        for some, targets in zip(values.split(rows), labels.split(rows), strict=True):
            work = (
                some
                if wanted and some.dtype == torch.float32
                else some.to(torch.float32, copy=True)
            )
            total += _to_gradient(work, targets)
            if wanted and work is not some:
                some.copy_(work)
        ctx.count = (labels != IGNORED).sum()
        ctx.save_for_backward(values if wanted else None)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_((upstream / ctx.count).to(gradient.dtype)), None


class _Chunked(torch.autograd.Function):
    """Hidden states [n, h], head [v, h] (and bias [v]) → mean loss, gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        finish: Finish,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # Sums over all tokens, before they are divided, would overflow in fp16.
        wide = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if to_bias and bias is not None else None
        size = -(-len(hidden) // CHUNKS)
        for start in range(0, len(hidden), size):
            some = slice(start, start + size)
            product = functional.linear(hidden[some], weight, bias)
            logits = finish.apply(product).to(torch.float32)
            del product
            kept = logits.clone() if finish.cap is not None else None
            total += _to_gradient(logits, labels[some])
            gradient = finish.backward(logits, kept).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[some])
            if d_weight is not None and d_weight.dtype == gradient.dtype:
                d_weight.addmm_(gradient.t(), hidden[some])
            elif d_weight is not None:
                d_weight += torch.mm(gradient.t(), hidden[some])
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.count = (labels != IGNORED).sum()
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = weight.dtype
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        share = upstream / ctx.count
        scaled = [None if d is None else d.mul_(share.to(d.dtype)) for d in ctx.saved_tensors]
        d_hidden, d_weight, d_bias = scaled
        narrow = [None if d is None else d.to(ctx.dtype) for d in (d_weight, d_bias)]
        return d_hidden, narrow[0], narrow[1], None, None


def fused_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As `causal_lm_loss`; the logits [b, s, v] are gone afterwards."""
    loss: torch.Tensor = _Fused.apply(logits.flatten(0, 1), next_tokens(ids).flatten())
    return loss


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    finish: Finish,
) -> torch.Tensor:
    """From the last hidden states [b, s, h] and the head that would make logits of them."""
    labels = next_tokens(ids).flatten()
    loss: torch.Tensor = _Chunked.apply(hidden.flatten(0, 1), weight, bias, labels, finish)
    return loss


WHOLE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plain": causal_lm_loss,
    "fused": fused_loss,
}
"""Losses that are given the logits."""


def attach(model: Any, how: str) -> None:
    """Make a transformers decoder return its loss where that needs no logits: `model(input_ids=…)`.

    Head and loss stay within the forward of the head's own module, so that ZeRO-3 has its weight
    gathered then; names in the state dict stay as they are.
    """
    if how != "chunked":
        return
    head, finish = model.get_output_embeddings(), finish_of(model.config)

    def with_loss(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return chunked_loss(hidden, head.weight, head.bias, ids, finish)

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=input_ids).last_hidden_state
        loss: torch.Tensor = head(hidden, input_ids)
        return loss

    head.forward, model.forward = with_loss, forward


def model_loss(model: Any, ids: torch.Tensor, how: str) -> torch.Tensor:
    """Mean loss of a micro-batch [b, s] by a model that `attach` has prepared."""
    if how == "chunked":
        loss: torch.Tensor = model(input_ids=ids)
        return loss
    outputs = model(input_ids=ids)
    return with_router_loss(WHOLE[how](outputs.logits, ids), outputs, model)


def with_router_loss(loss: torch.Tensor, outputs: Any, model: Any) -> torch.Tensor:
    """As transformers' own forward pass adds it: the load-balance loss of a mixture of experts whose
    config says `output_router_logits`, times `router_aux_loss_coef`. Held-out losses are without it."""
    inner = getattr(model, "module", model)  # DeepSpeed's engine itself never leaves training
    balance = getattr(outputs, "aux_loss", None)
    if balance is None or not inner.training:
        return loss
    return loss + float(inner.config.router_aux_loss_coef) * balance


def loss_of_stage(stage: Stage, how: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What the last stage of a pipeline does with its output and the token ids."""
    return WHOLE[how] if how != "chunked" else partial(_of_hidden, stage)


def _of_hidden(stage: Stage, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    assert stage.head is not None
    bias: nn.Parameter | None = getattr(stage.head.inner, "bias", None)
    return chunked_loss(hidden, stage.head.weight, bias, ids, stage.finish)

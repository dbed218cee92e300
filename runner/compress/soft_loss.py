"""KL divergence of a student from a teacher, with its gradient made in the forward pass.

Rows of logits are worked on a few at a time, so that beside the logits only one tensor of their size
exists: the gradient. (torch's own operators would hold seven more.) q = softmax(s / T), p = softmax(t / T):

    KL(p || q) = Σ p (log p - log q)                  d KL / d s = (q - p) / T

Where of p only the k largest are known, all other tokens are one outcome, r = 1 - Σ p over the k:

    d KL / d s = (q - p) / T inside the k,   q (1 - r_p / r_q) / T outside
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_ROWS_BYTES = 1 << 24
"""Size of the fp32 rows that are worked on at once."""
_LEAST = 1e-7
"""Of a probability: fp32 sums of probabilities are not exact to more."""


def _rows(logits: torch.Tensor) -> int:
    return max(1, _ROWS_BYTES // (4 * logits.shape[-1]))


class _Full(torch.autograd.Function):
    """Student's and teacher's logits [n, v] and which rows count [n] → mean KL. The teacher's logits are
    overwritten by the gradient (not yet divided, so that fp16 does not underflow)."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        used: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        size = _rows(student)
        for s, t, u in zip(student.split(size), teacher.split(size), used.split(size), strict=True):
            q = functional.log_softmax(s.float() / temperature, dim=-1)
            p = functional.log_softmax(t.float() / temperature, dim=-1)
            mass = p.exp()
            total += (p.sub_(q).mul_(mass).sum(-1) * u).sum()
            t.copy_(q.exp_().sub_(mass).mul_(u.unsqueeze(-1)))
        ctx.save_for_backward(teacher, used.sum())
        ctx.temperature = temperature
        return total / used.sum()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, count = ctx.saved_tensors
        scale = (upstream / (count * ctx.temperature)).to(gradient.dtype)
        return gradient.mul_(scale), None, None, None


class _Top(torch.autograd.Function):
    """Student's logits [n, v], the teacher's log-probabilities and token numbers [n, k] → mean KL."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor,
        used: torch.Tensor, temperature: float,
    ) -> torch.Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student)
        size = _rows(student)
        parts = (x.split(size) for x in (student, values, numbers, used, gradient))
        for s, v, i, u, g in zip(*parts, strict=True):
            q = torch.softmax(s.float() / temperature, dim=-1)
            p, inside = v.float(), q.gather(-1, i)
            mass = p.exp()
            rest_p = (1 - mass.sum(-1, keepdim=True)).clamp(min=_LEAST)
            rest_q = (1 - inside.sum(-1, keepdim=True)).clamp(min=_LEAST)
            known = (mass * (p - inside.clamp(min=1e-30).log())).sum(-1)
            total += ((known + (rest_p * (rest_p / rest_q).log()).squeeze(-1)) * u).sum()
            q.mul_(1 - rest_p / rest_q).scatter_(-1, i, inside - mass)
            g.copy_(q.mul_(u.unsqueeze(-1)))
        ctx.save_for_backward(gradient, used.sum())
        ctx.temperature = temperature
        return total / used.sum()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, count = ctx.saved_tensors
        scale = (upstream / (count * ctx.temperature)).to(gradient.dtype)
        return gradient.mul_(scale), None, None, None, None


def full_kl(
    student: torch.Tensor, teacher: torch.Tensor, used: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean KL(teacher || student) over the rows that are `used` [n]; logits [n, v]. The teacher's are gone
    afterwards."""
    loss: torch.Tensor = _Full.apply(student, teacher, used, temperature)
    return loss


def top_kl(
    student: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor, used: torch.Tensor,
    temperature: float,
) -> torch.Tensor:  # fmt: skip
    """The same from the teacher's k largest log-probabilities (already at the temperature) [n, k]."""
    loss: torch.Tensor = _Top.apply(student, values, numbers, used, temperature)
    return loss

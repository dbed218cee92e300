"""How transformers writes the operators of each family, as far as it changes what autograd saves.

Read from transformers 5.23 (`models/*/modeling_*.py`) and checked against what torch saves in
tests/planner/test_activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

GELU_TENSORS = {"gelu_new": 5, "gelu_fast": 6, "quick_gelu": 3, "relu": 1, "relu2": 2}
"""Tensors of the MLP's width around a plain activation, the next product's input among them. `gelu_new`
is written out in Python (x, x³ term, tanh, 1 + tanh, result), relu keeps its result only; the others,
one operator each, keep input and result: 2."""

GRADIENT_TENSORS = {
    "gelu_new": 2,
    "gelu_fast": 2,
    "quick_gelu": 2,
    "relu": 2,
    "relu2": 2,
    "bloom_gelu": 5,
}
"""Tensors of the MLP's width that the backward pass of a plain activation makes before it frees what
was saved; the others, one operator each, make 1. A last product has two factors' gradients; relu's
result is saved twice over; BLOOM writes the derivative out in Python."""

SOFTMAX_IN_WIDTH = frozenset(
    {"gpt2", "gpt_bigcode", "gptj", "falcon", "bert", "roberta", "electra", "bart"}
)
"""Families whose eager attention takes the softmax in the width of the scores, without an fp32 copy."""

PARTIAL_ROTARY = frozenset({"gpt_neox", "phi", "phi3", "stablelm", "glm", "persimmon"})
"""Families that rotate a part of each head (it may be all of it) and concatenate it with the rest."""


@dataclass(frozen=True, kw_only=True)
class Fp32Norm:
    """A norm whose input is upcast to fp32 and saved so."""

    normed_bytes: int | None
    """Of one element of the normed value that the weight multiplies; 0 = the width of the weights,
    null = there is no weight."""


_RMS = Fp32Norm(normed_bytes=0)
_GEMMA = Fp32Norm(normed_bytes=4)
_OLMO = Fp32Norm(normed_bytes=None)
_IN_FP32 = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo": _OLMO,
}


def fp32_norm(family: str, norm: str) -> Fp32Norm | None:
    """How the family's norm upcasts; null where it is torch's own layer norm."""
    if family in _IN_FP32:
        return _IN_FP32[family]
    return _RMS if norm == "rmsnorm" else None

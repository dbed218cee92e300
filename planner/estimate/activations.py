"""What autograd keeps of one block for the backward pass, tensor by tensor.

Each function lists the tensors that the operators of one sub-layer save, in bytes a token, as the
implementation writes them. Two implementations are told apart by `kernels`:

- `hf`: transformers' modules as they stand: RMSNorm upcasts to fp32 and is written out in four
  operators, rotary embeddings and SwiGLU are unfused.
- `fused`: Megatron's and Transformer Engine's fused norms, SwiGLU/GeLU and rotary kernels, which
  save their inputs only (Korthikanti et al. 2022, arXiv 2205.05198, section 4: the 34·s·b·h of a
  GPT block with dropout, of which 2·5·a·s²·b in attention when it is not recomputed).

`width` is the size of one element in bytes (2 in mixed precision, 4 in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec

_MASK_BYTES = 1
"""A dropout mask is one byte an element."""

_PLAIN_ACTIVATION_TENSORS = {"gelu_new": 5, "gelu_fast": 5, "gelu_pytorch_tanh": 1, "gelu": 1, "relu": 1, "relu2": 2, "silu": 1}
"""ffn-wide tensors that an ungated activation saves besides the product's input: `gelu_new` is
written out in Python (x, tanh, 0.5·x, 1+tanh, x³ term), the others are one operator."""


@dataclass(frozen=True, kw_only=True)
class SavedPerToken:
    """Bytes a token that one block keeps, by how they divide among ranks."""

    sharded: float
    """Divide by tp: heads and MLP width."""
    replicated: float
    """Norms and residual stream: whole on each tp rank, divided only under sequence parallelism."""
    scores: float
    """Bytes a token *a key*: what eager attention keeps of the score matrix; divides by tp."""
    block_input: float
    """What stays of the block under full checkpointing; replicated."""
    transient: float
    """Alive only while this block's backward runs, besides what was saved; divides by tp."""


def norm_saved(spec: ModelSpec, width: int, kernels: str) -> float:
    """Input (in fp32 where an unfused RMSNorm upcasts) and, unfused, the normed value before the weight."""
    if spec.norm == "layernorm" or kernels != "hf":
        return spec.hidden * width + 8.0
    return spec.hidden * (4.0 + width) + 4.0


def attention_saved(spec: ModelSpec, a: Attention, width: int, attention: str) -> tuple[float, float]:
    """(bytes a token, bytes a token a key) of projections and the attention product.

    Saved: the normed input of q, k, v (counted in `replicated` by the caller), rotated q and k, v,
    the output (input of the o projection, the same storage), log-sum-exp. Eager attention keeps
    the softmax in fp32, its cast where the width is 2, and repeats k and v to all heads.
    """
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    if attention == "eager":
        scores = a.heads * (4.0 if width == 4 else 4.0 + width)
        if a.dropout > 0:
            scores += a.heads * (width + _MASK_BYTES)
        return width * (q + 2.0 * q + q), scores
    return width * (q + 2.0 * kv + q) + 4.0 * a.heads, 0.0


def mlp_saved(mlp: Mlp, width: int, kernels: str) -> float:
    """Gate, up, activation and product of a gated MLP (4 tensors; fused: gate, up, product);
    input and output of the activation of a plain one. A routed token visits top_k experts."""
    if mlp.gated:
        tensors = 4.0 if kernels == "hf" else 3.0
    else:
        inner = _PLAIN_ACTIVATION_TENSORS.get(mlp.activation, 1) if kernels == "hf" else 1
        tensors = 1.0 + inner
    widths = mlp.ffn * mlp.top_k + mlp.shared_ffn if mlp.experts else mlp.ffn
    return tensors * widths * width


def block_saved(
    spec: ModelSpec, block: Block, *, width: int, kernels: str, attention: str
) -> SavedPerToken:
    """All that one block keeps, for one token."""
    h = spec.hidden
    sharded, scores = attention_saved(spec, block.attention, width, attention)
    sharded += mlp_saved(block.mlp, width, kernels)
    inputs = 1.0 if block.parallel_residual and block.norms == 1 else 2.0
    replicated = block.norms * norm_saved(spec, width, kernels) + inputs * h * width
    if block.mlp.experts:
        replicated += block.mlp.top_k * h * width
    if spec.residual_dropout > 0:
        replicated += 2.0 * h * _MASK_BYTES
    q = block.attention.heads * block.attention.head_dim
    ffn = block.mlp.ffn * max(1, block.mlp.top_k)
    transient = width * max((3.0 if block.mlp.gated else 2.0) * ffn, 4.0 * q)
    return SavedPerToken(
        sharded=sharded,
        replicated=replicated,
        scores=scores,
        block_input=h * width,
        transient=transient,
    )


def logits_bytes_per_token(spec: ModelSpec, width: int, *, loss: str, chunks: int = 8) -> tuple[float, float]:
    """(kept until backward, peak during the loss) of the vocabulary-wide tensors, a token.

    plain, fp32: logits, log-softmax (kept), then the gradient of each in turn: peak 4 copies.
    plain, 16-bit: 16-bit logits, fp32 copy, fp32 log-softmax, then two fp32 gradients and the
    16-bit one. fused: the gradient overwrites the logits. chunked: one chunk of `chunks` at a time.
    """
    if not spec.has_head:
        return 0.0, 0.0
    v = float(spec.vocab)
    if loss == "fused":
        return width * v, width * v
    kept, peak = (8.0, 16.0) if width == 4 else (width + 4.0, width + 12.0)
    if loss == "chunked":
        return 0.0, peak * v / chunks
    return kept * v, peak * v

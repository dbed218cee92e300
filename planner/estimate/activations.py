"""What autograd keeps of one block for the backward pass, tensor by tensor.

Each function lists the tensors that the operators of one sub-layer save, in bytes a token, as the
implementation writes them. `kernels` tells implementations apart:

- `hf`: transformers' modules as they stand: RMSNorm upcasts to fp32 and is written out in four
  operators, rotary embeddings and SwiGLU are unfused. tests/planner/test_activations.py compares
  them with what torch really saves.
- `fused`: Megatron's and Transformer Engine's fused norms, SwiGLU/GeLU and rotary kernels, which
  save their inputs only (Korthikanti et al. 2022, arXiv 2205.05198, section 4: the 34·s·b·h of a
  GPT block with dropout, of which 2·5·a·s²·b in attention when it is not recomputed).
- `compiled`: torch.compile, whose partitioner recomputes what is pointwise from what is kept.

`width` is the size of one element in bytes (2 in mixed precision, 4 in fp32).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from outlay.planner.estimate.kernels import (
    GELU_TENSORS,
    GRADIENT_TENSORS,
    PARTIAL_ROTARY,
    SOFTMAX_IN_WIDTH,
    fp32_norm,
)
from outlay.planner.spec.job import Finetune
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec

Split = Literal["tp", "sequence", "routed", "scores", "cross_scores"]
"""How a tensor divides among ranks: `tp` and `routed` by tp (heads, MLP width), `sequence` only under
sequence parallelism (norms and residual stream). `routed` also grows with the imbalance of experts,
`scores` with the number of keys of this sequence, `cross_scores` with the encoder's."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a block is run, as far as it changes what is saved."""

    width: int
    kernels: str
    """hf | fused | compiled."""
    attention: str
    """eager | sdpa | flash: the two last save no scores."""
    mask_bytes: int = 1
    """Of one element of a dropout mask: 1 on a GPU, the width on a CPU (torch's fallback)."""
    finetune: Finetune | None = None
    peft: bool = False
    """Whether adapters are peft's, as under DeepSpeed; else litgpt's."""
    """Adapters over frozen weights; null = every weight is trained."""
    quant_saves_input: bool = False
    """A 4-bit linear layer keeps its input though its weight is frozen (bitsandbytes before 0.42)."""

    def keeps_scores(self, a: Attention) -> bool:
        """Whether attention saves its scores. A CPU's fused attention knows no dropout: with it, torch
        takes the written-out path (`sdp_utils_cpp.cpp`, `check_for_dropout`)."""
        on_cpu = self.mask_bytes > 1
        return self.attention == "eager" or (self.attention == "sdpa" and on_cpu and a.dropout > 0)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One saved tensor: bytes a token (`scores`: a token a key)."""

    name: str
    size_bytes: float
    split: Split
    for_weight: bool = False
    """Needed for a weight's gradient only: not saved where that weight is frozen."""
    linear_input: bool = False
    per_op: bool = False
    """Kept by per-operator selective checkpointing (torchtitan's list: every other matrix multiply,
    the attention product), which recomputes all else."""


@dataclass(frozen=True, kw_only=True)
class SavedPerToken:
    """Bytes a token that one block keeps, by how they divide among ranks."""

    sharded: float
    """Divide by tp: heads and MLP width."""
    replicated: float
    """Norms and residual stream: whole on each tp rank, divided only under sequence parallelism."""
    routed: float
    """Inside routed experts: divide by tp, grow with imbalance."""
    scores: float
    """Bytes a token *a key*: what eager attention keeps of the score matrix; divides by tp."""
    cross_scores: float
    """The same of cross attention, whose keys are the encoder's tokens."""
    block_input: float
    """What stays of the block under full checkpointing; replicated."""
    per_op_sharded: float
    per_op_replicated: float
    """What per-operator selective checkpointing keeps."""
    transient: float
    """Alive only while this block's backward runs, besides what was saved; divides by tp."""


def norm_tensors(spec: ModelSpec, ex: Execution, *, shared_input: bool = False) -> Iterator[Saved]:
    """Input (in fp32 where the module upcasts) and, unfused, the normed value before the weight.

    `shared_input`: another norm of the block already saved the same storage.
    """
    h, w = spec.hidden, ex.width
    upcast = fp32_norm(spec.family, spec.norm) if ex.kernels == "hf" else None
    if upcast is None:
        if not shared_input:
            yield Saved(name="norm input", size_bytes=w * h, split="sequence")
        yield Saved(name="norm statistics", size_bytes=2.0 * w, split="sequence")
        return
    yield Saved(name="norm input, fp32", size_bytes=4.0 * h, split="sequence")
    yield Saved(name="norm statistics", size_bytes=4.0, split="sequence")
    if upcast.normed_bytes is not None:
        size = upcast.normed_bytes or w
        yield Saved(name="normed", size_bytes=size * h, split="sequence", for_weight=True)


def _scores(spec: ModelSpec, a: Attention, ex: Execution, split: Split) -> Iterator[Saved]:
    """Eager attention: softmax (fp32 and its cast where the module upcasts), dropout's mask and result."""
    w, in_width = ex.width, ex.kernels != "hf" or spec.family in SOFTMAX_IN_WIDTH
    size = w if in_width or w == 4 else 4.0 + w
    if a.dropout > 0:
        size += w + ex.mask_bytes
    yield Saved(name="scores", size_bytes=a.heads * size, split=split)


def attention_tensors(
    spec: ModelSpec, a: Attention, ex: Execution, *, cross: bool = False
) -> Iterator[Saved]:
    """Rotated q and k, v, the output (the input of the o projection, the same storage), log-sum-exp.

    Eager attention repeats k and v to all heads and copies the output. Where q, k and v come from
    one matrix, v is a view that keeps all three alive after q and k were rotated into new tensors.
    """
    w, eager = ex.width, ex.keeps_scores(a)
    q, k, v, out = a.q_width, a.k_width, a.v_width, a.out_width
    if eager and a.heads != a.kv_heads:
        k, v = a.q_width, a.out_width
    elif not eager and ex.kernels == "hf" and a.fused_qkv and spec.positions == "rotary":
        v = q + k + v
    if a.qk_norm_parameters and ex.kernels == "hf":
        statistics = 4.0 * (a.heads + a.kv_heads)
        size = (4.0 + w) * (a.q_width + a.k_width) + statistics
        yield Saved(name="q and k before their norm", size_bytes=size, split="tp")
    if a.kv_rank:
        size = w * (2.0 * (a.kv_rank + a.q_rank) + a.rope_head_dim)
        yield Saved(name="compressed q and kv", size_bytes=size, split="sequence")
    yield Saved(name="q", size_bytes=w * q, split="tp", per_op=True)
    yield Saved(name="k", size_bytes=w * k, split="tp")
    yield Saved(name="v", size_bytes=w * v, split="tp", per_op=True)
    if eager:
        yield Saved(name="o input", size_bytes=w * out, split="tp", for_weight=True)
        yield from _scores(spec, a, ex, "cross_scores" if cross else "scores")
        return
    yield Saved(name="attention output", size_bytes=w * out, split="tp", per_op=True)
    yield Saved(name="log-sum-exp", size_bytes=4.0 * a.heads, split="tp")
    if ex.kernels == "hf" and spec.family in PARTIAL_ROTARY:
        # q is a concatenation, so the output is laid out head by head and must be copied.
        yield Saved(name="o input", size_bytes=w * out, split="tp", for_weight=True)


def mlp_tensors(mlp: Mlp, hidden: int, ex: Execution) -> Iterator[Saved]:
    """Gate, up, activation and product of a gated MLP; input and output of a plain one's activation."""
    w = ex.width
    if mlp.experts:
        yield from _ffn_tensors(mlp, mlp.ffn * mlp.top_k, ex, "routed")
        for name in ("routed input", "expert output"):
            yield Saved(name=name, size_bytes=w * mlp.top_k * hidden, split="sequence")
        yield Saved(
            name="router", size_bytes=4.0 * mlp.experts + 28.0 * mlp.top_k, split="sequence"
        )
        if mlp.shared_ffn:
            yield from _ffn_tensors(mlp, mlp.shared_ffn, ex, "tp")
    else:
        yield from _ffn_tensors(mlp, mlp.ffn, ex, "tp")


def _ffn_tensors(mlp: Mlp, ffn: int, ex: Execution, split: Split) -> Iterator[Saved]:
    one = float(ex.width * ffn)
    if mlp.gated:
        yield Saved(name="gate", size_bytes=one, split=split, per_op=True)
        yield Saved(name="up", size_bytes=one, split=split)
        if ex.kernels == "hf":
            # gelu written out in Python keeps more than its input.
            inner = GELU_TENSORS.get(mlp.activation, 2) - 1
            yield Saved(name="activation", size_bytes=inner * one, split=split)
        if ex.kernels != "compiled":
            yield Saved(
                name="product", size_bytes=one, split=split, for_weight=True, linear_input=True
            )
        return
    inner = GELU_TENSORS.get(mlp.activation, 2) - 1 if ex.kernels == "hf" else 1
    yield Saved(name="activation", size_bytes=inner * one, split=split, per_op=True)
    yield Saved(
        name="down input", size_bytes=one, split=split, linear_input=True,
        for_weight=mlp.activation not in ("relu", "relu2"),
    )  # fmt: skip


def adapter_tensors(spec: ModelSpec, block: Block, ex: Execution) -> Iterator[Saved]:
    """What trainable adapters over frozen weights save besides.

    LoRA on q and v: dropout's mask and result, which is the input of A; where q, k and v are one
    matrix, the update is padded to the whole width and kept (litgpt's LoRAQKVLinear). `adapter`
    (arXiv 2303.16199): the output of its prefix attention. `adapter_v2` (arXiv 2304.15010) scales
    the output of every linear layer and keeps it.
    """
    f, a, w, h = ex.finetune, block.attention, ex.width, spec.hidden
    if f is None:
        return
    if f.method == "dora" or (f.method == "lora" and ex.peft):
        # peft adapts each projection on its own: a mask and a result for each, or the input they share
        places = 1 if a.fused_qkv else 2
        reads = places * (ex.mask_bytes + w) * h if f.dropout else w * h
        size = reads + places * f.rank * w
        if f.method == "dora":
            # the base's and the factors' results, both read by the gradient of the norms
            outputs = a.q_width + a.v_width + (a.k_width if a.fused_qkv else 0)
            yield Saved(name="results to scale", size_bytes=2 * w * outputs, split="tp")
        yield Saved(name="adapter input", size_bytes=size, split="sequence")
        return
    if f.method == "lora":
        reads = (ex.mask_bytes + w) * h if f.dropout else w * h
        yield Saved(name="adapter input", size_bytes=reads, split="sequence")
        if a.fused_qkv:
            size = w * (a.q_width + a.k_width + a.v_width)
            yield Saved(name="padded update", size_bytes=size, split="tp")
        return
    yield Saved(name="prefix attention", size_bytes=w * a.out_width, split="tp")
    if f.method == "adapter_v2":
        up = 2 if block.mlp.gated else 1
        outputs = a.q_width + a.k_width + a.v_width + 2 * h + up * block.mlp.ffn
        yield Saved(name="outputs to scale", size_bytes=w * outputs, split="tp")


def block_tensors(spec: ModelSpec, block: Block, ex: Execution) -> Iterator[Saved]:
    """Every tensor that one block saves."""
    h, w = spec.hidden, ex.width
    for i in range(block.norms):
        yield from norm_tensors(spec, ex, shared_input=block.parallel_residual and i > 0)
    attentions = [block.attention, *filter(None, [block.cross_attention])]
    for a in attentions:
        yield from attention_tensors(spec, a, ex, cross=a is block.cross_attention)
    if ex.kernels != "compiled":
        inputs = len(attentions) + (not (block.parallel_residual and block.norms == 1))
        yield Saved(
            name="linear inputs", size_bytes=inputs * h * w, split="sequence",
            for_weight=True, linear_input=True,
        )  # fmt: skip
    yield from mlp_tensors(block.mlp, h, ex)
    if spec.residual_dropout > 0:
        masks = (1.0 + len(attentions)) * h * ex.mask_bytes
        yield Saved(name="dropout masks", size_bytes=masks, split="sequence")
    yield from adapter_tensors(spec, block, ex)


def _is_saved(tensor: Saved, ex: Execution) -> bool:
    if ex.finetune is None or not tensor.for_weight:
        return True
    if tensor.name == "normed" and ex.finetune.method == "adapter_v2":
        return True  # it trains the norms too
    return ex.quant_saves_input and ex.finetune.quant != "none" and tensor.linear_input


def _transient_elements(spec: ModelSpec, block: Block, ex: Execution) -> int:
    """Most elements a token that the backward of one block holds beside all that it saved.

    Written-out modules free each saved tensor once its operator is done: at a gated MLP's product, when
    its own input is gone, the gradients of both factors and of the residual stream are alive; at a
    plain activation, those of `GRADIENT_TENSORS`. Fused kernels hold all of the MLP's at once.
    """
    mlp, a = block.mlp, block.attention
    ffn = mlp.ffn * max(1, mlp.top_k) + mlp.shared_ffn
    if ex.kernels != "hf":
        return max((3 if mlp.gated else 2) * ffn, 4 * a.q_width)
    return spec.hidden + (2 if mlp.gated else GRADIENT_TENSORS.get(mlp.activation, 1)) * ffn


def head_input_elements(spec: ModelSpec, ex: Execution) -> int:
    """Elements a token that the final norm and the head save beside the last block's output: the head's
    input, and the normed value where the norm is written out in operators."""
    if ex.kernels != "hf" or not spec.has_head:
        return 0
    upcast = fp32_norm(spec.family, spec.norm)
    return spec.hidden * (2 if upcast is not None and upcast.normed_bytes is not None else 1)


@lru_cache(maxsize=4096)
def block_saved(spec: ModelSpec, block: Block, ex: Execution) -> SavedPerToken:
    """All that one block keeps, for one token."""
    kept = [t for t in block_tensors(spec, block, ex) if _is_saved(t, ex)]

    def total(*splits: Split, per_op: bool = False) -> float:
        return sum(t.size_bytes for t in kept if t.split in splits and (t.per_op or not per_op))

    w = ex.width
    return SavedPerToken(
        sharded=total("tp"),
        replicated=total("sequence"),
        routed=total("routed"),
        scores=total("scores"),
        cross_scores=total("cross_scores"),
        block_input=float(spec.hidden * w),
        per_op_sharded=total("tp", "routed", per_op=True),
        per_op_replicated=2.0 * spec.hidden * w,
        transient=float(w * _transient_elements(spec, block, ex)),
    )


_LOSS_COPIES = {
    # software's loss → (bytes kept, bytes at the peak) a vocabulary entry, 16-bit logits, fp32 logits
    # transformers: 16-bit logits (held by the output), fp32 copy, fp32 log-softmax; then two fp32 gradients.
    "hf": ((6.0, 14.0), (8.0, 16.0)),
    # The runner's: nobody holds the logits, so log-softmax alone stays, then two fp32 gradients.
    "runner": ((4.0, 12.0), (4.0, 12.0)),
    # Megatron's vocabulary-parallel loss: softmax in fp32, overwritten by its gradient, cast to 16 bits.
    "vocab_parallel": ((4.0, 6.0), (4.0, 8.0)),
    # One kernel from 16-bit logits to their gradient (flash-attention's, llm-foundry's default).
    "fused": ((2.0, 4.0), (4.0, 8.0)),
    # litgpt: logits and log-softmax in the width; gradients for 128 tokens at a time.
    "narrow": ((4.0, 4.0), (8.0, 8.0)),
    # torchtitan: fp32 logits, then log-softmax, its gradient and the logits'; the 16-bit ones are freed.
    "fp32": ((4.0, 12.0), (8.0, 16.0)),
}


def logits_bytes_per_token(
    spec: ModelSpec, width: int, *, loss: str, implementation: str = "hf", chunks: int = 8
) -> tuple[float, float]:
    """(kept until backward, peak during the loss) of the vocabulary-wide tensors, a token.

    `loss` is the strategy's: plain (as `implementation` writes it), fused (the gradient overwrites the
    logits), chunked (one chunk of `chunks` at a time).
    """
    if not spec.has_head:
        return 0.0, 0.0
    v = float(spec.vocab)
    if loss == "fused":
        return width * v, width * v
    kept, peak = _LOSS_COPIES[implementation][width == 4]
    if loss == "chunked":
        return 0.0, peak * v / chunks
    return kept * v, peak * v

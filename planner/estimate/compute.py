"""FLOPs and matrix shapes of one token through a model.

Conventions (PaLM, arXiv 2204.02311, appendix B): a multiply-add is 2 FLOPs; model FLOPs count one
forward and two backward passes of the matrix multiplies and of attention; recomputation counts in
HFU only. Attention counts the keys a token really attends to (causal: half), unlike PaLM's full
square; `causal=False` gives that one.
"""

from __future__ import annotations

from dataclasses import dataclass

from outlay.planner.spec.model import Attention, Block, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """y[m, n] = x[m, k] · w[k, n] for m tokens, `visits` times a token."""

    name: str
    k: int
    n: int
    shard: str
    """Which side tensor parallelism divides: `n` (column), `k` (row), or `` (replicated)."""
    visits: float = 1.0


def _attention_gemms(a: Attention, h: int) -> list[Gemm]:
    """Projections. Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) first compresses to
    `q_rank` and `kv_rank` numbers a token, which every tensor-parallel rank does whole."""
    out = Gemm(name="o", k=a.out_width, n=h, shard="k")
    if not a.kv_rank:
        kv = a.k_width + a.v_width
        return [
            Gemm(name="q", k=h, n=a.q_width, shard="n"),
            Gemm(name="kv", k=h, n=kv, shard="n"),
            out,
        ]
    expanded = a.k_width - a.kv_heads * a.rope_head_dim + a.v_width
    gemms = [
        Gemm(name="q", k=a.q_rank or h, n=a.q_width, shard="n"),
        Gemm(name="kv_down", k=h, n=a.kv_rank + a.rope_head_dim, shard=""),
        Gemm(name="kv_up", k=a.kv_rank, n=expanded, shard="n"),
        out,
    ]
    return gemms + ([Gemm(name="q_down", k=h, n=a.q_rank, shard="")] if a.q_rank else [])


def block_gemms(spec: ModelSpec, block: Block) -> list[Gemm]:
    """The weight matrix multiplies of one block, forward."""
    h = spec.hidden
    gemms = _attention_gemms(block.attention, h)
    if block.cross_attention is not None:
        gemms += _attention_gemms(block.cross_attention, h)
    mlp = block.mlp
    up = 2 if mlp.gated else 1
    if mlp.experts:
        gemms.append(Gemm(name="router", k=h, n=mlp.experts, shard=""))
        gemms.append(Gemm(name="expert_up", k=h, n=up * mlp.ffn, shard="n", visits=mlp.top_k))
        gemms.append(Gemm(name="expert_down", k=mlp.ffn, n=h, shard="k", visits=mlp.top_k))
    width = mlp.shared_ffn if mlp.experts else mlp.ffn
    if width:
        gemms.append(Gemm(name="up", k=h, n=up * width, shard="n"))
        gemms.append(Gemm(name="down", k=width, n=h, shard="k"))
    return gemms


def keys_per_token(seq_len: float, window: int | None, *, causal: bool) -> float:
    """Mean number of keys that a query attends to.

    Causal: query i sees i+1 keys, on average (s+1)/2. With a window w < s the first w queries see
    w/2 on average and the rest w.
    """
    if not causal:
        return seq_len if window is None else min(seq_len, 2 * window)
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def attention_flops_per_token(block: Block, seq_len: float, *, causal: bool = True) -> float:
    """QKᵀ and PV of one block, forward: 2 FLOPs · (q width + v width) · keys.

    An encoder's tokens attend to all keys, whatever `causal` says.
    """
    a = block.attention
    keys = keys_per_token(seq_len, a.window, causal=causal and a.causal)
    return 2.0 * (a.q_width + a.out_width) * keys


def block_matmul_flops_per_token(spec: ModelSpec, block: Block) -> float:
    """Weight matrix multiplies of one block, forward; 2 FLOPs a weight that the token visits."""
    return sum(2.0 * g.k * g.n * g.visits for g in block_gemms(spec, block))


def head_flops_per_token(spec: ModelSpec) -> float:
    """The vocabulary projection, forward."""
    return 2.0 * spec.hidden * spec.vocab if spec.has_head else 0.0


def forward_flops_per_token(spec: ModelSpec, seq_len: float, *, causal: bool = True) -> float:
    """One token through the whole model, forward."""
    blocks = sum(
        b.count
        * (
            block_matmul_flops_per_token(spec, b)
            + attention_flops_per_token(b, seq_len, causal=causal)
        )
        for b in spec.blocks
    )
    return blocks + head_flops_per_token(spec)


def model_flops_per_token(spec: ModelSpec, seq_len: float, *, causal: bool = True) -> float:
    """Forward and backward of one token: 3 × forward (backward computes two products a matrix)."""
    return 3.0 * forward_flops_per_token(spec, seq_len, causal=causal)


def recomputed_flops_per_token(
    spec: ModelSpec,
    seq_len: float,
    checkpointing: str,
    recompute_layers: int | None = None,
    *,
    causal: bool = True,
) -> float:
    """Forward FLOPs that one token pays twice, which HFU counts and MFU does not.

    Full: the blocks, all or `recompute_layers` of them; not the head. Selective: the attention core
    (Korthikanti et al., arXiv 2205.05198, section 5).
    """
    if checkpointing == "none":
        return 0.0
    share = 1.0
    if checkpointing == "full" and recompute_layers is not None:
        share = min(1.0, recompute_layers / spec.layers)
    total = 0.0
    for b in spec.blocks:
        core = attention_flops_per_token(b, seq_len, causal=causal)
        whole = core + block_matmul_flops_per_token(spec, b)
        total += b.count * (share * whole if checkpointing == "full" else core)
    return total

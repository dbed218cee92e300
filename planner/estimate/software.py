"""Whose conventions hold: what a training framework allocates, fuses and overlaps.

Estimates for plans are DeepSpeed's with transformers' modules, because that is what `outlay run`
executes. The other families exist so that published measurements can be predicted and so that a
person can ask what another trainer would need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Software:
    """Conventions of one family of frameworks."""

    family: str
    """deepspeed | megatron | fsdp | ddp | single."""
    kernels: str
    """hf (transformers' modules as they stand) | fused (Megatron, Transformer Engine) | compiled."""
    uniform_stages: bool
    """Pipeline stages have equal numbers of blocks; else they are balanced by cost."""
    dropout: bool
    """GPT-like models train with dropout 0.1 where nothing is said (Megatron's default)."""
    overlap: float
    """Share of data-parallel traffic that the software can hide behind compute (0 = none)."""
    start_hidden: bool
    """Kernels are queued ahead: starting costs time only where kernels are shorter than starts."""
    block_operators: int = 60
    """Kernels that one block's forward pass starts. 60: transformers' eager decoder block (two norms
    of six, rotary embedding 14, projections and reshapes 20, MLP 5, residuals; torch.profiler)."""
    gradient_bytes: int | None = None
    """Of one gradient when it is reduced; null = the width of the weights."""
    tensor_overlap: bool = False
    """Tensor-parallel collectives run piecewise beside the products that need them."""
    master: bool = True
    """Weights and moments in fp32 beside 16-bit compute; else all is in the width (bf16-true)."""
    loss: str = "hf"
    """How the plain loss is written: hf | runner | vocab_parallel | fused | narrow | fp32."""
    selective: str = "attention"
    """What selective checkpointing recomputes: the core of `attention` (Megatron), or all but what
    torchtitan's list keeps of each operation (`per_op`)."""
    mask_bytes: int = 1
    """Of one element of a dropout mask; 0 = the width of the values (torch on a CPU)."""
    step_in_torch: bool = False
    """The optimizer is torch's own, operator by operator, with intermediates of its size; else fused."""
    accumulates_whole: bool = False
    """Gradients stay whole between micro-batches: FSDP's `no_sync`, which litgpt accumulates under."""
    quant_saves_input: bool = False
    """A 4-bit linear layer keeps its input though its weight is frozen."""
    recent_attention: bool = False
    """Attention runs in kernels written for its generation (cuDNN's, FlashAttention-3), which on Hopper
    and later are far ahead of FlashAttention-2."""
    accumulates_fp32: bool = False
    """16-bit gradients of micro-batches are added up in fp32 where the precision is bf16."""
    two_way: bool = False
    """DualPipe (arXiv 2412.19437, section 3.2.1): micro-batches enter at both ends of the pipeline, and the
    all-to-all of one runs beside the compute of another."""
    zero_bubble: bool = False
    """ZB-H1 (arXiv 2401.10241): backward passes are cut in two, and gradients of weights fill the waits."""
    masked_head: float = 1.0
    """Share of the tokens of an encoder whose logits are computed."""
    quantizes_head: bool = False
    """Quantization of linear layers includes the vocabulary projection."""


DEEPSPEED = Software(
    family="deepspeed",
    kernels="hf",
    uniform_stages=False,
    dropout=False,
    overlap=0.0,
    start_hidden=True,
)
MEGATRON = Software(
    family="megatron",
    kernels="fused",
    uniform_stages=True,
    dropout=True,
    overlap=0.0,
    start_hidden=True,
    block_operators=30,
    gradient_bytes=4,
    loss="vocab_parallel",
    accumulates_fp32=True,
)
MEGATRON_CORE = replace(MEGATRON, overlap=1.0, tensor_overlap=True, recent_attention=True)
DUALPIPE = replace(MEGATRON_CORE, two_way=True)
ZERO_BUBBLE = replace(MEGATRON_CORE, zero_bubble=True)
MEGATRON_DEEPSPEED = Software(
    family="megatron",
    kernels="fused",
    uniform_stages=True,
    dropout=True,
    overlap=0.0,
    start_hidden=True,
    block_operators=40,
    loss="vocab_parallel",
    accumulates_fp32=True,
)
FSDP = Software(
    family="fsdp", kernels="hf", uniform_stages=True, dropout=False, overlap=1.0, start_hidden=True
)
FSDP_COMPILED = Software(
    family="fsdp",
    kernels="compiled",
    uniform_stages=True,
    dropout=False,
    overlap=1.0,
    start_hidden=True,
    block_operators=20,
    gradient_bytes=4,
    loss="fp32",
    selective="per_op",
)
DDP = Software(
    family="ddp",
    kernels="hf",
    uniform_stages=True,
    dropout=True,
    overlap=1.0,
    start_hidden=True,
    block_operators=30,
    masked_head=0.16,
)
SINGLE = Software(
    family="single",
    kernels="hf",
    uniform_stages=True,
    dropout=False,
    overlap=0.0,
    start_hidden=True,
    master=False,
)
LITGPT = replace(SINGLE, loss="narrow", quant_saves_input=True, quantizes_head=True)
AUTOMODEL = replace(FSDP_COMPILED, recent_attention=True)
COMPOSER = replace(FSDP, loss="fused")
LITGPT_FSDP = replace(FSDP, master=False, loss="narrow", accumulates_whole=True)
CPU_DEEPSPEED = Software(
    family="deepspeed",
    kernels="hf",
    uniform_stages=False,
    dropout=False,
    overlap=0.0,
    start_hidden=False,
    loss="runner",
    mask_bytes=0,
    step_in_torch=True,
)


def software_of(framework: str, *, attention: str = "") -> Software:
    """The family of a `framework` value of `truth/cases.csv`; unknown or empty → DeepSpeed's.

    Matched by what the name says: `megatron*` (Megatron-DeepSpeed too), `fsdp2*` (compiled; NeMo
    Automodel's with Transformer Engine's attention), `fsdp*`, `deepspeed*` and `hf-*`, `*ddp`,
    `litgpt*`, `torchtune`, `*dualpipe*`, `*zero-bubble*` (the fork of Megatron-Core that has it). Megatron
    with flash attention is Megatron-Core with Transformer Engine, which
    overlaps its collectives; earlier ones do not.
    """
    name = framework.strip().lower()
    if "dualpipe" in name:
        return DUALPIPE
    if "zero-bubble" in name:
        return ZERO_BUBBLE
    if name.startswith("litgpt"):
        return LITGPT_FSDP if "fsdp" in name else LITGPT
    if "composer" in name:
        return COMPOSER
    if "automodel" in name:
        return AUTOMODEL
    if "fsdp2" in name:
        return FSDP_COMPILED
    if "fsdp" in name:
        return FSDP
    if name.startswith("megatron"):
        recent = MEGATRON_CORE if attention == "flash" else MEGATRON
        return MEGATRON_DEEPSPEED if "deepspeed" in name else recent
    if name.endswith("ddp"):
        return DDP
    if name.startswith("torchtune"):
        return SINGLE
    return DEEPSPEED

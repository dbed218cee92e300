"""Strategy: how a job is spread over ranks. The words are those of the design and of the flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlay.profiles.errors import UsageError

MOST = 2**31 - 1
"""The largest count that a strategy may have."""
Checkpointing = Literal["none", "selective", "full"]
Offload = Literal["none", "cpu", "nvme"]
Loss = Literal["plain", "fused", "chunked"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """world = dp·tp·pp·cp·sp; ep divides dp; global batch = micro_batch·grad_accum·dp sequences."""

    zero: int = 0
    """ZeRO stage 0–3."""
    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Virtual (interleaved) stages a rank; estimated only, DeepSpeed does not run it."""
    cp: int = 1
    """Ring-attention context parallel; estimated only."""
    sp: int = 1
    """Ulysses sequence parallel."""
    ep: int = 1
    micro_batch: int = 1
    """Sequences a forward pass, a data-parallel rank."""
    grad_accum: int = 1
    activation_checkpointing: Checkpointing = "none"
    recompute_layers: int | None = None
    """Layers recomputed where checkpointing is on; null = all."""
    sequence_parallel: bool = False
    """Megatron's: norms and dropout split over the tensor-parallel group."""
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    loss: Loss = "plain"
    reduce_bucket_size: int | None = None
    """Elements; null = sized by the planner."""
    allgather_bucket_size: int | None = None
    overlap_comm: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value > MOST and not name.endswith("bucket_size"):
                raise UsageError(
                    f"{name} of {value:.4g} is more than the largest that makes sense, {MOST:,}"
                )

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp * self.cp * self.sp

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.grad_accum * self.dp

    def label(self) -> str:
        """Short name for tables, e.g. `ZeRO-2 dp2 mb4 ga4 ckpt`."""
        parts = [f"ZeRO-{self.zero}", f"dp{self.dp}"]
        parts += [
            f"{k}{v}" for k in ("tp", "pp", "vpp", "cp", "sp", "ep") if (v := getattr(self, k)) > 1
        ]
        parts += [f"mb{self.micro_batch}", f"ga{self.grad_accum}"]
        if self.activation_checkpointing != "none":
            word = "ckpt" if self.activation_checkpointing == "full" else "ckpt-selective"
            some = self.recompute_layers is not None and self.activation_checkpointing == "full"
            parts.append(f"{word}{self.recompute_layers}" if some else word)
        if self.offload_optimizer != "none":
            parts.append(f"opt-{self.offload_optimizer}")
        if self.offload_param != "none":
            parts.append(f"param-{self.offload_param}")
        if self.loss != "plain":
            parts.append(f"loss-{self.loss}")
        if self.reduce_bucket_size is not None:
            parts.append(f"bucket{self.reduce_bucket_size / 1e6:.3g}M")
        return " ".join(parts)

"""How far two runs of quantization-aware training part when a sum is added up in another order.

    python -m benchmarks.qat_rounding

One process, no DeepSpeed: gradients of four micro-batches are added as (1+2)+(3+4), as ZeRO-0 does with two
ranks, or as (1+3)+(2+4), as ZeRO 2 and 3 do. Printed: the difference of the losses of six steps of AdamW. What
is dense differs by rounding; with fake quantization a weight or an input at the edge of two steps falls to
either side. Two ZeRO stages cannot agree better than this.
"""

from __future__ import annotations

import click
import torch

from outlay.planner.spec.compress import Qat
from outlay.planner.spec.plan import ModelSource
from outlay.runner.compress import qat
from outlay.runner.model import build_model, causal_lm_loss

CONFIG = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
STEPS = 6


def losses(kind: str | None, lr: float, *, swapped: bool) -> list[float]:
    """Of each step, before its update."""
    source = ModelSource(name="tiny", source="benchmark", parameters=0, config=CONFIG)
    model = build_model(source, precision="fp32", attention="sdpa", seed=7)
    if kind is not None:
        qat.prepare(model, Qat.parse(kind))
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95))
    found = []
    for step in range(STEPS):
        made = torch.Generator().manual_seed(1000 + step)
        start = torch.randint(0, 256, (8, 1), generator=made)
        ids = (start + torch.randint(1, 4, (8, 1), generator=made) * torch.arange(32)) % 256
        each, total = [], 0.0
        for part in ids.chunk(4):
            loss = causal_lm_loss(model(input_ids=part).logits, part)
            each.append(torch.autograd.grad(loss / 4, weights))
            total += float(loss.detach()) / 4
        for weight, a, b, c, d in zip(weights, *each, strict=True):
            weight.grad = (a + c) + (b + d) if swapped else (a + b) + (c + d)
        optimizer.step()
        found.append(total)
    return found


@click.command()
def main() -> None:
    """Print a line for each kind and rate."""
    torch.set_num_threads(1)
    for lr in (1e-4, 3e-3):
        for kind in (None, "int8-weight", "int8", "int4:g32", "int4-act8:g32"):
            pairs = zip(
                losses(kind, lr, swapped=False), losses(kind, lr, swapped=True), strict=True
            )
            shown = "  ".join(f"{abs(a - b):.0e}" for a, b in pairs)
            click.echo(f"lr {lr:.0e}  {kind or 'dense':<14} {shown}")


if __name__ == "__main__":
    main()

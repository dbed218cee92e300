"""How far two runs of quantization-aware training part when a sum is added up in another order.

    python -m benchmarks.qat_rounding

One process, no DeepSpeed: gradients of four micro-batches are added as (1+2)+(3+4), as ZeRO-0 does with two
ranks, or as (1+3)+(2+4), as ZeRO 2 and 3 do. Printed: the difference of the losses at three of twenty steps, and the
largest. What is dense differs by rounding; with fake quantization a weight or an input at the edge of two steps
falls to either side. Two ZeRO stages that add in two orders cannot agree better than this; where they add in one,
they are equal (`tests/runner/test_compress_qat.py`).
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
STEPS = 20
SHOWN = (1, 5, 19)
RATES = (("sgd", 0.1), ("adamw", 1e-5), ("adamw", 1e-4), ("adamw", 3e-3))


def losses(kind: str | None, optimizer: str, lr: float, *, swapped: bool) -> list[float]:
    """Of each step, before its update."""
    source = ModelSource(name="tiny", source="benchmark", parameters=0, config=CONFIG)
    model = build_model(source, precision="fp32", attention="sdpa", seed=7)
    if kind is not None:
        qat.prepare(model, Qat.parse(kind))
    weights = list(model.parameters())
    update = (
        torch.optim.SGD(weights, lr=lr)
        if optimizer == "sgd"
        else torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95))
    )
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
        update.step()
        found.append(total)
    return found


@click.command()
def main() -> None:
    """Print a line for each kind and rate."""
    torch.set_num_threads(1)
    for optimizer, lr in RATES:
        for kind in (None, "int8-weight", "int8", "int4:g32", "int4-act8:g32"):
            one = losses(kind, optimizer, lr, swapped=False)
            other = losses(kind, optimizer, lr, swapped=True)
            apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
            shown = "  ".join(f"{apart[i]:.0e}" for i in SHOWN)
            click.echo(
                f"{optimizer:<5} {lr:.0e}  {kind or 'dense':<14} {shown}  max {max(apart):.0e}  "
                f"loss {one[0]:.2f} to {one[-1]:.2f}"
            )


if __name__ == "__main__":
    main()

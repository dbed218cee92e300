"""What masks cost one rank: `python -m benchmarks.mask_cost --weights 10000000`, milliseconds on one thread.

Beside a step of torch's AdamW on as many weights: the masking after it, and one choice of masks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from outlay.runner.compress.select import Piece, smallest


def timed_ms(act: Callable[[], object], times: int) -> float:
    """Mean of `times` calls after one that does not count."""
    act()
    began_s = time.perf_counter()
    for _ in range(times):
        act()
    return 1e3 * (time.perf_counter() - began_s) / times


@click.command()
@click.option("--weights", default=10_000_000, show_default=True)
def main(weights: int) -> None:
    """Print the three times."""
    torch.set_num_threads(1)
    master = torch.nn.Parameter(torch.randn(weights))
    optimizer = torch.optim.AdamW([master])
    master.grad = torch.randn(weights)
    optimizer.step()
    state = optimizer.state[master]
    pruned = torch.rand(weights) < 0.5
    values, none = torch.randn(weights), torch.zeros(weights, dtype=torch.bool)

    def mask() -> None:
        # as runner/compress/masks.py does it after every step
        kept = (pruned.view(torch.uint8) ^ 1).float()
        for tensor in (master.data, state["exp_avg"], state["exp_avg_sq"]):
            tensor.mul_(kept)

    def choose() -> None:
        piece = Piece(order=0, counts=True, values=values, pruned=none)
        smallest([piece], [0], [weights // 2], torch.device("cpu"))

    with tempfile.TemporaryDirectory() as folder:
        method = (Path(folder) / "rendezvous").as_uri()
        torch.distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
        click.echo(f"AdamW            {timed_ms(optimizer.step, 5):8.1f} ms")
        click.echo(f"masking          {timed_ms(mask, 5):8.1f} ms")
        click.echo(f"choice of masks  {timed_ms(choose, 2):8.1f} ms")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

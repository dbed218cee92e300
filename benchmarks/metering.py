"""What metering costs of a training step: the time inside the guard's calls, over real steps.

    python -m benchmarks.metering

Timed from inside, because two runs of the same training differ by more than what is looked for. The
ledger is on, and each trainer runs long enough for heartbeats, whose writes are forced to disk; the
first save, which is the trainer's own, is not metering.
"""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SECONDS = 32
"""Of training each: three heartbeats."""
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""1.3 M parameters: the smaller the model, the larger the share."""


class Timed:
    """Sums the time inside some calls."""

    def __init__(self) -> None:
        self.calls, self.total_s, self.longest_s = 0, 0.0, 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - began_s
                self.calls += 1
                self.total_s += took_s
                self.longest_s = max(self.longest_s, took_s)

        return call


def plain_loop(folder: Path) -> tuple[Timed, float, int]:
    """(time inside, time in all, steps) of a loop in plain PyTorch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from outlay.runner.callback import Guard

    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, SHAPE["vocab_size"], (4, 64))
    guard = Guard(
        ["1usd", f"{SECONDS}s"],
        price_usd_per_h=2.0,
        steps=10**6,
        ledger=str(folder / "ledger.sqlite"),
        started_s=time.monotonic(),
        save_s=0.0,
    )
    timed, began_s, steps = Timed(), time.perf_counter(), 0
    step = timed.around(guard.step)
    while True:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if step():
            break
    took_s = time.perf_counter() - began_s
    guard.close()
    return timed, took_s, steps


def hugging_face(folder: Path) -> tuple[Timed, float, int]:
    """The same of a Trainer with the callback."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from outlay.runner.callback import hf_callback

    tokens = torch.arange(64)
    rows = [{"input_ids": tokens, "labels": tokens} for _ in range(256)]
    callback: Any = hf_callback(
        ["1usd", f"{SECONDS}s"],
        price_usd_per_h=2.0,
        ledger=str(folder / "ledger.sqlite"),
        started_s=time.monotonic(),
    )
    timed = Timed()
    callback.on_step_end = timed.around(callback.on_step_end)
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(**SHAPE)),
        args=TrainingArguments(
            output_dir=str(folder / "out"), max_steps=10**6, use_cpu=True, report_to=[],
            per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
            logging_steps=10**6,
        ),
        train_dataset=rows,
        callbacks=[callback],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began_s = time.perf_counter()
        trainer.train()
    return timed, time.perf_counter() - began_s, trainer.state.global_step


def main() -> None:
    """Print the share, the time a step and the longest call."""
    import torch

    torch.set_num_threads(1)
    for name, measure in (("plain loop", plain_loop), ("Hugging Face Trainer", hugging_face)):
        with tempfile.TemporaryDirectory() as folder:
            timed, took_s, steps = measure(Path(folder))
        click.echo(
            f"{name}: {timed.total_s / took_s:.3%} of the time of {steps} steps of "
            f"{took_s / steps * 1e3:.1f} ms; {timed.total_s / timed.calls * 1e6:.0f} µs a step, "
            f"the longest {timed.longest_s * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main()

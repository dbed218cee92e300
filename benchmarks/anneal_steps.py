"""Annealed within the money against cut at the same spend, on a machine whose every step costs the same.

    python -m benchmarks.anneal_steps --out DIR [--seed 0 …] [--steps 200]

The demo's model and text in plain PyTorch, one process, with the runner's own controller, meter and
schedule; the clock is simulated: each step takes one second, whatever the machine does meanwhile. So both
policies get the same steps for the same spend, which `benchmarks.anneal` (real runs, real time) cannot
promise on a busy machine, where it decides more than the policy. What is left out here is what a run
spends besides steps, which is the same for both. The schedule is three times as long as the budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

TOO_LONG = 3
POLICIES = ("anneal", "cut")
LOOK_EVERY = 60


class Clock:
    """Seconds that pass only when they are told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For the data.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2))
@click.option("--steps", default=200, show_default=True, help="That the budget holds.")
@click.option("--global-batch", default=4, show_default=True, help="Sequences a step.")
@click.option("--lr", type=float, help="Peak; without: the demo's.")
def main(
    out: Path, seeds: tuple[int, ...], steps: int, global_batch: int, lr: float | None
) -> None:
    """Held-out loss of both policies, by seed."""
    import torch

    from outlay.runner.commands import demo

    torch.set_num_threads(1)
    data = _data(out)
    for seed in seeds:
        found = {}
        for policy in POLICIES:
            found[policy] = _train(
                data, seed, policy, steps, global_batch, lr or demo.LEARNING_RATE
            )
        anneal, cut = (found[policy][-1] for policy in POLICIES)
        courses = "; ".join(
            f"{policy} " + ", ".join(f"{step}: {loss:.4f}" for step, loss in found[policy])
            for policy in POLICIES
        )
        click.echo(
            f"seed {seed}: anneal {anneal[1]:.4f} ({anneal[0]} steps), cut {cut[1]:.4f} "
            f"({cut[0]} steps), difference {anneal[1] - cut[1]:+.4f} [{courses}]"
        )


def _data(out: Path) -> Path:
    from outlay.runner.commands import demo
    from outlay.runner.data.corpus import standard_library_files
    from outlay.runner.data.prepare import prepare

    data = out / "data"
    if not data.exists():
        out.mkdir(parents=True, exist_ok=True)
        prepare(
            standard_library_files(), data, seed=0, vocab_size=demo.VOCAB_SIZE,
            max_bytes=demo.CORPUS_BYTES,
        )  # fmt: skip
    return data


def _train(
    data: Path, seed: int, policy: Any, steps: int, global_batch: int, lr: float
) -> list[tuple[int, float]]:
    """(step, held-out loss), the last at the end of the budget."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from outlay.planner.spec.job import Budget, Schedule
    from outlay.runner.budget import Bounds, Meter
    from outlay.runner.commands import demo
    from outlay.runner.control import Controller
    from outlay.runner.data.dataset import TokenDataset
    from outlay.runner.schedule import Decay

    torch.manual_seed(seed)
    config = {k: v for k, v in demo.CONFIG.items() if k not in ("model_type", "architectures")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    dataset = TokenDataset(data, seq_len=demo.SEQ_LEN, seed=seed)
    heldout = [
        torch.from_numpy(batch)
        for batch in dataset.heldout_batches(0, dp_size=1, micro_batch=8, sequences=32)
    ]
    clock = Clock()
    budget = Budget(kind="money", amount=steps / 3600)  # a USD an hour
    meter = Meter([budget], price_usd_per_h=1.0, accelerators=1, started_s=0.0, clock=clock)
    bounds = Bounds(step_guess_s=1.0, parameters=0, write_bytes_per_s=1.0)
    for part in (bounds.save, bounds.evaluate, bounds.export):
        part.guess(0.0)
    control = Controller(meter, bounds, steps=TOO_LONG * steps, policy=policy)
    decay = Decay(Schedule(warmup_steps=10, final_fraction=0.1), lr, TOO_LONG * steps)
    course: list[tuple[int, float]] = []
    step = 0
    while True:
        decision = control.decide(step)
        if decision.stop or (step and step % LOOK_EVERY == 0):
            course.append((step, _heldout(model, heldout)))
        if decision.stop:
            return course
        decay.retarget(step, decision.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = decay.rate(step)
        tokens = torch.from_numpy(
            dataset.batch(step, 0, 0, dp_size=1, micro_batch=global_batch, grad_accum=1)
        )
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        clock.now_s += 1.0
        bounds.step.add(1.0)


def _heldout(model: Any, batches: list[Any]) -> float:
    import torch

    with torch.no_grad():
        losses = [float(model(input_ids=b, labels=b).loss) for b in batches]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()

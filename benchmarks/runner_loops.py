"""The loops that `outlay run` is compared with, one rank each, started by benchmarks/runner.py.

    python -m benchmarks.runner_loops deepspeed|trainer|accelerate PLAN STAMPS

Each is as short as its documentation's example, on the plan's own DeepSpeed configuration, data, order and first
weights. Rank 0 appends a line with the clock after every step; the first steps' losses stand there too, so that it
can be seen that all train the same.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LOSSES = 5
"""Forward passes whose loss is noted."""

Stamp = Callable[[], None]


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The run's samples in the run's order, as a map-style dataset."""

    def __init__(self, dataset: Any, length: int) -> None:
        self._dataset, self._length = dataset, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._dataset.sample(index))
        return {"input_ids": ids, "labels": labels_of(ids)}


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """The first token is nobody's target; some trainers count targets before they shift them."""
    labels = ids.clone()
    labels[..., 0] = -100
    return labels


def stamper(path: Path, rank: int) -> tuple[Stamp, int | None]:
    """(what to call after each step, the open file on rank 0)."""
    if rank != 0:
        return (lambda: None), None
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def stamp() -> None:
        os.write(handle, f"step {time.monotonic()!r}\n".encode())

    return stamp, handle


def note_losses(model: torch.nn.Module, handle: int | None, parts: int) -> None:
    """Write the mean loss over the ranks of the first forward passes, then come off again.

    `parts`: by what the sum of the ranks' losses is divided.
    """
    seen = 0

    def look(_module: Any, _given: Any, result: Any) -> None:
        nonlocal seen
        seen += 1
        loss = result["loss"].detach().clone().float()
        torch.distributed.all_reduce(loss)
        if handle is not None:
            os.write(handle, f"loss {float(loss) / parts!r}\n".encode())
        if seen == LOSSES:
            hook.remove()

    hook = model.register_forward_hook(look)


def plain_deepspeed(plan: Any, dataset: Any, model: Any, stamp: Stamp) -> None:
    """`deepspeed.initialize`, then forward, backward, step."""
    import deepspeed

    rank, world, strategy = torch.distributed.get_rank(), plan.strategy.dp, plan.strategy
    weights = [p for p in model.parameters() if p.requires_grad]
    config = copy.deepcopy(plan.deepspeed)
    engine = deepspeed.initialize(model=model, model_parameters=weights, config=config)[0]
    engine.train()
    grid = {
        "dp_size": world,
        "micro_batch": strategy.micro_batch,
        "grad_accum": strategy.grad_accum,
    }
    for step in range(plan.job.steps):
        for index in range(strategy.grad_accum):
            ids = torch.from_numpy(dataset.batch(step, index, rank, **grid)).to(engine.device)
            loss = engine(input_ids=ids, labels=labels_of(ids)).loss
            engine.backward(loss)
            engine.step()
        stamp()


def ready_accelerate() -> None:
    """Tell accelerate its backend: it finds none for DeepSpeed on CPU ranks, and would train in one process."""
    from accelerate import PartialState
    from deepspeed.accelerator import get_accelerator

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend=get_accelerator().communication_backend_name())


def accelerate(plan: Any, dataset: Any, model: Any, stamp: Stamp) -> None:
    """`Accelerator.prepare`, then the loop of its documentation."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim
    from torch.utils.data import DataLoader

    job, strategy = plan.job, plan.strategy
    plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(plan.deepspeed))
    ready_accelerate()
    accelerator = Accelerator(deepspeed_plugin=plugin)
    rows = Rows(dataset, job.steps * job.global_batch)
    loader = DataLoader(rows, batch_size=strategy.micro_batch)
    optimizer = DummyOptim(model.parameters(), lr=job.optimizer.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for number, batch in enumerate(loader, 1):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if number % strategy.grad_accum == 0:
            stamp()


def trainer(plan: Any, dataset: Any, model: Any, stamp: Stamp) -> None:
    """Hugging Face's Trainer as it comes: it logs every 500 steps, saves and evaluates never."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stamps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamp()

    class InOrder(Trainer):  # type: ignore[misc]
        """Reads the rows as they come, as the others do."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

    ready_accelerate()
    job, strategy, optimizer = plan.job, plan.strategy, plan.job.optimizer
    rows = Rows(dataset, job.steps * job.global_batch)
    arguments = TrainingArguments(
        output_dir=os.environ["OUTLAY_BENCHMARK_DIR"],
        deepspeed=copy.deepcopy(plan.deepspeed),
        per_device_train_batch_size=strategy.micro_batch,
        gradient_accumulation_steps=strategy.grad_accum,
        max_steps=job.steps,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=job.gradient_clipping,
        lr_scheduler_type="constant",
        bf16=job.precision == "bf16",
        fp16=job.precision == "fp16",
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},
    )
    made = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Stamps()])
    assert made.is_deepspeed_enabled
    made.train()


LOOPS = {"deepspeed": plain_deepspeed, "trainer": trainer, "accelerate": accelerate}


def main() -> None:
    """Join the ranks, build the model, train until killed."""
    kind, plan_path, stamps = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    from outlay.planner.planning import read_plan
    from outlay.runner import processes
    from outlay.runner.data.dataset import TokenDataset
    from outlay.runner.engine import RankInfo, init_process_group, seed_everything
    from outlay.runner.model import build_model

    processes.die_with_supervisor()
    info = RankInfo.from_environment()
    init_process_group(info, init_method=os.environ[processes.RENDEZVOUS])
    plan = read_plan(plan_path)
    job = plan.job
    dataset = TokenDataset(job.data.path, seq_len=job.seq_len, seed=job.seed)  # type: ignore[union-attr]
    model: Any = build_model(
        plan.model, precision=job.precision, attention=job.attention, seed=job.seed
    )
    seed_everything(job.seed, info.rank)
    stamp, handle = stamper(stamps, info.rank)
    # Hugging Face's Trainer has the model divide by the tokens of all ranks.
    note_losses(model, handle, 1 if kind == "trainer" else info.world)
    LOOPS[kind](plan, dataset, model, stamp)


if __name__ == "__main__":
    main()

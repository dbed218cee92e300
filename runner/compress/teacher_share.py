"""Before a run's first step: the teacher's cache is opened, or computed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from outlay.runner.budget import SHUTDOWN_S
from outlay.runner.compress.teacher_cache import (
    Cache,
    CacheInfo,
    open_cache,
    seal,
    teacher_name,
    write_share,
)

if TYPE_CHECKING:
    from outlay.runner.data.dataset import TokenDataset
    from outlay.runner.engine import Engine
    from outlay.runner.train import Trainer


def open_teacher(trainer: Trainer) -> None:
    """For a run: the cache in its folder. A signal or the end of the budget ends the computing. Collective."""

    def may_go_on() -> bool:
        short = trainer.lead and not trainer.meter.affords(SHUTDOWN_S)
        return not any(trainer.votes.largest(int(trainer.stop.requested), int(short)))

    prepare_cache(trainer.engine, trainer.dataset, trainer.folder.root / "teacher", may_go_on)


def prepare_cache(
    engine: Engine, dataset: TokenDataset, folder: Path, may_go_on: Callable[[], bool]
) -> None:
    """Give the engine's distiller its cache where the job wants one. Collective.

    `may_go_on`: the same answer on every rank, asked before each batch.
    """
    distiller = engine.distiller
    if distiller is None or distiller.distill.top_k is None or distiller.cache is not None:
        return
    plan, distill = engine.plan, distiller.distill
    count = min(plan.job.steps * plan.job.global_batch, dataset.windows)
    ranks = engine.world
    # equal shares: a split teacher's ranks must call it equally often
    each = -(-count // ranks)
    info = CacheInfo(
        teacher=teacher_name(Path(distill.teacher)), temperature=distill.temperature,
        top_k=min(distill.top_k, dataset.info.vocab_size), seq_len=plan.job.seq_len,
        vocab_size=dataset.info.vocab_size, train_sha256=dataset.info.train.sha256,
        windows=(each,) * ranks,
    )  # fmt: skip
    found = open_cache(folder, info)
    if not _all(found is not None):
        found = _compute(engine, dataset, folder, info, each, may_go_on)
    distiller.cache = found


def _compute(
    engine: Engine, dataset: TokenDataset, folder: Path, info: CacheInfo, each: int,
    may_go_on: Callable[[], bool],
) -> Cache | None:  # fmt: skip
    from outlay.runner.compress.teacher import Teacher

    assert engine.distiller is not None
    distill = engine.distiller.distill
    teacher = Teacher(engine.plan, distill)
    try:
        done = write_share(
            folder, info, engine.rank, _share(dataset, engine.rank, engine.world, each),
            lambda ids: teacher.says(ids)[0], engine.device,
            batch=engine.plan.strategy.micro_batch, may_go_on=may_go_on,
        )  # fmt: skip
    finally:
        teacher.close()
    if not _all(done):
        # stopped meanwhile: the run's own end says so, before any step
        return None
    if engine.rank == 0:
        seal(folder, info)
    torch.distributed.barrier()
    made = open_cache(folder, info)
    assert made is not None
    return made


def _share(
    dataset: TokenDataset, rank: int, ranks: int, each: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Samples rank, rank + ranks, …, `each` of them; past the end of the windows the first come again."""
    for i in range(each):
        yield dataset.sample((rank + i * ranks) % dataset.windows)


def _all(mine: bool) -> bool:
    votes = torch.tensor([int(mine)])
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN)
    return bool(votes.item())

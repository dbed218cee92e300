"""What one engine writes and reads: DeepSpeed's shards, the random states, the runner's own state.

    FOLDER/shards/                what DeepSpeed writes, under an explicit tag (never `latest`)
    FOLDER/swapped/               states that live on NVMe (swap_state.py)
    FOLDER/rng/rank-00000.pt      random states of each rank
    FOLDER/client_state.json      position in the data, ledger: whatever the caller keeps
    FOLDER/engine.json            the parallelism that wrote it

Nothing here is safe against a crash; `checkpoint.py` makes it so.
"""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import torch

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import CheckpointError, UsageError
from outlay.runner import swap_state

TAG = "shards"
RNG_FOLDER = "rng"
_CLIENT_STATE = "client_state.json"
_ENGINE = "engine.json"


def save(engine: Any, plan: Plan, folder: Path, client_state: dict[str, Any]) -> None:
    """Collective. The folder is made where it is missing."""
    try:
        text = json.dumps(client_state, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError("the client state of a checkpoint must be JSON", why=str(error)) from error
    rank = torch.distributed.get_rank()
    (folder / RNG_FOLDER).mkdir(parents=True, exist_ok=True)
    with _states_apart(engine):
        engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=_adapters(plan)
        )
    if swap_state.on_nvme(engine):
        swap_state.save(engine, folder)
    torch.save(_random_states(), _rng_file(folder, rank))
    if rank == 0:
        (folder / _CLIENT_STATE).write_text(text + "\n", encoding="utf-8")
        (folder / _ENGINE).write_text(json.dumps(_layout(plan), indent=2) + "\n", encoding="utf-8")
    torch.distributed.barrier()


def load(engine: Any, plan: Plan, folder: Path) -> dict[str, Any]:
    """Collective. Refuses a checkpoint of another parallelism; DeepSpeed would fail half-way."""
    written = json.loads((folder / _ENGINE).read_text(encoding="utf-8"))
    wanted = _layout(plan)
    if written != wanted:
        differ = [f"{k}: {written.get(k)} → {v}" for k, v in wanted.items() if written.get(k) != v]
        raise UsageError(
            "the checkpoint was written under another plan",
            where=str(folder),
            why="; ".join(differ),
            do="resume with the plan that wrote it",
        )
    with _states_apart(engine):
        path, _ = engine.load_checkpoint(
            str(folder), tag=TAG, load_module_strict=not _adapters(plan)
        )
    if path is None:
        raise CheckpointError(f"DeepSpeed found no shards under {TAG}/", where=str(folder))
    if swap_state.on_nvme(engine):
        swap_state.load(engine, folder)
    rank = torch.distributed.get_rank()
    _restore(torch.load(_rng_file(folder, rank), map_location="cpu", weights_only=True))
    state: dict[str, Any] = json.loads((folder / _CLIENT_STATE).read_text(encoding="utf-8"))
    return state


def _adapters(plan: Plan) -> bool:
    """Whether frozen weights are left out: they come from where the plan says."""
    return plan.job.finetune is not None


def _states_apart(engine: Any) -> contextlib.AbstractContextManager[None]:
    nvme = swap_state.on_nvme(engine)
    return swap_state.without_deepspeeds_own(engine) if nvme else contextlib.nullcontext()


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / RNG_FOLDER / f"rank-{rank:05d}.pt"


def _layout(plan: Plan) -> dict[str, Any]:
    strategy, how = plan.strategy, plan.job.finetune
    keys = ("zero", "dp", "tp", "pp", "sp", "ep", "offload_optimizer", "offload_param")
    return {
        **{key: getattr(strategy, key) for key in keys},
        "precision": plan.job.precision,
        "optimizer": plan.job.optimizer.name,
        "model_type": plan.model.config.get("model_type"),
        "parameters": plan.model.parameters,
        **({} if how is None else {"finetune": f"{how.method}:r{how.rank}"}),
    }


def _random_states() -> dict[str, Any]:
    import numpy as np

    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(states: dict[str, Any]) -> None:
    import numpy as np

    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])

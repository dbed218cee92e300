"""How much memory a plan really takes, by rank: a separate run of a few steps, never timed.

On CPU (`host_growth`): the process's peak of resident memory after a reset, less what was resident
before the model was built. glibc keeps freed memory by default, so that a peak would not be seen
again; two malloc variables make it give back. Before the figure is taken a tiny engine of the same
kind takes a step, because the first engine of a process imports 25 to 70 MB of modules (measured:
ZeRO-0 23 MB, ZeRO-3 69 MB for a model of 0.1 M parameters; 3 MB after a tiny engine).
On CUDA: the allocator's own peaks, and what NVML says the device holds.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from outlay.planner.spec.files import parse, plain, read_mapping, write_text
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError
from outlay.runner.failures import cause_of
from outlay.runner.folder import RunFolder
from outlay.runner.launch import rank_environment
from outlay.runner.processes import Ranks, Signals
from outlay.runner.swap import placed

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

_TINY = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """One rank's peak over the build of the engine and the steps."""

    rank: int
    kind: str
    """host_growth (CPU) or allocated (CUDA)."""
    before_bytes: int
    """Resident before the model was built (CPU), or allocated (CUDA)."""
    growth_bytes: int
    """Peak above `before_bytes`."""
    reserved_bytes: int | None = None
    """Peak of the CUDA allocator's reservation."""
    device_bytes: int | None = None
    """In use on the whole GPU after the steps, by NVML: other processes included."""


def run_memory_probe(
    plan: Plan, steps: int = 3, *, timeout_s: float = 900.0
) -> list[MemoryReading]:
    """Start ranks of their own, build the plan's engine, take `steps` steps; one reading a rank."""
    with tempfile.TemporaryDirectory(prefix="outlay-memory-") as name:
        folder = RunFolder(Path(name))
        folder.write_plan(plan)
        ranks = Ranks(
            plan.strategy.world,
            folder.root,
            arguments=["--memory-steps", str(steps)],
            environment={**rank_environment(plan), **MALLOC},
            log=folder.log,
        )
        with Signals() as signals, ranks:
            waited_s = 0.0
            while not ranks.wait(0.5):
                waited_s += 0.5
                failed = any(code for _, code in ranks.deaths)
                if signals.stop or waited_s > timeout_s or failed:
                    ranks.wait(5.0 if failed else 0.0)
                    break
            ranks.close()
        return _collect(plan, folder, ranks)


def _collect(plan: Plan, folder: RunFolder, ranks: Ranks) -> list[MemoryReading]:
    paths = [_reading(folder, rank) for rank in range(plan.strategy.world)]
    if not all(path.exists() for path in paths):
        cause = cause_of(folder, ranks.deaths)
        raise OutlayError("the memory of this plan could not be measured", why=cause.reason)
    return [parse(MemoryReading, read_mapping(path), path=path) for path in paths]


def _reading(folder: RunFolder, rank: int) -> Path:
    return folder.root / f"memory-rank-{rank}.json"


def measure_in_rank(folder: RunFolder, steps: int) -> None:
    """The part of one rank: warm up, note what is there, build and step, write the reading."""
    from outlay.runner.engine import RankInfo

    rank = RankInfo.from_environment().rank
    reading = reading_in_rank(placed(folder.read_plan(), folder.root), steps)
    text = json.dumps(plain(dataclasses.replace(reading, rank=rank)))
    write_text(_reading(folder, rank), text)


def reading_in_rank(plan: Plan, steps: int = 3) -> MemoryReading:
    """This rank's reading; also one call of a living pool, whose ranks started with `MALLOC` set."""
    import torch

    from outlay.runner.model import skeleton

    skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
    _steps(_tiny(plan), 1)
    gc.collect()
    return _on_cuda(plan, steps) if torch.cuda.is_available() else _on_cpu(plan, steps)


def _tiny(plan: Plan) -> Plan:
    """The same strategy and configuration around a model of a few thousand parameters."""
    layers = max(2, plan.strategy.pp)
    config = {**_TINY, "num_hidden_layers": layers, "max_position_embeddings": plan.job.seq_len}
    if plan.strategy.ep > 1:
        config |= {"model_type": "mixtral", "num_local_experts": plan.strategy.ep}
    model = dataclasses.replace(plan.model, name="warm-up", config=config, weights=None)
    compress = plan.job.compress
    if compress is not None and compress.distill is not None:
        # a teacher reads another vocabulary than the small model
        job = dataclasses.replace(plan.job, compress=None)
        return dataclasses.replace(plan, model=model, job=job)
    return dataclasses.replace(plan, model=model)


def _steps(plan: Plan, steps: int) -> None:
    import torch

    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    if engine.distiller is not None:
        engine.distiller.pretend()
    shape = (plan.strategy.micro_batch, plan.job.seq_len)
    vocab = int(plan.model.config["vocab_size"])
    made = torch.Generator().manual_seed(engine.dp_rank)
    for _ in range(steps):
        engine.train_step(
            [torch.randint(vocab, shape, generator=made) for _ in range(plan.strategy.grad_accum)]
        )
    engine.close()


def _on_cpu(plan: Plan, steps: int) -> MemoryReading:
    from outlay.runner.observed import status_bytes

    before = status_bytes("VmRSS")
    # proc(5): 5 resets the peak resident set size to what is resident now
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    _steps(plan, steps)
    growth = max(0, status_bytes("VmHWM") - before)
    return MemoryReading(rank=0, kind="host_growth", before_bytes=before, growth_bytes=growth)


def _on_cuda(plan: Plan, steps: int) -> MemoryReading:
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = int(torch.cuda.memory_allocated())
    _steps(plan, steps)
    return MemoryReading(
        rank=0,
        kind="allocated",
        before_bytes=before,
        growth_bytes=int(torch.cuda.max_memory_allocated()) - before,
        reserved_bytes=int(torch.cuda.max_memory_reserved()),
        device_bytes=int(torch.cuda.device_memory_used()),
    )

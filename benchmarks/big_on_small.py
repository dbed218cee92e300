"""A model larger than the memory that plain loading has: ZeRO-3 with offload to NVMe under a memory cgroup.

    python -m benchmarks.big_on_small [--layers 14]

Four gloo ranks on CPU load random safetensors under one limit: first plainly (ZeRO-0, each rank all of
it), which the kernel ends; then with weights and optimizer on NVMe, which takes two steps. Prints the
limit, what each start did, and the growth of resident memory beside the plan. Needs a memory cgroup
(version 1 or 2) that this user may write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.memory_deepspeed import cpu_ranks, predicted
from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.files import parse, read_mapping, to_json, write_text
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError
from outlay.profiles.units import MIB

RANKS, STEPS = 4, 2
PROCESS_BYTES = 450 * MIB
"""Of a rank before it loads anything, and a little for the process that starts them."""
PLAIN = Strategy(zero=0, dp=RANKS, activation_checkpointing="full")
NVME = dataclasses.replace(PLAIN, zero=3, offload_optimizer="nvme", offload_param="nvme")
_ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


def config_of(layers: int) -> dict[str, Any]:
    """A Llama of about 17 M parameters and 12.8 M more a layer."""
    return {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip


def plan_of(strategy: Strategy, layers: int, weights: Path) -> Plan:
    """The plan that the ranks run."""
    config = config_of(layers)
    cluster = dataclasses.replace(cpu_ranks(), ranks_per_node=RANKS)
    spec = spec_from_config(config, name="big", source="benchmark")
    job = Job(
        model="big", seq_len=32, global_batch=strategy.global_batch, steps=STEPS, precision="fp32",
        optimizer=Optimizer(lr=1e-4),
    )  # fmt: skip
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="benchmark", job=job, cluster=cluster,
        strategy=strategy, estimate={}, considered=1, feasible=1,
        deepspeed=deepspeed_config(job, strategy, spec, cluster),
        model=ModelSource(
            name="big", source="benchmark", parameters=parameter_counts(spec).total, config=config,
            weights=str(weights),
        ),
    )  # fmt: skip


def write_weights(plan: Plan, folder: Path) -> None:
    """Random safetensors, a file a part, so that nothing here holds the model either."""
    import torch
    from safetensors.torch import save_file

    from outlay.runner.model import parts_of, skeleton

    folder.mkdir()
    model, files = skeleton(plan.model, precision="fp32", attention="sdpa"), {}
    for number, part in enumerate(parts_of(model)):
        named = model.get_submodule(part).named_parameters()
        tensors = {f"{part}.{name}": 0.02 * torch.randn(p.shape) for name, p in named}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        files |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index)


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A group with that limit and nothing in it. Raises UsageError where none can be made."""
    for root in _ROOTS:
        name = "memory.limit_in_bytes" if root.name == "memory" else "memory.max"
        group = root / f"outlay-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit_bytes))
            yield group
            return
        finally:
            _remove(group)
    raise UsageError(
        "no memory cgroup can be made here",
        where=" or ".join(map(str, _ROOTS)),
        do="run as root where cgroups are writable",
    )


def _remove(group: Path) -> None:
    """End what still runs in it: a group with processes cannot be removed."""
    for _ in range(100):
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def _kills(group: Path) -> int:
    """How many processes of the group the kernel has ended for want of memory."""
    for name in ("memory.oom_control", "memory.events"):
        if (group / name).exists():
            counts = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(counts["oom_kill"])
    return 0


def growth_under(limit_bytes: int, plan: Plan, folder: Path) -> tuple[list[int] | None, int]:
    """(growth of each rank over building and two steps, null where it failed; kills by the kernel)."""
    plan_file, out = folder / "plan.json", folder / "growth.json"
    out.unlink(missing_ok=True)
    write_text(plan_file, to_json(plan))
    with memory_cgroup(limit_bytes) as group:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.big_on_small", "--inside", str(group),
             str(plan_file), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        kills = _kills(group)
    return json.loads(out.read_text()) if out.exists() else None, kills


def _inside(group: str, plan_file: str, out: str) -> None:
    from outlay.runner.memory_probe import run_memory_probe

    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    plan = parse(Plan, read_mapping(plan_file), path=plan_file)
    readings = run_memory_probe(plan, STEPS)
    Path(out).write_text(json.dumps([r.growth_bytes for r in readings]))


def compare(layers: int, folder: Path, report: Any) -> dict[str, Any]:
    """Both starts under one limit: midway between what the two need."""
    from outlay.runner.launch import rank_environment

    weights = folder / "weights"
    plain, small = (plan_of(s, layers, weights) for s in (PLAIN, NVME))
    write_weights(plain, weights)
    rank_environment(small)  # operators are compiled before there is a limit
    whole = 4 * plain.model.parameters
    expected = predicted(small)[0]
    limit = round(RANKS * (PROCESS_BYTES + (whole + expected) / 2))
    report(f"model {whole / MIB:.0f} MiB; limit for {RANKS} ranks {limit / MIB:.0f} MiB")
    ran, kills = growth_under(limit, plain, folder)
    died = ran is None and kills > 0
    report(
        f"plain loading, {RANKS * whole / MIB:.0f} MiB of weights: "
        + ("ended by the kernel" if died else "ran")
    )
    growth, _ = growth_under(limit, small, folder)
    if growth is not None:
        report(
            f"NVMe: {STEPS} steps, {max(growth) / MIB:.0f} MiB a rank, planned {expected / MIB:.0f} "
            f"({expected / max(growth) - 1:+.1%})"
        )
    return {"plain_died": died, "growth": growth, "expected": expected}


@click.command()
@click.option("--layers", type=int, default=14, show_default=True)
@click.option("--inside", nargs=3, hidden=True)
def main(layers: int, inside: tuple[str, str, str] | None) -> None:
    """Train under a limit that plain loading exceeds."""
    if inside:
        _inside(*inside)
        return
    with tempfile.TemporaryDirectory() as name:
        compare(layers, Path(name), click.echo)


if __name__ == "__main__":
    main()

"""Plan → an sbatch file that starts torchrun on every node, with the Trainer's program."""

from __future__ import annotations

from outlay.planner.emit.order import Emitted, Order
from outlay.planner.emit.trainer import trainer_files
from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_seconds

CHECKED_AGAINST = "Slurm 22.05, sbatch(1)"

_BODY = """
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
: "${1:?sbatch job.sbatch TEXT_FILE...}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > RANKS ? SLURM_CPUS_ON_NODE / RANKS : 1))
# one task a node: torchrun starts the ranks, and gets all of the node's cores
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c '
  exec torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=RANKS --node_rank="$SLURM_NODEID" \\
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" train.py "$@"' train "$@"
"""


def _estimate(order: Order) -> str:
    """How long, for whoever sets --time; the partition's limit holds where nobody does."""
    step = order.plan.estimate.get("step") or {}
    if not step.get("high_s"):
        return "# no --time: the partition's limit holds; how long it takes is not known"
    low, high = (format_seconds(step[k] * order.plan.job.steps) for k in ("low_s", "high_s"))
    return (
        f"# no --time: the partition's limit holds. Estimated for the steps alone: {low} to {high}"
    )


def sbatch_file(order: Order) -> str:
    cluster = order.plan.cluster
    for line in order.lines:
        if not line.startswith("-") or "\n" in line:
            raise UsageError(
                f"{line!r} is no option of sbatch", where="--sbatch", do="as in --sbatch=--partition=gpu"
            )  # fmt: skip
    options = [
        f"--job-name={order.name}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        "--output=%x-%j.out",
    ]
    if cluster.kind == "gpu":
        options.insert(3, f"--gpus-per-node={cluster.ranks_per_node}")
    options += order.lines
    timed = any(line.startswith(("--time", "-t")) for line in order.lines)
    lines = ["#!/bin/bash", f"# {order.head}; options of {CHECKED_AGAINST}"]
    lines += [f"#SBATCH {option}" for option in options]
    lines += [] if timed else [_estimate(order)]
    body = _BODY.replace("RANKS", str(cluster.ranks_per_node))
    if cluster.kind == "cpu":
        body = body.replace("export MASTER_ADDR", "export DS_ACCELERATOR=cpu\nexport MASTER_ADDR")
    return "\n".join(lines) + "\n" + body


def emit_slurm(order: Order) -> Emitted:
    """job.sbatch with the Trainer's program."""
    files = trainer_files(order, "slurm") | {"job.sbatch": sbatch_file(order)}
    notes = ("the folder must lie on a file system that every node sees",)
    return Emitted(files=files, command="sbatch job.sbatch TEXT_FILE...", notes=notes)

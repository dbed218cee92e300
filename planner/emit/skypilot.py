"""Plan → a SkyPilot task that rents the plan's nodes and starts torchrun on each."""

from __future__ import annotations

from typing import Any

from outlay.planner.emit.blocks import block_yaml
from outlay.planner.emit.order import Emitted, Order, require_gpu
from outlay.planner.emit.trainer import trainer_files
from outlay.profiles.errors import UsageError

CHECKED_AGAINST = "skypilot 0.14.1, utils/schemas.py"

_ACCELERATORS = {
    "a10": "A10", "a10g": "A10G", "a30": "A30", "a40": "A40", "a100-sxm-40gb": "A100",
    "a100-pcie-40gb": "A100", "a100-sxm-80gb": "A100-80GB", "a100-pcie-80gb": "A100-80GB", "b200": "B200",
    "b300": "B300", "gb200": "GB200", "h100-sxm": "H100", "h100-pcie": "H100", "h100-nvl": "H100",
    "h200-sxm": "H200", "h200-nvl": "H200", "l4": "L4", "l40": "L40", "l40s": "L40S", "mi300x": "MI300X",
    "rtx-3090": "RTX3090", "rtx-4090": "RTX4090", "rtx-5090": "RTX5090", "rtx-6000-ada": "RTX6000-Ada",
    "rtx-a5000": "RTXA5000", "rtx-a6000": "RTXA6000", "t4": "T4", "v100-sxm-16gb": "V100",
    "v100-pcie-16gb": "V100", "v100-sxm-32gb": "V100-32GB", "v100-pcie-32gb": "V100-32GB",
}  # fmt: skip
"""Our names → those of SkyPilot's catalog, which says nothing of the form factor on most clouds."""
_CLOUDS = ("aws", "azure", "gcp", "lambda")
"""Whose instance names are the same here and there."""

_RUN = """\
MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc_per_node={ranks} \\
  --node_rank="$SKYPILOT_NODE_RANK" --master_addr="$MASTER_ADDR" --master_port=29500 \\
  train.py /data/text
"""


def _resources(order: Order) -> dict[str, Any]:
    """The instance that was planned where SkyPilot knows it by that name; else the accelerator."""
    cluster = order.plan.cluster
    provider, _, rest = cluster.source.removeprefix("instance:").partition("/")
    if cluster.source.startswith("instance:") and provider in _CLOUDS:
        return {"infra": provider, "instance_type": rest.partition(":")[0]}
    name = _ACCELERATORS.get(cluster.accelerator.name)
    if name is None:
        raise UsageError(
            f"SkyPilot has no name for {cluster.accelerator.title} that is known here",
            where=order.where,
            do="plan for PROVIDER/INSTANCE of " + ", ".join(_CLOUDS),
        )
    return {"accelerators": f"{name}:{cluster.ranks_per_node}"}


def packages(order: Order) -> str:
    """What pip installs beside torch, as words of a shell line."""
    return f"'deepspeed=={order.version}' 'transformers>=5' 'accelerate>=1.10'"


def task(order: Order) -> dict[str, Any]:
    """The keys of a SkyPilot task."""
    cluster = order.plan.cluster
    return {
        "name": order.name,
        "num_nodes": cluster.nodes,
        "resources": _resources(order),
        "workdir": ".",
        "envs": {"DATA": order.data},
        "file_mounts": {"/data/text": "${DATA}"},
        "setup": f"pip install 'torch>=2.10' {packages(order)}\n",
        "run": _RUN.format(ranks=cluster.ranks_per_node),
    }


def emit_skypilot(order: Order) -> Emitted:
    """task.yaml with the Trainer's program."""
    require_gpu(order, "skypilot")
    files = trainer_files(order, "skypilot")
    files["task.yaml"] = f"# {order.head}; keys of {CHECKED_AGAINST}\n{block_yaml(task(order))}"
    given = "" if order.data else " --env DATA=TEXT_FILE"
    notes = [
        f"rented at a price that SkyPilot finds, which need not be the plan's: sky launch --dryrun task.yaml{given}"
    ]
    if "accelerators" in task(order)["resources"]:
        notes.append("SkyPilot's accelerator names leave the form factor and the links open")
    return Emitted(files=files, command=f"sky launch task.yaml{given}", notes=tuple(notes))

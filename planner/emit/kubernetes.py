"""Plan → a TrainJob of Kubeflow Trainer (v2 API) and the ConfigMap with the Trainer's program."""

from __future__ import annotations

from typing import Any

from outlay.planner.emit.blocks import block_yaml
from outlay.planner.emit.order import Emitted, Order, require_gpu
from outlay.planner.emit.skypilot import packages
from outlay.planner.emit.trainer import trainer_files
from outlay.profiles.errors import UsageError

CHECKED_AGAINST = "Kubeflow Trainer 2.3.0, trainer.kubeflow.org/v1alpha1"
IMAGE = "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel"
"""The torch of Trainer 2.3.0's torch-distributed runtime, with the compiler that DeepSpeed builds with."""
_RESOURCE = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu"}

_SCRIPT = """\
set -e
mkdir -p /work "/data/{name}"
cp -L /outlay/* /work
ln -sfn "/data/{name}" /work/out
cd /work
pip install {packages}
exec torchrun train.py "$@"
"""
"""The runtime gives torchrun its nodes, ranks and address in PET_ variables."""


def _mounts(order: Order, claim: str) -> dict[str, Any]:
    """Volumes of the pods: the program, the text and the outputs, shared memory for NCCL."""
    return {
        "volumes": [
            {"name": "outlay", "configMap": {"name": order.name}},
            {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [
                    {"name": "outlay", "mountPath": "/outlay"},
                    {"name": "data", "mountPath": "/data"},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
    }


def train_job(order: Order, claim: str, text: str) -> dict[str, Any]:
    """The keys of a TrainJob on the torch-distributed runtime."""
    cluster = order.plan.cluster
    gpu = _RESOURCE.get(cluster.accelerator.vendor)
    if gpu is None or (gpu != _RESOURCE["NVIDIA"] and order.image is None):
        raise UsageError(
            f"no container image is known here for {cluster.accelerator.title}",
            where=order.where,
            do="pass --image" if gpu else "emit slurm and emit launch need none",
        )
    program = _SCRIPT.format(name=order.name, packages=packages(order))
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": order.name},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": order.image or IMAGE,
                "numNodes": cluster.nodes,
                "numProcPerNode": cluster.ranks_per_node,
                "resourcesPerNode": {
                    "requests": {gpu: cluster.ranks_per_node},
                    "limits": {gpu: cluster.ranks_per_node},
                },
                "command": ["bash", "-c", program, "train"],
                "args": [f"/data/{text}"],
            },
            "runtimePatches": [
                {
                    "manager": "outlay",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {
                                "replicatedJobs": [
                                    {
                                        "name": "node",
                                        "template": {
                                            "spec": {"template": {"spec": _mounts(order, claim)}}
                                        },
                                    }
                                ]
                            }
                        }
                    },
                }
            ],
        },
    }


def emit_kubernetes(order: Order) -> Emitted:
    """trainjob.yaml: the program as a ConfigMap, and the TrainJob that runs it."""
    require_gpu(order, "kubernetes")
    claim, _, text = (order.data or "").partition("/")
    if not claim or not text:
        raise UsageError(
            "a TrainJob's pods need the text on a volume",
            where="--data",
            do="pass --data CLAIM/PATH: a PersistentVolumeClaim that every node can mount, and the text's "
            "path in it",
        )
    program = trainer_files(order, "kubernetes")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": order.name},
        "data": program,
    }
    documents = [config_map, train_job(order, claim, text)]
    files = {
        "trainjob.yaml": f"# {order.head}; keys of {CHECKED_AGAINST}\n{block_yaml(*documents)}"
    }
    notes = [f"the model and its checkpoints go to {claim}/{order.name}"]
    if order.weights:
        notes.append(f"the pods must find the weights as {order.weights}")
    return Emitted(
        files=files | program, command="kubectl apply -f trainjob.yaml", notes=tuple(notes)
    )

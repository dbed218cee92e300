"""Plan → command lines for torchrun and for the `deepspeed` launcher, with a hostfile."""

from __future__ import annotations

import re

from outlay.planner.emit.order import Emitted, Order
from outlay.planner.emit.trainer import trainer_files
from outlay.profiles.errors import UsageError

CHECKED_AGAINST = "deepspeed 0.19.8, launcher/runner.py; torch 2.13.0, distributed/run.py"
PORT = 29500


def required_hosts(order: Order) -> tuple[str, ...]:
    """One name a node; none are needed for one node."""
    nodes = order.plan.cluster.nodes
    if len(order.hosts) != (nodes if nodes > 1 or order.hosts else 0):
        raise UsageError(
            f"the plan is for {nodes} node{'s' if nodes > 1 else ''}, and {len(order.hosts)} are named",
            where="--hosts",
            do=f"name {nodes}, as in --hosts " + ",".join(f"node{i + 1}" for i in range(min(nodes, 3)))
            + (",…" if nodes > 3 else ""),
        )  # fmt: skip
    for host in order.hosts:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", host):
            raise UsageError(f"{host!r} is no host name", where="--hosts")
    if len(set(order.hosts)) != len(order.hosts):
        raise UsageError("a host is named twice", where="--hosts", why=", ".join(order.hosts))
    return order.hosts


def hostfile(order: Order) -> str:
    """`HOST slots=RANKS` a line, the first host first: where rank 0 runs."""
    slots = order.plan.cluster.ranks_per_node
    return "".join(f"{host} slots={slots}\n" for host in required_hosts(order))


def _head(order: Order, usage: str) -> list[str]:
    lines = ["#!/bin/sh", f"# {order.head}; options of {CHECKED_AGAINST}", f"# {usage}", "set -e"]
    if order.plan.cluster.kind == "cpu":
        lines += ["export DS_ACCELERATOR=cpu"]
    return lines


def torchrun_script(order: Order) -> str:
    """To be started on every node; torchrun needs no ssh."""
    cluster = order.plan.cluster
    if cluster.nodes == 1:
        lines = _head(order, "sh torchrun.sh TEXT_FILE...: from within this folder")
        words = f"torchrun --standalone --nproc_per_node={cluster.ranks_per_node}"
        return "\n".join([*lines, f'exec {words} train.py "$@"', ""])
    usage = f"sh torchrun.sh NODE_RANK TEXT_FILE...: on every node, NODE_RANK 0 on {order.hosts[0]}"
    lines = [*_head(order, usage), "node_rank=${1:?rank of this node, 0 on the first}", "shift"]
    words = (
        f"torchrun --nnodes={cluster.nodes} --nproc_per_node={cluster.ranks_per_node} "
        f'--node_rank="$node_rank" --master_addr={order.hosts[0]} --master_port={PORT}'
    )
    return "\n".join([*lines, f'exec {words} train.py "$@"', ""])


def deepspeed_script(order: Order) -> str:
    """To be started on one node; the launcher reaches the others by ssh.

    On one node there is no hostfile: with one the launcher asks for ssh even to this machine.
    """
    cluster = order.plan.cluster
    lines = _head(order, "sh deepspeed.sh TEXT_FILE...: from within this folder, on one node")
    if cluster.nodes == 1:
        words = f"deepspeed --hostfile=none --num_gpus={cluster.ranks_per_node}"
    else:
        words = (
            f"deepspeed --hostfile=hostfile --num_nodes={cluster.nodes} "
            f"--num_gpus={cluster.ranks_per_node} --master_addr={order.hosts[0]} --master_port={PORT}"
        )
    return "\n".join([*lines, f'exec {words} train.py "$@"', ""])


def emit_launch(order: Order) -> Emitted:
    """The Trainer's program with both launchers' command lines."""
    required_hosts(order)
    files = trainer_files(order, "launch")
    files |= {"torchrun.sh": torchrun_script(order), "deepspeed.sh": deepspeed_script(order)}
    notes: tuple[str, ...] = ()
    if order.plan.cluster.nodes > 1:
        files["hostfile"] = hostfile(order)
        notes = ("the folder must lie at the same path on every node",)
        if order.plan.cluster.kind == "cpu":
            files[".deepspeed_env"] = "DS_ACCELERATOR=cpu\n"
    rank = "NODE_RANK " if order.plan.cluster.nodes > 1 else ""
    return Emitted(
        files=files,
        command=f"sh torchrun.sh {rank}TEXT_FILE...   (or: sh deepspeed.sh TEXT_FILE...)",
        notes=notes,
    )

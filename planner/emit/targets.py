"""What `outlay emit` can write, one line each; the modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from outlay.planner.emit.order import Emitted, Order


@dataclass(frozen=True, kw_only=True)
class Target:
    """One program that reads what a plan says."""

    name: str
    line: str
    """First line of its help."""
    module: str
    takes: tuple[str, ...] = ()
    """Options of `outlay emit` besides those that all have."""

    def write(self, order: Order) -> Emitted:
        module = importlib.import_module(f"outlay.planner.emit.{self.module}")
        return cast(Callable[[Order], Emitted], getattr(module, f"emit_{self.name}"))(order)


FOLDERS = (
    Target(name="trainer", line="A folder for Hugging Face's Trainer: arguments, JSON, script, command.",
           module="trainer", takes=("base_model",)),
    Target(name="accelerate", line="A folder for Accelerate: its YAML, the JSON, a loop and a command.",
           module="accelerate", takes=("base_model",)),
    Target(name="axolotl", line="axolotl's YAML with the DeepSpeed JSON that it names.",
           module="frameworks", takes=("base_model", "data")),
    Target(name="llamafactory", line="LLaMA-Factory's YAML with the DeepSpeed JSON that it names.",
           module="frameworks", takes=("base_model", "data")),
    Target(name="launch", line="torchrun and deepspeed command lines, with a hostfile.",
           module="launch", takes=("base_model", "hosts")),
    Target(name="slurm", line="An sbatch file that starts torchrun on every node.",
           module="slurm", takes=("base_model", "sbatch")),
    Target(name="skypilot", line="A SkyPilot task that rents the nodes and trains there.",
           module="skypilot", takes=("base_model", "data")),
    Target(name="kubernetes", line="A TrainJob for Kubeflow Trainer, with the program as a ConfigMap.",
           module="kubernetes", takes=("base_model", "data", "image")),
)  # fmt: skip

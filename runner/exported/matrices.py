"""Which weights of a transformers model can be packed, by the names of its module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import UsageError
from outlay.runner.evaluate.load import Folder, quiet_packers


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One `nn.Linear`."""

    name: str
    outputs: int
    inputs: int
    is_head: bool
    """The projection to the vocabulary: packed only where the size asks for it."""

    def bytes_as(self, packing: Packing | None, width: int, *, mixed: bool = False) -> int:
        """On disk; `width`: bytes of a number of the model's precision, dense or of a scale."""
        if packing is None:
            return width * self.outputs * self.inputs
        return packing.matrix_bytes(self.outputs, self.inputs, width, mixed=mixed)


def linears(folder: Folder) -> tuple[Linear, ...]:
    """The `nn.Linear`s of the model, from its config alone; a head that is tied to the token table is
    none of them."""
    quiet_packers()
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(folder.path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    found = [
        Linear(
            name=name, outputs=module.out_features, inputs=module.in_features, is_head=module is head
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (tied and module is head)
    ]  # fmt: skip
    if not any(not linear.is_head for linear in found):
        raise UsageError(
            f"a {config.model_type} has no nn.Linear in its blocks", where=str(folder.path),
            why="its matrices are of another module (GPT-2: Conv1D), which neither torchao nor "
            "compressed-tensors packs", do="leave --quantize out",
        )  # fmt: skip
    return tuple(found)


def check_groups(found: tuple[Linear, ...], packing: Packing) -> None:
    """Refuse groups that do not divide a matrix."""
    if packing.group is None:
        return
    bad = [m for m in found if not m.is_head and m.inputs % packing.group]
    if bad:
        raise UsageError(
            f"groups of {packing.group} do not divide {bad[0].name}", where="--quantize",
            why=f"it has {bad[0].inputs} inputs", do="another group",
        )  # fmt: skip

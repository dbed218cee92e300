"""Which weights a compression is about, by transformers' names, and where this rank has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from outlay.planner.spec.compress import Part
from outlay.runner.model import blocks_of

if TYPE_CHECKING:
    from outlay.runner.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Target:
    """One matrix of the model."""

    name: str
    """Of the weight, as in a state dict of transformers."""
    part: Part
    outputs: int
    inputs: int
    turned: bool
    """It is kept as [inputs, outputs] (GPT-2's Conv1D)."""


def targets_of(model: Any, parts: tuple[Part, ...]) -> list[Target]:
    """The matrices of these parts in the order of the model; `model` may be a skeleton."""
    owners = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[str, Target] = {}
    for module, part in modules_of(model):
        name = owners.get(id(module.weight))
        if part in parts and name is not None and name not in found:
            found[name] = _target(name, part, module)
    return [found[name] for name in owners.values() if name in found]


def modules_of(model: Any) -> Iterator[tuple[Any, Part]]:
    """Every module with a matrix, with what it is part of; blocks first."""
    for block in blocks_of(model):
        for name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2:
                yield module, "attention" if "attn" in name or "attention" in name else "mlp"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None:
        yield head, "head"
    yield embedding, "embedding"


def _target(name: str, part: Part, module: Any) -> Target:
    turned = type(module).__name__ == "Conv1D"
    rows, columns = module.weight.shape
    outputs, inputs = (columns, rows) if turned else (rows, columns)
    return Target(name=name, part=part, outputs=outputs, inputs=inputs, turned=turned)


@dataclass(frozen=True)
class Live:
    """A weight as this rank holds it: whole, or its slice of a tensor-parallel group."""

    weight: nn.Parameter
    turned: bool


def live(engine: Engine, targets: list[Target]) -> dict[str, Live]:
    """Those of the targets that this rank's part of the model has."""
    wanted = {target.name: target for target in targets}
    found: dict[str, Live] = {}
    for name, module, key in _named_modules(engine):
        weight = module._parameters.get(key)
        if name in wanted and weight is not None:
            # tensor parallel turns a Conv1D into a Linear
            now_linear = bool(getattr(module, "turned", False))
            found[name] = Live(weight, wanted[name].turned and not now_linear)
    return found


def _named_modules(engine: Engine) -> Iterator[tuple[str, nn.Module, str]]:
    """(name of a weight in transformers' model, its module, its key there)."""
    roots = [("", engine.deepspeed.module)]
    if engine.pipeline:
        from outlay.runner.stage import Part as StagePart

        layers = engine.deepspeed.module.modules()
        roots = [(part.name, part.inner) for part in layers if isinstance(part, StagePart)]
    for prefix, root in roots:
        for path, module in root.named_modules():
            full = ".".join(name for name in (prefix, path) if name)
            for key in module._parameters:
                yield f"{full}.{key}" if full else key, module, key

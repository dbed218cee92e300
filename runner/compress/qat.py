"""Quantization-aware training: forward passes that see the weights as they will be stored.

torchao's `prepare` puts fake quantizers into the linear layers and its `convert` stores what was
trained; the gradients pass through the rounding (straight-through). One thing is ours: torchao's
layer keeps its rounded copy of the weights, whole and outside of ZeRO's partitions, from the forward
pass to the backward pass. Here it is made again in the backward pass instead, from the weights that
DeepSpeed has gathered there anyway (`docs/guides/compress.md` has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from outlay.planner.spec.compress import Qat
from outlay.profiles.errors import UsageError
from outlay.runner.compress.parts import modules_of
from outlay.runner.evaluate.load import quiet_packers, require_packer

_LINEAR = nn.functional.linear


def torchao_config(qat: Qat) -> Any:
    """What torchao stores the weights as: the configuration of its `quantize_`."""
    require_packer("torchao")
    quiet_packers()
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )

    dtype = torch.int4 if qat.bits == 4 else torch.int8
    group = qat.group_size
    granularity = PerAxis(0) if group is None else PerGroup(group)
    if qat.activation_bits is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)


def prepare(model: Any, qat: Qat | None) -> None:
    """Put fake quantizers into a model, whose weights may be on the meta device yet."""
    if qat is None:
        return
    chosen = {id(module) for module in _linears(model, qat)}
    config = torchao_config(qat)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

    quantize_(
        model, QATConfig(config, step="prepare"), filter_fn=lambda module, _: id(module) in chosen
    )
    recomputing = _recomputing(FakeQuantizedLinear)
    for module in model.modules():
        if type(module) is FakeQuantizedLinear:
            module.__class__ = recomputing


def convert(model: Any, qat: Qat) -> None:
    """Store the weights of a trained model, loaded by transformers, in their bits."""
    chosen = {id(module) for module in _linears(model, qat)}
    config = torchao_config(qat)
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen)


def switch(model: nn.Module, on: bool) -> None:
    """Fake quantization in all layers that have it, or in none."""
    for module in model.modules():
        for name in ("weight_fake_quantizer", "activation_fake_quantizer"):
            quantizer = getattr(module, name, None)
            if quantizer is not None:
                quantizer.enabled = on


def _linears(model: Any, qat: Qat) -> list[nn.Module]:
    found = [module for module, part in modules_of(model) if part in qat.parts]
    other = sorted({type(m).__name__ for m in found if not isinstance(m, nn.Linear)})
    if other:
        raise UsageError(
            f"the matrices of {type(model).__name__} are kept as {', '.join(other)}",
            where="compress.qat",
            why="torchao quantizes torch.nn.Linear only",
            do="name a model of linear layers, or leave qat out",
        )
    return found


def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """torchao's layer, which makes its rounded weights and inputs again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    class Recomputing(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.weight_fake_quantizer.enabled:
                plain: torch.Tensor = nn.functional.linear(x, self.weight, self.bias)
                return plain
            made: torch.Tensor = checkpoint(
                self.quantized, x, use_reentrant=False, preserve_rng_state=False
            )
            return made

        def quantized(self, x: torch.Tensor) -> torch.Tensor:
            """As torchao's forward, but past the linear function that ZeRO-3 puts in the place of torch's:
            it rounds gradients in another way, which a grid of few steps makes visible."""
            if self.activation_fake_quantizer is not None:
                x = self.activation_fake_quantizer(x)
            return _LINEAR(x, self.weight_fake_quantizer(self.weight), self.bias)

    return Recomputing

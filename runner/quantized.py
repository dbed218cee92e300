"""Frozen weights in 4 bits under adapters (QLoRA, arXiv 2305.14314): bitsandbytes' NF4, with or without
its scales quantized again. Each part is quantized as soon as it is filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from outlay.planner.rules.runner_methods import QUANTIZED
from outlay.planner.spec.job import Finetune, Job
from outlay.profiles.errors import MissingExtra, UsageError
from outlay.runner.model import Filler, blocks_of, parts_of

_STATE = "quant_state.bitsandbytes__nf4"


def fill(model: Any, filler: Filler, job: Job) -> None:
    """Fill the whole model; the linear layers of its blocks in 4 bits where the job says so."""
    how = job.finetune
    if how is None or how.quant == "none":
        filler.fill("")
        return
    if model.config.model_type not in QUANTIZED:
        raise UsageError(
            f"4-bit weights of {model.config.model_type!r} are not known",
            do=f"plan with --finetune lora; qlora trains {', '.join(QUANTIZED)}",
        )
    inside = {name for b in blocks_of(model) for name, m in model.named_modules() if m is b}
    for part in parts_of(model):
        filler.fill(part)
        if part in inside:
            _quantize(model.get_submodule(part), how)


def _quantize(block: nn.Module, how: Finetune) -> None:
    for name, layer in list(block.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, _narrow(layer, how))


def _narrow(layer: nn.Linear, how: Finetune) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise MissingExtra("bitsandbytes", "quantized") from None
    again = how.quant == "nf4-dq"
    made: Any = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=again,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=again
    ).to(layer.weight.device)
    made.weight.module = made
    # Evaluation on CPU would repack the weights for a bf16 kernel, which rounds the scales for good.
    made.support_avx512bf16_for_cpu = False
    made.bias = layer.bias
    return made


def widened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with each 4-bit weight as the numbers that the forward pass uses."""
    packed = [name.removesuffix(f".{_STATE}") for name in state if name.endswith(_STATE)]
    if not packed:
        return state
    from bitsandbytes.functional import QuantState, dequantize_4bit

    whole = dict(state)
    for name in packed:
        about = {
            k.removeprefix(f"{name}."): whole.pop(k) for k in state if k.startswith(f"{name}.")
        }
        scales = QuantState.from_dict(about, device=state[name].device)
        whole[name] = dequantize_4bit(state[name], scales)
    return whole

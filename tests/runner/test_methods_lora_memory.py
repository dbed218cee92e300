"""What a block with peft's factors saves for the backward pass, in closed form and by torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import ranks as r

from outlay.planner.estimate.activations import Execution, block_saved
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Finetune

pytest.importorskip("peft")


def _saved_bytes(family: str, layers: int, how: Finetune, precision: str) -> int:
    """Storages that autograd keeps after a forward pass, weights and buffers left out."""
    import torch

    from outlay.runner.adapters import adapt
    from outlay.runner.model import build_model

    plan = r.tiny_plan(
        family,
        job={"finetune": how},
        config={"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers},
    )
    job = dataclasses.replace(plan.job, precision=precision)  # type: ignore[arg-type]
    model: Any = build_model(plan.model, precision=precision, attention="sdpa", seed=7)
    adapt(model.train(), job)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}  # the storages themselves: an address must not be given away again

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=r.global_batch(0))
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_saved_as_planned(
    family: str, dropout: float, precision: str, width: int, method: Any
) -> None:
    how = Finetune(method=method, rank=4, dropout=dropout)
    three, two = (_saved_bytes(family, n, how, precision) for n in (3, 2))
    spec = spec_from_config(r.CONFIGS[family], name=family, source="test")
    run = Execution(
        width=width, kernels="hf", attention="sdpa", mask_bytes=width, finetune=how, peft=True
    )
    planned = block_saved(spec, spec.blocks[0], run)
    a_token = planned.sharded + planned.replicated + planned.routed
    tokens = r.GLOBAL_BATCH * r.SEQ_LEN
    # DoRA puts a unit matrix through both factors, and lets go of it and their product at once
    outputs = 3 * spec.hidden
    passing = width * spec.hidden * (2 * spec.hidden + outputs + 24) / tokens
    passing *= method == "dora"
    assert 0.99 * a_token <= (three - two) / tokens <= 1.01 * a_token + passing

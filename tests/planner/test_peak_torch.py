"""The peak of a forward and backward pass, from the phases of the estimate, against torch's profiler.

Real transformers modules on the CPU, with the runner's loss and the runner's checkpointing; what is
live is summed over the profiler's memory events, weights besides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_activations_torch import CASES, CONFIGS, layers_key  # noqa: E402

from outlay.planner.estimate.buckets import reduce_buckets  # noqa: E402
from outlay.planner.estimate.candidates import Candidates  # noqa: E402
from outlay.planner.estimate.memory import estimate_memory  # noqa: E402
from outlay.planner.estimate.software import CPU_DEEPSPEED, SINGLE  # noqa: E402
from outlay.planner.spec.families import spec_from_config  # noqa: E402
from outlay.planner.spec.job import Job, Optimizer  # noqa: E402
from outlay.planner.spec.strategy import Strategy  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

TOLERANCE = 0.03
SHAPE = {"batch": 4, "length": 64, "layers": 4, "vocab": 512}
OTHER_SHAPES = (
    {"batch": 2, "length": 64, "layers": 3, "vocab": 128},
    {"batch": 3, "length": 48, "layers": 6, "vocab": 1024},
)
"""With the peak elsewhere: in a block's backward, in the loss."""
PLAIN_TORCH = replace(SINGLE, loss=CPU_DEEPSPEED.loss, mask_bytes=CPU_DEEPSPEED.mask_bytes)
"""One process without DeepSpeed, with the runner's loss on a CPU."""
NOTHING_ON_TOP = dict.fromkeys(
    ("memory.workspace_bytes", "memory.runtime_bytes", "memory.runtime_bytes_per_group",
     "memory.fragmentation_fraction", "memory.fragmentation_least_fraction"), 0.0,
) | {"memory.expert_imbalance": 1.0}  # fmt: skip


def _config(family: str, shape: dict[str, int]) -> Any:
    values = CONFIGS[family] | {
        layers_key(family): shape["layers"],
        "vocab_size": shape["vocab"],
        "use_cache": False,
    }
    return transformers.AutoConfig.for_model(family, **values)


def _measured_bytes(
    family: str, attention: str, shape: dict[str, int], *, checkpointing: bool
) -> int:
    """Weights, and the most that is live beside them in the second pass (the first makes caches)."""
    from outlay.runner.model import blocks_of, causal_lm_loss, recompute

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        _config(family, shape), attn_implementation=attention, dtype=torch.float32
    )
    model.train()
    if checkpointing:
        recompute(list(blocks_of(model)), None)
    ids = torch.randint(1, shape["vocab"], (shape["batch"], shape["length"]))
    causal_lm_loss(model(input_ids=ids).logits, ids).backward()
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        causal_lm_loss(model(input_ids=ids).logits, ids).backward()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak + sum(p.nbytes for p in model.parameters())


def _predicted_bytes(
    family: str, attention: str, shape: dict[str, int], *, checkpointing: bool
) -> float:
    spec = spec_from_config(_config(family, shape).to_dict(), name=family, source="test")
    job = Job(
        model=family, seq_len=shape["length"], global_batch=shape["batch"], steps=1, precision="fp32",
        optimizer=Optimizer(name="sgd"), attention=attention,  # type: ignore[arg-type]
    )  # fmt: skip
    mode = "full" if checkpointing else "none"
    c = Candidates.of(
        [Strategy(micro_batch=shape["batch"], activation_checkpointing=mode)]  # type: ignore[arg-type]
    )
    memory = estimate_memory(
        spec, job, c, bucket=reduce_buckets(spec, c), figures=NOTHING_ON_TOP, software=PLAIN_TORCH
    )
    return float(memory.allocated[0])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_peak_is_what_torch_allocates(family: str, attention: str, checkpointing: bool) -> None:
    measured = _measured_bytes(family, attention, SHAPE, checkpointing=checkpointing)
    expected = _predicted_bytes(family, attention, SHAPE, checkpointing=checkpointing)
    assert expected == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=["small-vocabulary", "large-vocabulary"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_peak_in_other_shapes(
    family: str, attention: str, checkpointing: bool, shape: dict[str, int]
) -> None:
    measured = _measured_bytes(family, attention, shape, checkpointing=checkpointing)
    expected = _predicted_bytes(family, attention, shape, checkpointing=checkpointing)
    assert expected == pytest.approx(measured, rel=TOLERANCE)

"""LoRA and DoRA over frozen weights: peft's factors on the query and value projections of every block.

They are put in after the weights are filled, from random numbers of the job's seed alone, so that every
ZeRO stage starts from the same ones. A checkpoint holds the factors and their optimizer's states; the
frozen weights come from where the plan says (engine_state.py). The export is twofold: the factors as
peft reads them, and a transformers folder with the factors merged.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outlay.planner.spec.job import Job
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import MissingExtra, UsageError
from outlay.runner.quantized import widened

_SPLIT = ("q_proj", "v_proj")
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral",
            "olmo", "olmo2", "opt", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
        ),
        _SPLIT,
    ),
    # one matrix for q, k and v: as many numbers in its factors as in those of q and v alone
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
}  # fmt: skip
"""Names of the adapted projections, by transformers' model_type."""
_NAME = "default"


def _config(job: Job, model_type: str) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingExtra("peft", "run") from None
    how = job.finetune
    assert how is not None
    if model_type not in TARGETS:
        raise UsageError(
            f"adapters of {model_type!r} are not known",
            do=f"plan with --finetune full; lora trains {', '.join(sorted(TARGETS))}",
        )
    return LoraConfig(
        r=how.rank,
        lora_alpha=how.scale_alpha,
        lora_dropout=how.dropout,
        target_modules=list(TARGETS[model_type]),
        fan_in_fan_out=model_type == "gpt2",
        use_dora=how.method == "dora",
        task_type="CAUSAL_LM",
    )


def adapt(model: Any, job: Job) -> None:
    """Freeze the weights and put factors beside them, where the job trains adapters."""
    if job.finetune is None:
        return
    config = _config(job, model.config.model_type)
    from peft import inject_adapter_in_model

    dtype = model.dtype
    seed = int.from_bytes(hashlib.sha256(f"{job.seed}:adapters".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    for weight in trained(model):
        weight.data = weight.data.to(dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that a step changes."""
    return [p for p in model.parameters() if p.requires_grad]


def merged(state: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    """By transformers' names: W + alpha / rank · B A (arXiv 2106.09685, section 4.1), with DoRA each row scaled
    to its trained norm (arXiv 2402.09353, eq. 5), in fp32, then rounded to the width of W. GPT-2 keeps its
    matrices transposed. As it is where no adapters are trained."""
    how = plan.job.finetune
    if how is None:
        return state
    whole: dict[str, torch.Tensor] = {}
    state = widened(state)
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        whole[name.replace(".base_layer.", ".")] = tensor
        if stem != name:
            down, up = (state[f"{stem}.lora_{x}.{_NAME}.weight"].float() for x in "AB")
            change = how.scale_alpha / how.rank * (up @ down)
            turned = _family(plan) == "gpt2"
            summed = (tensor.float().t() if turned else tensor.float()) + change
            norms = state.get(f"{stem}.lora_magnitude_vector.{_NAME}.weight")
            if norms is not None:
                summed *= (norms.float() / torch.linalg.norm(summed, dim=1)).unsqueeze(1)
            whole[f"{stem}.weight"] = (summed.t() if turned else summed).to(tensor.dtype)
    return whole


def factors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By peft's names, which leave the adapter's own out, and `weight` behind DoRA's norms."""
    plain = {
        name.replace(f"lora_magnitude_vector.{_NAME}.weight", "lora_magnitude_vector"): tensor
        for name, tensor in state.items()
        if ".lora_" in name
    }
    return {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous()
        for name, tensor in plain.items()
    }


def write_factors(state: dict[str, torch.Tensor], plan: Plan, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, where the job trains adapters; on one rank."""
    if plan.job.finetune is None:
        return
    from safetensors.torch import save_file

    config = _config(plan.job, _family(plan))
    config.base_model_name_or_path = plan.model.weights or plan.model.source
    folder.mkdir(parents=True)
    save_file(factors(state), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {k: _plain(v) for k, v in config.to_dict().items()}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _family(plan: Plan) -> str:
    return str(plan.model.config.get("model_type", ""))


def _plain(value: Any) -> Any:
    """peft's config holds sets and enumerations."""
    if isinstance(value, set):
        return sorted(value)
    return value.value if hasattr(value, "value") else value

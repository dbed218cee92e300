"""The model of a plan as a module: from its transformers config alone, the same in every parallelism.

The module is first made without memory (meta device), then filled part by part. The random numbers
of each submodule come from a seed of its own, made of the job's seed and the submodule's name, so
that a rank that fills only its pipeline stage, or one block at a time before ZeRO-3 splits it,
gets exactly the numbers of one process that fills the whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from outlay.planner.spec.plan import ModelSource
from outlay.profiles.errors import FileError, UsageError

IGNORED = -100
"""Label of a position that has no next token."""

_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}


def dtype_of(precision: str) -> torch.dtype:
    """In which weights are kept for forward and backward."""
    if precision not in _DTYPES:
        raise UsageError(
            f"precision {precision} is not run yet", do=f"use one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[precision]


def model_config(source: ModelSource) -> Any:
    """The transformers config object of the plan's model, without the generation cache."""
    from transformers import AutoConfig

    config = dict(source.config)
    family = config.pop("model_type", None)
    if not family:
        raise UsageError("the model's config has no model_type", where=source.source)
    # transformers writes these into config.json itself; they are not fields of the class.
    for key in ("transformers_version", "architectures", "torch_dtype", "dtype", "_name_or_path"):
        config.pop(key, None)
    try:
        made = AutoConfig.for_model(family, **config)
    except Exception as error:  # transformers checks values in many ways, each with its own class
        raise UsageError(
            f"transformers refuses the config of {source.name}", where=source.source, why=str(error)
        ) from error
    made.use_cache = False
    return made


def skeleton(source: ModelSource, *, precision: str, attention: str) -> nn.Module:
    """The whole module on the meta device: names, shapes and ties, no memory."""
    from transformers import AutoModelForCausalLM

    config = model_config(source)
    with torch.device("meta"):
        try:
            made: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype_of(precision), attn_implementation=_ATTENTION[attention]
            )
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{source.name} cannot be built with attention {attention}", why=str(error)
            ) from error
    return made


def build_model(
    source: ModelSource,
    *,
    precision: str,
    attention: str,
    seed: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The whole model in memory: random by `seed`, or from `source.weights`."""
    model = skeleton(source, precision=precision, attention=attention)
    filler = Filler(model, source, seed=seed, device=torch.device(device))
    filler.fill("")
    return model


def parts_of(model: nn.Module) -> list[str]:
    """Names of submodules that together hold every parameter, each small enough to fill at once.

    Lists of blocks are taken apart; everything else is taken where it has parameters of its own.
    """
    parts: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        children = list(module.named_children())
        is_block = hasattr(module, "gradient_checkpointing") and not hasattr(module, "config")
        if is_block or not children or any(p is not None for p in module._parameters.values()):
            parts.append(name)
            return
        for child, inner in children:
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return parts


class Filler:
    """Gives memory and values to parts of a skeleton, in any order, each part once."""

    def __init__(
        self, model: nn.Module, source: ModelSource, *, seed: int, device: torch.device
    ) -> None:
        self.model: Any = model
        self.seed, self.device = seed, device
        self._owners = {id(p): name for name, p in model.named_parameters()}
        self._made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._files = WeightFiles(Path(source.weights)) if source.weights else None
        self._base = getattr(model, "base_model_prefix", "")

    def fill(self, part: str) -> nn.Module:
        """Fill the submodule of that name ("" = all); returns it."""
        target: nn.Module = self.model.get_submodule(part)
        named = [(f"{part}.{n}" if part and n else part or n, m) for n, m in target.named_modules()]
        # Children before parents: a parent may set its children's weights again (GPT-2 scales the
        # projections into the residual stream).
        with torch.random.fork_rng(devices=self._rng_devices()), torch.no_grad():
            for name, module in reversed(named):
                self._fill_one(name, module)
        return target

    def _rng_devices(self) -> list[int]:
        return [self.device.index or 0] if self.device.type == "cuda" else []

    def _fill_one(self, name: str, module: nn.Module) -> None:
        own = [key for key, p in module._parameters.items() if p is not None]
        mine = [key for key in own if self._materialize(name, module, key)]
        has_buffers = False
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=self.device)
                has_buffers = True
        if own and not mine and not has_buffers:
            return  # A tied weight: the module that owns it gives the values.
        if self._files is None or has_buffers:
            torch.manual_seed(_seed_of(self.seed, name))
            self.model._init_weights(module)
        if self._files is not None:
            for key in mine:
                parameter = module._parameters[key]
                assert parameter is not None
                parameter.copy_(self._read(f"{name}.{key}" if name else key, parameter))

    def _materialize(self, name: str, module: nn.Module, key: str) -> bool:
        """Give memory to a parameter; true where this module is the one that owns it."""
        old = module._parameters[key]
        assert old is not None
        owner = self._owners.get(id(old)) == (f"{name}.{key}" if name else key)
        if old.is_meta:
            if id(old) not in self._made:
                new = nn.Parameter(torch.empty_like(old, device=self.device), old.requires_grad)
                self._made[id(old)] = (old, new)
            module._parameters[key] = self._made[id(old)][1]
        return owner

    def _read(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        assert self._files is not None
        stored = self._files.find(name, self._base)
        if stored.shape != parameter.shape:
            raise FileError(
                f"{name} has the shape {tuple(stored.shape)}, the model needs {tuple(parameter.shape)}",
                where=str(self._files.folder),
            )
        return stored


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class WeightFiles:
    """Reads single tensors out of a folder of safetensors, one file or an index with shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        elif single.is_file():
            from safetensors import safe_open

            with safe_open(single, framework="pt") as opened:
                self._file_of = dict.fromkeys(opened.keys(), single.name)
        else:
            raise FileError(
                "no model.safetensors and no model.safetensors.index.json",
                where=str(folder),
                do="convert the weights to safetensors first",
            )

    def find(self, name: str, base_prefix: str) -> torch.Tensor:
        """The tensor of that name; checkpoints of the bare decoder leave the base prefix out."""
        from safetensors import safe_open

        for known in (name, name.removeprefix(f"{base_prefix}.")):
            if known in self._file_of:
                with safe_open(self.folder / self._file_of[known], framework="pt") as opened:
                    stored: torch.Tensor = opened.get_tensor(known)
                    return stored
        raise FileError(f"the weight {name} is not there", where=str(self.folder))


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Label of each position, [b, s].

    The labels are shifted, not the logits: a slice of the logits would be copied.
    """
    return functional.pad(ids[:, 1:], (0, 1), value=IGNORED)


def causal_lm_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each next token; logits [b, s, v], ids [b, s]."""
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), next_tokens(ids).flatten(), ignore_index=IGNORED
    )


def blocks_of(model: nn.Module) -> Iterator[Any]:
    """The repeated decoder blocks of a transformers model, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def recompute(blocks: list[Any], count: int | None) -> None:
    """Keep only the inputs of the first `count` blocks (null = all) and compute the rest again.

    Non-reentrant, so that a block's input need not require a gradient and hooks keep working.
    """
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    for block in blocks[: len(blocks) if count is None else count]:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def compile_blocks(blocks: list[Any]) -> None:
    """Each block through torch.compile, in place: names in the state dict stay. All blocks of one shape
    share what was compiled; the first step takes about a minute longer, so does the first evaluation."""
    for block in blocks:
        block.compile()

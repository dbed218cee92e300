"""Structured pruning: a folder of transformers whose matrices are smaller, by what matters least.

Heads go by whole groups (those that share keys and values), channels of the MLP and whole blocks; the
same number from every block, so that an ordinary config says it all and every tool loads the result.
What is lost is trained back by an ordinary run that starts from the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.shrink import HEADS_FIXED, Sizes, shrunk_config, sizes_after
from outlay.planner.spec.compress import Shrink
from outlay.planner.spec.families import resolve_model, spec_from_config
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import ModelSource
from outlay.profiles.errors import FileError, OutlayError, UsageError
from outlay.runner.compress.importance import BlockParts, Scores, scores
from outlay.runner.evaluate.load import quiet_packers
from outlay.runner.model import blocks_of, skeleton

_MLP = {
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "opt": (("fc1",), "fc2"),
    "phi": (("mlp.fc1",), "mlp.fc2"),
    "starcoder2": (("mlp.c_fc",), "mlp.c_proj"),
}
_GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_QKV, _OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
              "merges.txt", "tokenizer.model")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """What was made."""

    folder: str
    parameters_before: int
    parameters: int
    """As counted in the file; the planner's count is the same."""
    sizes: Sizes
    kept_layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Indices that stay, in order: of groups and channels by block, and of the blocks."""

    groups: list[torch.Tensor]
    channels: list[torch.Tensor]
    layers: list[int]


def shrink_model(
    folder: Path, out: Path, shrink: Shrink, batches: Iterable[torch.Tensor] = ()
) -> Shrunk:
    """Write the smaller model to `out`, which must not exist. Raises UsageError."""
    quiet_packers()
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if out.exists():
        raise UsageError("there is something already", where=str(out), do="name a new folder")
    spec, config = resolve_model(str(folder))
    if not any(folder.glob("*.safetensors")):
        raise FileError(
            "no safetensors", where=str(folder), do="name a folder with trained weights"
        )
    sizes = sizes_after(spec, shrink)
    shrunk_config(config, spec, sizes, range(sizes.layers))  # refuses before the weights are read
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    parts = parts_of_blocks(model, spec)
    kept = _keep(scores(model, parts, shrink.importance, batches), spec, sizes)
    made = shrunk_config(config, spec, sizes, kept.layers)
    state = _cut(model, spec, kept)
    source = ModelSource(name=spec.name, source=str(folder), parameters=0, config=made)
    smaller: Any = skeleton(source, precision="fp32", attention="sdpa")
    smaller = smaller.to(next(iter(state.values())).dtype)
    smaller.load_state_dict(state, strict=True, assign=True)
    smaller.tie_weights()
    # a skeleton is for training, without a cache of keys and values
    smaller.config.use_cache = getattr(model.config, "use_cache", True)
    smaller.generation_config = model.generation_config
    parameters = sum(p.numel() for p in smaller.parameters())
    counted = parameter_counts(spec_from_config(made, name=spec.name, source=str(out))).total
    if counted != parameters:
        raise OutlayError(
            f"the smaller model has {parameters:,} parameters, its config {counted:,}",
            do="this is a defect of outlay: please report the model's config",
        )
    _write(smaller, folder, out)
    return Shrunk(
        folder=str(out), parameters_before=parameter_counts(spec).total, parameters=parameters,
        sizes=sizes, kept_layers=tuple(kept.layers),
    )  # fmt: skip


def parts_of_blocks(model: Any, spec: ModelSpec) -> list[BlockParts]:
    """The matrices of every block that are cut."""
    ups, down = _MLP.get(spec.family, _GATED)
    found = []
    for block in blocks_of(model):
        heads: dict[str, Any] = {}
        if spec.family not in HEADS_FIXED:
            query, *keys = (block.get_submodule(name) for name in _QKV)
            heads = {"query": query, "keys": tuple(keys), "out": block.get_submodule(_OUT)}
        found.append(
            BlockParts(
                block=block,
                up=tuple(block.get_submodule(name) for name in ups),
                down=block.get_submodule(down),
                groups=spec.blocks[0].attention.kv_heads,
                **heads,
            )
        )
    return found


def _keep(found: Scores, spec: ModelSpec, sizes: Sizes) -> _Kept:
    def best(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.argsort(descending=True, stable=True)[:count].sort().values

    return _Kept(
        groups=[best(values, sizes.kv_heads) for values in found.groups],
        channels=[best(values, sizes.ffn) for values in found.channels],
        layers=[int(i) for i in best(found.blocks, sizes.layers)],
    )


def _cut(model: Any, spec: ModelSpec, kept: _Kept) -> dict[str, torch.Tensor]:
    """The state dict of the smaller model."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [names[id(block)] for block in blocks_of(model)]
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            state[name] = tensor
            continue
        index = blocks.index(block)
        if index not in kept.layers:
            continue
        stem = block.rpartition(".")[0]
        inner = name.removeprefix(f"{block}.")
        new = f"{stem}.{kept.layers.index(index)}.{inner}"
        turned = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        state[new] = _cut_one(inner, tensor, turned, spec, kept, index)
    return state


def _cut_one(
    inner: str, tensor: torch.Tensor, turned: bool, spec: ModelSpec, kept: _Kept, index: int
) -> torch.Tensor:
    module, _, _ = inner.rpartition(".")
    ups, down = _MLP.get(spec.family, _GATED)
    wide, narrow = (1, 0) if turned and tensor.ndim == 2 else (0, 1)
    if module in ups:
        return tensor.index_select(wide, kept.channels[index])
    if module == down and tensor.ndim == 2:
        return tensor.index_select(narrow, kept.channels[index])
    if not kept.groups:
        return tensor
    attention = spec.blocks[0].attention
    if module in _QKV:
        each = attention.head_dim
        if module == _QKV[0]:
            each *= attention.heads // attention.kv_heads
        return tensor.index_select(0, _spread(kept.groups[index], each))
    if module == _OUT and tensor.ndim == 2:
        each = attention.head_dim * attention.heads // attention.kv_heads
        return tensor.index_select(1, _spread(kept.groups[index], each))
    return tensor


def _spread(groups: torch.Tensor, each: int) -> torch.Tensor:
    """Indices of groups → of their rows."""
    return (groups[:, None] * each + torch.arange(each)).flatten()


def _write(model: Any, source: Path, out: Path) -> None:
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        for name in _TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        partial.rename(out)
    except OSError as error:
        raise FileError("cannot be written", where=str(out), why=str(error)) from error

"""Trained weights as a folder that transformers loads: config.json, safetensors, tokenizer. Adapters
are merged into it, and lie in its adapter/ as peft reads them.

Written beside its target and renamed when it is whole, so that a folder of that name is always
complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import FileError
from outlay.runner.adapters import merged, write_factors

SHARD_BYTES = 5 * 10**9
"""Largest safetensors file; what the hub's tools use too."""


def host_copies(tensors: Iterable[torch.Tensor], into: dict[int, torch.Tensor]) -> None:
    """Copy each tensor once to host memory, under the id of the original: ties stay ties."""
    for tensor in tensors:
        if id(tensor) not in into:
            into[id(tensor)] = tensor.detach().to("cpu", copy=True)


def untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the second name of a tied weight; loading ties it again from the config."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            kept[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    return kept


def export_safetensors(
    state: dict[str, torch.Tensor],
    plan: Plan,
    folder: Path,
    tokenizer_path: Path | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the folder, on one rank only; replaces an older export of that name.

    `tokenizer_path`: a tokenizer.json, or a folder that holds one.
    """
    from safetensors import SafetensorError

    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(untied(merged(state, plan)), partial, shard_bytes)
        write_factors(state, plan, partial / "adapter")
        config = _export_config(plan, next(iter(state.values())).dtype)
        config.save_pretrained(partial)
        if tokenizer_path is not None:
            _write_tokenizer(tokenizer_path, config, plan.job.seq_len, partial)
        for path in partial.rglob("*"):
            if path.is_file():
                sync_file(path)
        _replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise FileError(
            "the export cannot be written", where=str(folder), why=str(error)
        ) from error
    return folder


def _write_weights(state: dict[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _export_config(plan: Plan, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from outlay.runner.model import model_config

    config = model_config(plan.model)
    config.use_cache = plan.model.config.get("use_cache", True)
    config.dtype = dtype
    architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [architecture.__name__]
    return config


def _write_tokenizer(path: Path, config: Any, seq_len: int, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    load: Any = PreTrainedTokenizerFast
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileError("no tokenizer.json", where=str(path))
    settings = file.with_name("tokenizer_config.json")
    if settings.is_file():
        shutil.copyfile(file, folder / "tokenizer.json")
        shutil.copyfile(settings, folder / "tokenizer_config.json")
        return
    made = load(tokenizer_file=str(file))
    special = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        number = getattr(config, f"{key}_id", None)
        token = made.convert_ids_to_tokens(number) if isinstance(number, int) else None
        if token is not None:
            special[key] = token
    limit = getattr(config, "max_position_embeddings", None) or seq_len
    whole = load(tokenizer_file=str(file), model_max_length=limit, **special)
    whole.save_pretrained(folder)


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power failure."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(path: Path) -> None:
    """Make names in a folder survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

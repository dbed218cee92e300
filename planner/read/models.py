"""A model as configurations name it → a preset or a config.json, and how sure that is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from outlay.planner.read.document import read_document
from outlay.planner.read.meaning import FIXED, MODEL
from outlay.planner.spec.families import preset_names, resolve_model, spec_from_config
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import OutlayError

_TUNED = {"instruct", "chat", "base", "it", "hf", "pt", "sft", "bf16", "fp16", "2407", "2501"}
"""Words that a fine-tuned copy's name adds; the shape stays."""
_VERSION = re.compile(r"v\d+(\.\d+)*")
_CONTEXT = re.compile(r"\d+k")
_FIRST = ("meta-",)


def preset_of(reference: str) -> str | None:
    """`meta-llama/Meta-Llama-3.1-8B-Instruct` → `llama-3.1-8b`; null where the name says another model."""
    name = reference.rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    for first in _FIRST:
        name = name.removeprefix(first)
    known = preset_names()
    parts = name.split("-")
    for length in range(len(parts), 0, -1):
        stem, rest = "-".join(parts[:length]), parts[length:]
        if any(
            r not in _TUNED and not _VERSION.fullmatch(r) and not _CONTEXT.fullmatch(r)
            for r in rest
        ):
            continue
        versions = [r for r in rest if _VERSION.fullmatch(r)]
        candidates = [f"{stem}-{v}" for v in versions] + [stem]
        for candidate in candidates:
            if candidate in known:
                return candidate
    return None


def _of_program(path: Path) -> tuple[ModelSpec | None, dict[str, Any], str]:
    """The model of a program that `outlay emit` wrote: its configuration is inside model.json."""
    try:
        document = read_document(path)
        config = document.get("config", default={})
        if not isinstance(config, dict):
            return None, {}, f"{document.where(('config',))} is no mapping"
        name = Path(str(document.get("weights") or config.get("model_type"))).name
        spec = spec_from_config(config, name=name, source=str(path))
    except OutlayError as error:
        return None, {}, f"{path}: {error.what}"
    return spec, config, f"the configuration in {path}"


def model_of(reference: str, beside: Path) -> tuple[ModelSpec | None, dict[str, Any], str]:
    """(sizes or null, its config, how it was found or why not)."""
    for path in (beside / reference, Path(reference).expanduser()):
        if path.name == FIXED[MODEL] and path.is_file():
            return _of_program(path)
        config = path / "config.json" if path.is_dir() else path
        if config.is_file() and config.suffix == ".json":
            try:
                spec, found = resolve_model(str(config))
            except OutlayError as error:
                return None, {}, f"{config}: {error.what}"
            return spec, found, f"its config.json ({config})"
    if reference in preset_names():
        spec, found = resolve_model(reference)
        return spec, found, "the preset of that name"
    preset = preset_of(reference)
    if preset is None:
        return None, {}, f"{reference} is no folder here and no preset's name"
    spec, found = resolve_model(preset)
    return spec, found, f"the preset {preset}, taken by its name"

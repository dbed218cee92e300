"""`--model`: the name of a preset, or a path to a transformers config → ModelSpec."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from outlay.planner.spec.families.registry import spec_from_config
from outlay.planner.spec.files import read_mapping
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError, UnknownName


@cache
def preset_names() -> tuple[str, ...]:
    """The names in profiles/models, sorted."""
    folder = files("outlay.profiles") / "models"
    return tuple(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".json")))


def preset_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transformers config of a preset, and where it comes from (`_outlay`)."""
    if name not in preset_names():
        raise UnknownName("model preset", name, preset_names())
    config = read_mapping(Path(str(files("outlay.profiles") / "models" / f"{name}.json")))
    return config, config.pop("_outlay")


def resolve_model(reference: str) -> tuple[ModelSpec, dict[str, Any]]:
    """A preset, a folder with config.json, or a config.json → the sizes and the config itself.

    A preset wins over a folder of the same name; write `./name` for the folder.
    """
    if reference in preset_names():
        config, _ = preset_config(reference)
        return spec_from_config(config, name=reference, source=f"preset {reference}"), config
    path = Path(reference).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and path.suffix != ".json":
        raise _not_a_file(reference)
    config = read_mapping(path)
    config.pop("_outlay", None)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return spec_from_config(config, name=name, source=str(path)), config


def _not_a_file(reference: str) -> FileError | UnknownName:
    """Say what would work for something that is neither a preset nor a file."""
    near = difflib.get_close_matches(reference.split("/")[-1].lower(), preset_names(), n=4)
    presets = f"; presets near that name: {', '.join(near)}" if near else ""
    if ":" in reference:
        return FileError(
            f"{reference!r} looks like package.module:factory",
            why="tracing a module is not available yet",
            do=f"pass a preset or the path of a transformers config.json{presets}",
        )
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        return FileError("no such file or folder", where=reference)
    if "/" in reference:
        return FileError(
            f"{reference!r} is no file; as a hub id it would have to be downloaded",
            why="outlay downloads nothing",
            do=f"download its config.json and pass the path{presets}",
        )
    return UnknownName("model", reference, preset_names())

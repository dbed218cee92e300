"""An exported folder as a model, whatever it is packed in; what must be installed for it is said."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outlay.profiles.errors import FileError, MissingExtra

PACKERS = {"torchao": "torchao", "compressed-tensors": "compressed_tensors"}
"""transformers' quant_method → the package that unpacks it."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of transformers: what its config.json says, and the bytes that lie there."""

    path: Path
    config: dict[str, Any]

    @property
    def packed(self) -> str | None:
        """transformers' quant_method; null = plain tensors."""
        said = self.config.get("quantization_config")
        return said.get("quant_method") if said else None

    @property
    def weights_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.path.glob("*.safetensors"))

    @property
    def folder_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())


def read_folder(path: Path) -> Folder:
    """Refuses what is no folder of transformers with safetensors."""
    config = path / "config.json"
    if not config.is_file():
        raise FileError("no config.json: this is no folder of transformers", where=str(path))
    if not any(path.glob("*.safetensors")):
        raise FileError("no safetensors in it", where=str(path))
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError("not valid JSON", where=str(config), why=str(error)) from None
    return Folder(path=path, config=value)


def quiet_packers() -> None:
    """torchao's import logs deprecations of its own on torch 2.13 and kernels that this machine has no use
    for: nothing to act on here."""
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Packers draw bars on stderr and DeepSpeed, which transformers imports, logs to stdout: stdout is for data."""
    quiet_packers()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def require_packer(method: str) -> None:
    """Say how to install what is absent."""
    package = PACKERS.get(method)
    if package is None:
        raise FileError(f"weights packed by {method} are not read here", do="pass a dense folder")
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(method, "compress")


def load_model(folder: Folder, *, device: torch.device) -> Any:
    """The model in evaluation mode, in the precision that it is stored in."""
    quiet_packers()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if folder.packed is not None:
        require_packer(folder.packed)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder.path, dtype="auto", local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = str(error).strip().splitlines()
        raise FileError(
            "transformers does not load it", where=str(folder.path), why=why[0] if why else ""
        ) from error
    model.eval()
    return model.to(device)


def here() -> torch.device:
    """Where models are measured: the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Weights quantized and written as transformers loads them again.

int8 goes through torchao's own tensors and transformers' `save_pretrained`. int4 does not: of torchao
0.18's 4-bit tensors the one that a CPU computes with keeps a byte for each weight, and the packed ones
need a GPU's kernels to be made. So int4, and a mixture of widths, is quantized by torchao's primitives (the same
numbers as its quantization-aware training) and written in the pack-quantized format of
compressed-tensors, which transformers (and vLLM) load. There transformers unpacks the weights at the first forward
pass: small on disk, not faster.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from outlay.planner.spec.packing import Packing
from outlay.runner.evaluate.load import Folder, quiet_packers, require_packer

Integers = tuple[torch.Tensor, torch.Tensor]


def quantized(weight: torch.Tensor, packing: Packing) -> Integers:
    """(int8 values, scales [outputs, groups]) of a matrix, as torchao chooses them; scales in the weights'
    precision, as compressed-tensors keeps and multiplies them."""
    require_packer("torchao")
    quiet_packers()
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType
    from torchao.quantization.granularity import PerRow

    if packing.bits == 8:
        made: Any = Int8Tensor.from_hp(weight, granularity=PerRow())
        return made.qdata, made.scale.reshape(weight.shape[0], 1).to(weight.dtype)
    made = IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, packing.group), torch.int4, mapping_type=MappingType.SYMMETRIC
    )
    return made.qdata, made.scale.to(weight.dtype)


def dequantized(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The matrix that a packed one stands for."""
    values, scales = quantized(weight, packing)
    groups = values.reshape(weight.shape[0], scales.shape[1], -1).to(scales.dtype)
    return (groups * scales[..., None]).reshape(weight.shape)


def write_int8(source: Folder, out: Path, packing: Packing) -> None:
    """By transformers and torchao: weights alone, or with inputs quantized as they come."""
    require_packer("torchao")
    quiet_packers()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # set_inductor_config would change torch.compile's settings of this process
        kind: Any = (
            Int8DynamicActivationInt8WeightConfig if packing.dynamic else Int8WeightOnlyConfig
        )
        chosen: Any = TorchAoConfig(kind(set_inductor_config=False))
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype="auto", quantization_config=chosen, local_files_only=True
        )
        model.save_pretrained(out)


def write_packed(
    source: Folder, out: Path, packings: Mapping[str, Packing], dense: list[str]
) -> None:
    """`packings`: module → how; `dense`: the other linear modules, which stay as they are."""
    require_packer("compressed-tensors")
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    files = sorted(source.path.glob("*.safetensors"))
    for file in files:
        made = _packed_file(file, packings)
        _save(made, out / file.name)
        weight_map |= dict.fromkeys(made, file.name)
        total += sum(t.numel() * t.element_size() for t in made.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    said = {**source.config, "quantization_config": _quantization_config(packings, dense)}
    (out / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _packed_file(path: Path, packings: Mapping[str, Packing]) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors import safe_open

    made: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - a safetensors file, no mapping
            tensor: torch.Tensor = opened.get_tensor(name)
            module = name.removesuffix(".weight")
            packing = packings.get(module) if module != name else None
            if packing is None:
                made[name] = tensor
                continue
            values, scales = quantized(tensor, packing)
            made[f"{module}.weight_packed"] = pack_to_int32(values, packing.bits).contiguous()
            made[f"{module}.weight_scale"] = scales.contiguous()
            made[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
    return made


def _quantization_config(packings: Mapping[str, Packing], dense: list[str]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for packing in sorted(set(packings.values()), key=lambda p: p.name):
        weights = {
            "num_bits": packing.bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "channel" if packing.group is None else "group",
            "group_size": packing.group,
        }  # fmt: skip
        groups[packing.name.replace(":", "-")] = {
            "targets": [name for name, p in packings.items() if p == packing],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def copy_beside(source: Path, out: Path) -> None:
    """Tokenizer and generation settings: all small files but the weights, the config and cards."""
    for path in source.iterdir():
        made_anew = path.suffix == ".safetensors" or path.name in (
            "config.json", "model.safetensors.index.json", "README.md", "outlay.json"
        )  # fmt: skip
        if path.is_file() and not made_anew and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)

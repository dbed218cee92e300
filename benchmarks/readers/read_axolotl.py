"""Runs in axolotl's environment: its own validation over emitted files, and over broken ones."""

import json
import os
import sys
from pathlib import Path

import yaml
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities

GPU = {
    "bf16": True,
    "fp8": False,
    "tf32": True,
    "n_gpu": 8,
    "n_node": 1,
    "compute_capability": "sm_90",
}
KNOWN = set()
for name, field in AxolotlConfigWCapabilities.model_fields.items():
    KNOWN |= {name, field.alias} - {None}


def read(config):
    """What axolotl does at its start; and, as it passes unknown keys over, a look for those."""
    unknown = set(config) - KNOWN
    if unknown:
        raise ValueError(f"keys that axolotl does not know: {sorted(unknown)}")
    validate_config(
        DictDefault(config), capabilities=dict(GPU), env_capabilities={"torch_version": "2.13.0"}
    )


def main():
    refused, count = [], 0
    for folder in sorted(Path(sys.argv[1]).glob("*/out")):
        os.chdir(folder)
        try:
            config = yaml.safe_load(Path("axolotl.yaml").read_text())
            read(config)
            assert json.loads(Path(config["deepspeed"]).read_text())["zero_optimization"]
            count += 1
        except Exception as error:
            refused.append([str(folder), f"{type(error).__name__}: {str(error)[:400]}"])
    missed = []
    controls = {
        "typo": {"micro_batch_sizes": 2},
        "type": {"sequence_len": "long"},
        "fsdp": {"fsdp": ["full_shard"]},
        "adapter": {"adapter": "qlora", "load_in_8bit": True, "load_in_4bit": False},
    }
    for name, change in controls.items():
        try:
            read(yaml.safe_load(Path("axolotl.yaml").read_text()) | change)
            missed.append(name)
        except Exception:
            continue
    result = {
        "read": count,
        "refused": refused,
        "controls": len(controls),
        "controls_missed": missed,
    }
    print("RESULT " + json.dumps(result))


main()

"""Runs in LLaMA-Factory's environment: its own parser over emitted files, and over broken ones.

It builds transformers' TrainingArguments, which look at this machine: so `use_cpu` is added, and tf32,
which they allow only beside a GPU that has it, is left out.
"""

import json
import os
import sys
import types
from importlib import util
from pathlib import Path

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": "29655", "DS_ACCELERATOR": "cpu", "LLAMAFACTORY_VERBOSITY": "ERROR"}  # fmt: skip

import deepspeed

# its package imports what reads sound and pictures, which is not installed here
package = types.ModuleType("llamafactory.data")
package.__path__ = [str(Path(util.find_spec("llamafactory").origin).parent / "data")]
sys.modules["llamafactory.data"] = package

from llamafactory.data.parser import get_dataset_list  # noqa: E402
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.hparams import parser as module  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# bitsandbytes and the like are not installed here: only the arguments are read
module._check_extra_dependencies = lambda *_: None


def as_words(config):
    """The same on a command line, where types and choices are checked too."""
    for key, value in config.items():
        yield f"--{key}"
        yield json.dumps(value) if isinstance(value, dict | bool) else str(value)


def read(config):
    config = {k: v for k, v in config.items() if k != "tf32"} | {"use_cpu": True}
    try:
        module._parse_train_args(list(as_words(config)))
    except SystemExit:
        raise ValueError("a choice or a type that its command line refuses") from None
    model, data, training, tuning, _ = get_train_args(config)
    assert training.per_device_train_batch_size == config["per_device_train_batch_size"]
    assert training.gradient_accumulation_steps == config["gradient_accumulation_steps"]
    assert training.learning_rate == config["learning_rate"]
    # where it packs it cuts one token shorter, and pads the batch up to a multiple of 8 again
    assert data.cutoff_len + data.packing == config["cutoff_len"]
    assert data.packing == config["packing"]
    assert model.disable_gradient_checkpointing == config["disable_gradient_checkpointing"]
    assert tuning.finetuning_type == config["finetuning_type"]
    # the JSON with every `auto` filled in, as the Trainer will give it to DeepSpeed
    training.hf_deepspeed_config.trainer_config_process(training)
    training.hf_deepspeed_config.trainer_config_finalize(training, None, training.max_steps)
    (dataset,) = get_dataset_list(data.dataset, data.dataset_dir)
    assert dataset.prompt == "text" and Path(dataset.dataset_name).is_file()


def main():
    refused, count = [], 0
    for folder in sorted(Path(sys.argv[1]).glob("*/out")):
        os.chdir(folder)
        try:
            read(OmegaConf.to_container(OmegaConf.load("llamafactory.yaml")))
            count += 1
        except Exception as error:
            refused.append([str(folder), f"{type(error).__name__}: {str(error)[:400]}"])
    missed = []
    controls = {
        "typo": {"cutoff_length": 1},
        "type": {"cutoff_len": "long"},
        "stage": {"stage": "pretraining"},
        "dataset": {"dataset": "other"},
        "quantized": {"quantization_bit": 4, "finetuning_type": "full"},
        "disagree": {"deepspeed": "other.json"},
    }
    other = json.loads(Path("ds_config.json").read_text())
    other["gradient_accumulation_steps"] = 99
    Path("other.json").write_text(json.dumps(other))
    for name, change in controls.items():
        try:
            read(OmegaConf.to_container(OmegaConf.load("llamafactory.yaml")) | change)
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

"""A launch command: how many processes, and what the script's arguments say."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from outlay.planner.read.companion import beside
from outlay.planner.read.deepspeed import values_of, whole
from outlay.planner.read.document import Document
from outlay.planner.read.kinds import kind_of
from outlay.planner.read.launch_accelerate import Launched, launched
from outlay.planner.read.llamafactory import factory_arguments
from outlay.planner.read.meaning import ARGUMENTS, FIXED, MAIN, Meaning, Said, merged
from outlay.planner.read.program import arguments_of
from outlay.planner.read.trainer import (
    ATTENTION,
    Arguments,
    attach_deepspeed,
    common_arguments,
    lora_of,
    with_section,
)
from outlay.profiles.errors import FileError

_AXOLOTL = "axolotl.cli.train"
_TRAINER = ("per_device_train_batch_size", "output_dir", "num_train_epochs", "model_name_or_path")


def _world(text: Document, say: Any) -> None:
    """Processes that the launcher starts, as its flags say it."""
    launcher, launch = text.get("launcher"), text.get("launch", default={})
    if launcher == "accelerate":
        if (count := whole(launch.get("num_processes"))) is not None:
            say("world", count, "launch", "num_processes")
        return
    per_node_key = "nproc_per_node" if launcher == "torchrun" else "num_gpus"
    given = launch.get("nnodes" if launcher == "torchrun" else "num_nodes")
    nodes = 1 if given is None else whole(given)
    per_node = whole(launch.get(per_node_key))
    include = launch.get("include")
    if per_node is None and isinstance(include, str):
        slots = [host.partition(":")[2] for host in include.split("@")]
        if all(re.fullmatch(r"[\d,]+", s) for s in slots):
            say("world", sum(len(s.split(",")) for s in slots), "launch", "include")
        return
    visible = text.get("env", "CUDA_VISIBLE_DEVICES")
    if per_node is None and launcher == "deepspeed" and visible is not None:
        listed = str(visible)
        if re.fullmatch(r"\d+(,\d+)*", listed):
            say("world", len(listed.split(",")), "env", "CUDA_VISIBLE_DEVICES")
        return
    if per_node is not None and nodes is not None:
        say("world", per_node * nodes, "launch", per_node_key)
        say("nodes", nodes, "launch", "num_nodes")


_LENGTHS = (
    "max_seq_length", "max_seq_len", "model_max_length", "block_size", "cutoff_len", "max_length",
)  # fmt: skip
_ADAPTERS = ("lora_r", "lora_rank", "lora_enable", "use_peft")
_SIZES = (
    ("tp", ("tensor_model_parallel_size", "tensor_parallel_size")),
    ("pp", ("pipeline_model_parallel_size", "pipe_parallel_size", "pp_size")),
    ("micro_batch", ("micro_batch_size",)), ("global_batch", ("global_batch_size",)),
)  # fmt: skip
"""Megatron's and its descendants' names on the script's command line."""


def _trainer_arguments(a: Arguments) -> None:
    """What scripts that use transformers' Trainer share, by the names of their arguments."""
    common_arguments(a)
    a.take("model", ("model_name_or_path",), None)
    a.take_whole("seq_len", _LENGTHS, None)
    a.take_word("attention", "attn_implementation", ATTENTION, "sdpa")
    if any(a.get(key) is not None for key in _ADAPTERS):
        rank_key = "lora_r" if "lora_r" in a.values else "lora_rank"
        lora_of(a, method_key=None, rank_key=rank_key, rank_default=8)


def _launch_values(text: Document, values: dict[str, Said], arguments: dict[str, Any]) -> None:
    """Adds what the launcher and the script's parallel sizes say."""

    def say(name: str, value: Any, *path: str) -> None:
        values[name] = Said(value=value, where=text.where(path), place=(MAIN, path))

    _world(text, say)
    for name, keys in _SIZES:
        for one in keys:
            if name not in values and (size := whole(arguments.get(one))) is not None:
                say(name, size, "args", one)


def read_launch(text: Document) -> Meaning:
    """A shell file that starts a training; what its script does with its arguments is taken from their names."""
    script = str(text.get("script", default=""))
    arguments: dict[str, Any] = text.get("args", default={})
    framework = text.get("launcher") in ("llamafactory-cli", "axolotl")
    if framework and script.endswith((".yaml", ".yml", ".json")):
        return _through(text, script)
    if script == _AXOLOTL and isinstance(text.get("settings"), str):
        return _through(text, text.get("settings"))
    if (behind_script := _settings(text)) is not None:
        return behind_script
    a = Arguments(text, arguments, ("args",))
    documents = {MAIN: text}
    own = arguments.get("deepspeed_config")
    key = "deepspeed_config" if isinstance(own, str) else "deepspeed"
    # A bare --deepspeed is the switch of DeepSpeed's own arguments; the Trainer's names a file.
    uses_trainer = (
        any(name in arguments for name in _TRAINER) and arguments.get("deepspeed") is not True
    )
    if "finetuning_type" in arguments or "cutoff_len" in arguments:
        factory_arguments(a)
    elif uses_trainer:
        _trainer_arguments(a)
    section, missing = attach_deepspeed(arguments.get(key), text, ("args", key), documents)
    behind = _behind(text, script)
    if section is None and missing is None:
        section, missing = behind.section, behind.missing
        documents |= behind.documents
    values = merged(behind.values, with_section(a.found, section, documents))
    _launch_values(text, values, arguments)
    if section is not None and section.document is not None and not uses_trainer:
        document = section.document
        inner = values_of(section.config, document, section.prefix, documents[document])
        values = inner | values
    return Meaning(
        framework="launch", documents=documents, section=section, values=values,
        trainer=uses_trainer or text.get("launcher") == "accelerate" or ARGUMENTS in documents,
        missing_file=missing,
        flags={"arguments": arguments, "env": text.get("env", default={}),
               "launch": text.get("launch", default={}), "launcher": text.get("launcher")},
        notes=behind.notes,
    )  # fmt: skip


def _behind(text: Document, script: str) -> Launched:
    """What stands behind the command besides its arguments: Accelerate's file, or what the program reads."""
    if text.get("launcher") == "accelerate":
        return launched(text)
    meaning = arguments_of(script, text) if script.endswith(".py") else None
    if meaning is None:
        return Launched()
    name = FIXED[ARGUMENTS]
    return Launched(
        section=meaning.section, values=meaning.values, documents=meaning.documents,
        missing=meaning.missing_file,
        notes=(f"{script} reads {name}; what is wrong with that file is found by checking it",),
    )  # fmt: skip


def _through(text: Document, configuration: str) -> Meaning:
    """`llamafactory-cli train x.yaml`: the YAML is the configuration."""
    from outlay.planner.read.reader import read_meaning

    found = beside(configuration, text)
    if found is None:
        raise FileError(
            "the configuration that the command names is not there", where=text.where(("script",)),
            why=configuration, do="run the check from the folder that the command is run from",
        )  # fmt: skip
    meaning = read_meaning(found)
    return replace(meaning, values=meaning.values | _ranks(text))


def _settings(text: Document) -> Meaning | None:
    """`torchrun train.py x.yaml`: the file, where it is here and a format that is known; else the script decides."""
    name = text.get("settings")
    if not isinstance(name, str) or (found := beside(name, text)) is None:
        return None
    if text.get("launcher") == "accelerate" and launched(text).section is not None:
        return None  # there the sharding is Accelerate's, which that file does not say
    try:
        kind = kind_of(found)
    except FileError:
        return None
    return _through(text, name) if kind in ("axolotl", "llamafactory", "trainer") else None


def _ranks(text: Document) -> dict[str, Said]:
    """Processes as the command says them; without a place, for the configuration is another file."""
    found: dict[str, Said] = {}

    def say(name: str, value: Any, *path: str) -> None:
        found[name] = Said(value=value, where=text.where(path))

    _world(text, say)
    words = (
        (("env", "NPROC_PER_NODE"), text.get("env", "NNODES", default=1)),
        (("args", "nproc_per_node"), text.get("args", "nnodes", default=1)),
        (("args", "num_processes"), 1),
    )
    for path, given in words:
        count, nodes = whole(text.get(*path)), whole(given)
        if "world" not in found and count is not None and nodes is not None:
            say("world", count * nodes, *path)
            say("nodes", nodes, *path)
    return found

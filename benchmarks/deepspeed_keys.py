"""The configuration keys that each DeepSpeed version knows, from its own source distribution.

    pip download --no-deps --no-binary :all: --no-build-isolation -d SDISTS deepspeed==VERSION
    python -m benchmarks.deepspeed_keys SDISTS            (writes profiles/deepspeed_keys.yaml)

Keys are read from the syntax tree, so nothing of an old version has to be importable. A top-level key
counts where a function reads it from the configuration (`param_dict[KEY]`, `param_dict.get(KEY)`,
`KEY in param_dict`, `get_scalar_param(param_dict, KEY, …)`), with the constants of that version; a key
of `zero_optimization` and of its offload sections where it is a field, or a field's alias, of the
class that parses it. Some functions read a section under the same name: so the top level is what the
version can read, or a little more.

`parsed`: of configurations that `outlay emit` writes, drawn at random, how many that version's own
parser took, at its world size, run from the source distribution with the torch that is installed
here. Null: that version's parser did not start beside it, or was not run; why is written. What the file
has of the same archive is kept: so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).parent.parent / "profiles/deepspeed_keys.yaml"
READERS = (
    "runtime/config.py", "runtime/precision_config.py", "runtime/bf16_config.py", "monitor/config.py",
    "comm/config.py", "profiling/config.py", "runtime/activation_checkpointing/config.py",
    "runtime/swap_tensor/aio_config.py", "runtime/tensor_parallel/config.py", "runtime/zero/config.py",
    "runtime/compiler.py", "compile/config.py", "runtime/data_pipeline/config.py",
    "runtime/eigenvalue.py", "nebula/config.py", "compression/config.py", "elasticity/elasticity.py",
    "autotuning/config.py", "runtime/torch_autocast.py",
)  # fmt: skip
CLASSES = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
}

SECTIONS = ("top", *CLASSES, "optimizer_types")


def trees(folder: Path, pattern: str) -> Iterator[ast.Module]:
    for path in sorted(folder.glob(pattern)):
        yield ast.parse(path.read_text(encoding="utf-8"))


def constants(folder: Path) -> dict[str, str]:
    """NAME → text, of every module that is called constants or config."""
    found: dict[str, str] = {}
    for pattern in ("**/constants.py", "**/*config*.py", "runtime/torch_autocast.py"):
        for tree in trees(folder, pattern):
            for node in tree.body:
                if (
                    isinstance(node, ast.Assign)
                    and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)
                ):
                    for target in node.targets:
                        if isinstance(target, ast.Name):
                            found[target.id] = node.value.value
    return found


def _key_nodes(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that name a key which this node reads from `param_dict`."""

    def is_config(value: ast.AST) -> bool:
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            value = value.func.value  # param_dict.keys()
        name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
        return name in ("param_dict", "ds_config", "config_dict", "_param_dict", "config")

    if isinstance(node, ast.Subscript) and is_config(node.value):
        yield node.slice
    elif isinstance(node, ast.Compare) and is_config(node.comparators[0]):
        yield node.left
    elif isinstance(node, ast.Call) and node.args:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            if is_config(node.func.value):
                yield node.args[0]
        elif len(node.args) > 1 and is_config(node.args[0]) and "open" not in ast.dump(node.func):
            yield node.args[1]


def _looped(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """Loop variable → what it loops over, where that is written out: `for key in [A, B]`."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.For | ast.comprehension)
            and isinstance(node.target, ast.Name)
            and isinstance(node.iter, ast.List | ast.Tuple)
        ):
            found.setdefault(node.target.id, []).extend(node.iter.elts)
    return found


def top_level(folder: Path) -> set[str]:
    names = constants(folder)
    found = set()
    for reader in READERS:
        for tree in trees(folder, reader):
            loops = _looped(tree)
            for node in ast.walk(tree):
                for first in _key_nodes(node):
                    for key in loops.get(getattr(first, "id", ""), [first]):
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            found.add(key.value)
                        elif isinstance(key, ast.Name) and key.id in names:
                            found.add(names[key.id])
    return found


def fields(folder: Path, module: str, name: str) -> set[str]:
    """The fields of a class with their aliases, and what its validators accept besides."""
    found: set[str] = set()
    for tree in trees(folder, module):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        found.add(part.target.id)
                        for call in ast.walk(part):
                            if isinstance(call, ast.keyword) and call.arg == "alias":
                                assert isinstance(call.value, ast.Constant)
                                found.add(str(call.value.value))
    return found


def optimizer_types(folder: Path) -> set[str]:
    """The optimizers that are DeepSpeed's own; other names it looks for in torch.optim."""
    names = constants(folder)
    for tree in trees(folder, "runtime/config.py"):
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
                target = node.targets[0]
                if isinstance(target, ast.Name) and target.id == "DEEPSPEED_OPTIMIZERS":
                    return {names[e.id] for e in node.value.elts if isinstance(e, ast.Name)}
    raise SystemExit(f"{folder}: no DEEPSPEED_OPTIMIZERS")


def keys_of(folder: Path) -> dict[str, set[str]]:
    """Section → the keys that a `deepspeed/` folder reads."""
    sections = {"top": top_level(folder), "optimizer_types": optimizer_types(folder)}
    for section, (module, name) in CLASSES.items():
        sections[section] = fields(folder, module, name)
        if not sections[section]:
            raise SystemExit(f"{folder}: no {name} in {module}")
    return sections


def sample(count: int) -> list[dict[str, Any]]:
    """Configurations that `outlay emit deepspeed` writes, with the world that each is for."""
    from benchmarks.emit_draw import drawn_configs

    return [{"config": config, "dp": strategy.dp} for strategy, config in drawn_configs(count)]


PARSE = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import deepspeed
assert deepspeed.__file__.startswith(sys.argv[1]), deepspeed.__file__
from deepspeed.runtime import config as module
module.dist.get_rank = lambda: 0
class Ranks:
    def __init__(self, dp): self.dp = dp
    def get_data_parallel_world_size(self): return self.dp
said, took = "", 0
for case in json.load(open(sys.argv[2])):
    try:
        parsed = module.DeepSpeedConfig(case["config"], mpu=Ranks(case["dp"]))
        assert parsed.train_batch_size == case["config"]["train_batch_size"]
        took += 1
    except Exception as error:
        said = said or f"{type(error).__name__}: {str(error)[:300]}"
print("RESULT " + json.dumps({"took": took, "said": said}))
"""


def parsed_by(folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the cases that version's parser takes, in a process of its own."""
    said = ""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(cases, file)
        file.flush()
        for accelerator in ("cpu", "cuda"):  # old ones start as cpu only beside Intel's extension
            done = subprocess.run(
                [sys.executable, "-c", PARSE, str(folder), file.name],
                capture_output=True, text=True, timeout=300, check=False,
                env=os.environ | {"DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            for line in done.stdout.splitlines():
                if line.startswith("RESULT "):
                    result = json.loads(line.removeprefix("RESULT "))
                    return {
                        "parsed": result["took"],
                        "of": len(cases),
                        "why": result["said"] or None,
                    }
            said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    # without the paths of the machine that it was tried on
    return {"parsed": None, "of": len(cases), "why": re.sub(r" ?\(?/[^\s)]+\)?", "", said)[:160]}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split("."))


def intervals(by_version: dict[str, dict[str, set[str]]], section: str) -> dict[str, list[str]]:
    """Key → [first, last] of the versions that know it; each version where there are gaps."""
    versions = sorted(by_version, key=numbers)
    out = {}
    for key in sorted(set().union(*(by_version[v][section] for v in versions))):
        having = [v for v in versions if key in by_version[v][section]]
        span = versions[versions.index(having[0]) : versions.index(having[-1]) + 1]
        out[key] = [having[0], having[-1]] if span == having else having
    return out


def written(
    out: Path, by_version: dict[str, dict[str, set[str]]], versions: dict[str, Any]
) -> None:
    """The whole file, as far as it is known; it is written again after each version."""
    import torch

    value = {
        "schema": "outlay/deepspeed-keys@1",
        "source": "source distributions of DeepSpeed on PyPI, their sha256 below",
        "made_by": "python -m benchmarks.deepspeed_keys",
        "date": datetime.now(UTC).date().isoformat(),
        "parsed_with": f"torch {torch.__version__}, python {sys.version.split()[0]}",
        "versions": {v: versions[v] for v in sorted(versions, key=numbers)},
        "keys": {section: intervals(by_version, section) for section in SECTIONS},
    }
    text = yaml.safe_dump(value, sort_keys=False, width=110, default_flow_style=None)
    out.write_text("# Generated by `python -m benchmarks.deepspeed_keys`; do not edit.\n" + text)


NOT_RUN = "its parser was not run here"


def main() -> None:
    parser = argparse.ArgumentParser(description="Keys of each DeepSpeed version, from its source.")
    parser.add_argument("sdists", type=Path, nargs="+", help="folders with deepspeed-*.tar.gz")
    parser.add_argument("--count", type=int, default=200, help="configurations to parse with each")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    archives = {
        path.name.removeprefix("deepspeed-").removesuffix(".tar.gz"): path
        for folder in asked.sdists
        for path in folder.glob("deepspeed-*.tar.gz")
    }
    before = yaml.safe_load(asked.out.read_text())["versions"] if asked.out.is_file() else {}
    by_version, versions = {}, {}
    with tempfile.TemporaryDirectory() as work:
        for version, path in archives.items():
            with tarfile.open(path) as archive:
                archive.extractall(work, filter="data")
            by_version[version] = keys_of(Path(work) / f"deepspeed-{version}/deepspeed")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            old = before.get(version, {})
            known = (
                old if old.get("sha256") == digest else {"parsed": None, "of": 0, "why": NOT_RUN}
            )
            versions[version] = {**known, "sha256": digest}
        written(asked.out, by_version, versions)
        for version in sorted(archives, key=numbers, reverse=True):
            if versions[version]["why"] != NOT_RUN:
                continue
            top = by_version[version]["top"]
            cases = [c for c in sample(asked.count) if not set(c["config"]) - top]
            versions[version] |= parsed_by(Path(work) / f"deepspeed-{version}", cases)
            print(version, versions[version], flush=True)
            written(asked.out, by_version, versions)


if __name__ == "__main__":
    main()

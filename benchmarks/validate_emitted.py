"""What `outlay emit` writes, read by the parsers of the projects that it is for.

    python -m benchmarks.validate_emitted [TARGET…] [--count 60] [--venvs FOLDER] [--crd FILE]

Each project gets an environment of its own (they pin other versions than ours), made once by pip and
kept in --venvs. For random plans the command is called as a person would, and the project reads its
files; then each of its controls, a file broken on purpose, has to be refused, or the check proves
nothing. kubernetes: the types of kubeflow-trainer-api, and with --crd the schema of the
CustomResourceDefinition (manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml of kubeflow/trainer)
with unknown fields refused. shell, slurm: `sh -n`, `bash -n`, and `sbatch --test-only` where it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READERS = Path(__file__).parent / "readers"
TEXT = "the text that a person trains on\n" * 50


@dataclass(frozen=True, kw_only=True)
class Project:
    """One project: what its parser needs, and how our command is called for it."""

    alone: tuple[str, ...]
    """Installed without their dependencies."""
    needs: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    adapters: bool = False


PROJECTS = {
    "axolotl": Project(
        alone=("axolotl==0.19.0",),
        needs=("torch==2.13.0", "transformers==5.16.1", "accelerate==1.13.0", "pydantic==2.12.5",
               "annotated_types", "addict", "datasets==4.8.4", "peft==0.20.0", "psutil", "Pillow"),
        arguments=("--base-model", "org/model", "--data", "text.txt"), adapters=True,
    ),
    "llamafactory": Project(
        alone=("llamafactory==0.9.5",),
        needs=("torch==2.13.0", "transformers==5.6.0", "datasets==4.0.0", "accelerate==1.11.0",
               "peft==0.18.1", "trl==0.24.0", "omegaconf", "einops", "deepspeed==0.19.8"),
        arguments=("--base-model", "org/model", "--data", "text.txt"), adapters=True,
    ),
    "skypilot": Project(alone=(), needs=("skypilot==0.14.1",), arguments=("--data", "text.txt")),
    "kubernetes": Project(
        alone=(), needs=("kubeflow-trainer-api==2.3.0", "jsonschema", "pyyaml"),
        arguments=("--data", "corpus/text.txt"),
    ),
    "slurm": Project(alone=(), needs=()),
    "launch": Project(alone=(), needs=()),
}  # fmt: skip


def environment(folder: Path, name: str, project: Project) -> Path:
    """The python of the project's own environment, made where it is not there."""
    python = folder / name / "bin/python"
    ready = folder / name / ".ready"
    wanted = json.dumps([project.alone, project.needs])
    if not ready.is_file() or ready.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        for words in (("--no-deps", *project.alone), project.needs):
            if any(not w.startswith("-") for w in words):
                subprocess.run([python, "-m", "pip", "install", "-q", *words], check=True)
        ready.write_text(wanted)
    return python


def emitted(target: str, count: int, folder: Path, seed: int) -> int:
    """Random plans through the command, one folder each; how many were drawn for it."""
    from click.testing import CliRunner

    from benchmarks.emit_draw import drawn_plan
    from outlay.planner.spec.files import to_yaml
    from outlay.runner.cli import cli

    r = random.Random(seed)
    written = drawn = 0
    while written < count:
        plan = drawn_plan(r, adapters=PROJECTS[target].adapters)
        drawn += 1
        if plan is None:
            continue
        at = folder / str(written)
        at.mkdir(parents=True)
        (at / "plan.yaml").write_text(to_yaml(plan))
        words = ["emit", target, str(at / "plan.yaml"), "--out", str(at / "out")]
        words += PROJECTS[target].arguments
        if "nvme" in (plan.strategy.offload_optimizer, plan.strategy.offload_param):
            words += ["--nvme-path", "/nvme"]
        if target == "launch" and plan.cluster.nodes > 1:
            words += ["--hosts", ",".join(f"node{i}" for i in range(plan.cluster.nodes))]
        result = CliRunner().invoke(cli, words)
        if result.exit_code:
            raise SystemExit(f"{' '.join(words)}: {result.output}{result.exception}")
        (at / "out/text.txt").write_text(TEXT)
        written += 1
    return drawn


def read_by(target: str, python: Path, folder: Path, extra: list[str]) -> dict[str, Any]:
    """What the project's reader found: {read, refused: [[folder, why]], controls, controls_missed}."""
    done = subprocess.run(
        [python, READERS / f"read_{target}.py", folder, *extra],
        capture_output=True, text=True, check=False, cwd=folder,
        env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                          "HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise SystemExit(f"{target}: its reader did not end: {done.stderr[-1500:]}")


def shell_result(target: str, folder: Path) -> dict[str, Any]:
    """The shells' own parsers over every script, and Slurm's where it is installed."""
    scripts = sorted(p for p in folder.glob("*/out/*") if p.suffix in (".sh", ".sbatch"))
    refused = []
    for path in scripts:
        shell = "bash" if path.suffix == ".sbatch" else "sh"
        commands = [[shell, "-n", str(path)]]
        if target == "slurm" and shutil.which("sbatch"):
            commands.append(["sbatch", "--test-only", str(path), "text.txt"])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                refused.append([str(path), done.stderr[-300:]])
    broken = folder / "broken.sh"
    broken.write_text("if true; then\n")
    control = subprocess.run(["sh", "-n", broken], capture_output=True, check=False)
    with contextlib.suppress(FileNotFoundError):
        broken.unlink()
    return {"read": len(scripts) - len(refused), "refused": refused, "controls": 1,
            "controls_missed": [] if control.returncode else ["broken.sh"]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="What emit writes, read by those it is for.")
    parser.add_argument("targets", nargs="*", default=list(PROJECTS), help=", ".join(PROJECTS))
    parser.add_argument("--count", type=int, default=60, help="random plans for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "outlay-venvs")
    parser.add_argument("--crd", type=Path, help="the TrainJob's CustomResourceDefinition")
    asked = parser.parse_args()
    bad = False
    for target in asked.targets:
        if target not in PROJECTS:
            parser.error(f"{target} is none of {', '.join(PROJECTS)}")
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
            folder = Path(work)
            emitted(target, asked.count, folder, asked.seed)
            if PROJECTS[target].needs:
                python = environment(asked.venvs, target, PROJECTS[target])
                crd = target == "kubernetes" and asked.crd
                result = read_by(target, python, folder, [str(asked.crd.resolve())] if crd else [])
            else:
                result = shell_result(target, folder)
        print(f"{target}: {json.dumps(result)}", flush=True)
        bad = bad or bool(result["refused"] or result["controls_missed"])
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

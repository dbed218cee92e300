"""`outlay emit`: what each target's files say, and what is refused with the target that can."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from outlay.planner.emit import versions
from outlay.planner.emit.targets import FOLDERS
from outlay.planner.hardware import resolve_hardware
from outlay.planner.planning import make_plan
from outlay.planner.spec.files import to_yaml
from outlay.planner.spec.job import Finetune, Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError
from outlay.runner.cli import cli

SAID = {
    "axolotl": ("--base-model", "org/model", "--data", "text.jsonl"),
    "llamafactory": ("--base-model", "org/model", "--data", "text.jsonl"),
    "launch": ("--hosts", "first,second"),
    "kubernetes": ("--data", "corpus/text.txt"),
}


@pytest.fixture
def plan(tiny_config: Path, tiny_spec: ModelSpec, tiny_job: Job) -> Plan:
    """Two nodes of four GPUs."""
    cluster = resolve_hardware("h100-sxm:8/4", inter_node_gbps=100)
    job = dataclasses.replace(tiny_job, global_batch=64)
    config = json.loads(tiny_config.read_text())
    return make_plan(tiny_spec, config, job, cluster, fixed={"zero": 3, "dp": 8})


def _emit(plan: Plan, tmp_path: Path, target: str, *words: str) -> Result:
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(plan))
    return CliRunner().invoke(cli, ["emit", target, str(path), *words])


def _folder(plan: Plan, tmp_path: Path, target: str, *words: str) -> Path:
    out = tmp_path / target
    given = words or SAID.get(target, ())
    result = _emit(plan, tmp_path, target, *given, "--out", str(out))
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert f"next: cd {out} && " in result.stderr
    return out


def _error(result: Result) -> str:
    assert isinstance(result.exception, OutlayError), result.output
    assert result.exception.exit_code == 2
    return str(result.exception)


def _changed(plan: Plan, *, job: dict[str, Any] | None = None, **strategy: Any) -> Plan:
    return dataclasses.replace(
        plan,
        strategy=dataclasses.replace(plan.strategy, **strategy),
        job=dataclasses.replace(plan.job, **(job or {})),
    )


@pytest.mark.parametrize("target", [t.name for t in FOLDERS])
def test_every_target_writes_shells_that_parse_and_no_auto_for_sizes(
    target: str, plan: Plan, tmp_path: Path
) -> None:
    folder = _folder(plan, tmp_path, target)
    for path in folder.iterdir():
        if path.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", path], check=True)
        if path.suffix == ".py":
            compile(path.read_text(), path.name, "exec")
    zero = json.loads((folder / "ds_config.json").read_text())["zero_optimization"]
    gather = "stage3_gather_16bit_weights_on_model_save"
    assert zero | {gather: 0} == plan.deepspeed["zero_optimization"] | {gather: 0}
    assert zero[gather] is True


def test_accelerates_two_files_do_not_say_a_thing_twice(plan: Plan, tmp_path: Path) -> None:
    folder = _folder(plan, tmp_path, "accelerate")
    config = yaml.safe_load((folder / "accelerate.yaml").read_text())
    assert (config["num_machines"], config["num_processes"]) == (2, 8)
    assert "mixed_precision" not in config
    assert set(config["deepspeed_config"]) == {
        "deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher",
    }  # fmt: skip
    ours = json.loads((folder / "ds_config.json").read_text())
    assert "auto" not in json.dumps(ours)
    assert ours["train_batch_size"] == plan.job.global_batch
    loop = json.loads((folder / "loop.json").read_text())
    assert loop["max_steps"] == loop["schedule"]["num_training_steps"] == plan.job.steps
    checkpointing = plan.strategy.activation_checkpointing == "full"
    assert loop["gradient_checkpointing"] is checkpointing


@pytest.mark.parametrize("target", ["axolotl", "llamafactory"])
@pytest.mark.parametrize("quant", [None, "none", "nf4", "nf4-dq", "int8"])
def test_the_frameworks_say_the_plan_in_their_words(
    target: str, quant: Any, plan: Plan, tmp_path: Path
) -> None:
    tune = Finetune(rank=16, quant=quant) if quant else None
    stage = 3 if quant in (None, "none") else 2
    tuned = _changed(plan, job={"finetune": tune, "packing": False}, zero=stage)
    folder = tmp_path / target
    result = _emit(tuned, tmp_path, target, *SAID[target], "--out", str(folder))
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    said = yaml.safe_load((folder / f"{target}.yaml").read_text())
    micro = {"axolotl": "micro_batch_size", "llamafactory": "per_device_train_batch_size"}[target]
    batch = said[micro] * said["gradient_accumulation_steps"] * 8
    assert batch == plan.job.global_batch
    assert said["max_steps"] == plan.job.steps
    length, packing = {
        "axolotl": ("sequence_len", "sample_packing"), "llamafactory": ("cutoff_len", "packing"),
    }[target]  # fmt: skip
    assert (said[length], said[packing]) == (plan.job.seq_len, False)
    rank = said.get("lora_r", said.get("lora_rank"))
    assert rank == (16 if quant else None)
    bits = {"axolotl": (said.get("load_in_4bit"), said.get("load_in_8bit")),
            "llamafactory": (said.get("quantization_bit") == 4 or None,
                             said.get("quantization_bit") == 8 or None)}[target]  # fmt: skip
    assert bits == (True if quant in ("nf4", "nf4-dq") else None, True if quant == "int8" else None)
    double = said.get("double_quantization", "bnb_config_kwargs" not in said)
    assert quant not in ("nf4", "nf4-dq") or double is (quant == "nf4-dq")


def test_hostfile_and_commands_for_two_nodes(plan: Plan, tmp_path: Path) -> None:
    folder = _folder(plan, tmp_path, "launch")
    assert (folder / "hostfile").read_text() == "first slots=4\nsecond slots=4\n"
    torchrun = (folder / "torchrun.sh").read_text()
    assert "--nnodes=2 --nproc_per_node=4" in torchrun
    assert "--master_addr=first" in torchrun
    started = (folder / "deepspeed.sh").read_text()
    assert "--hostfile=hostfile --num_nodes=2 --num_gpus=4 --master_addr=first" in started
    few = _error(_emit(plan, tmp_path, "launch", "--hosts", "first", "--out", str(tmp_path / "x")))
    assert "2 nodes, and 1 are named" in few
    twice = _emit(plan, tmp_path, "launch", "--hosts", "a,a", "--out", str(tmp_path / "x"))
    assert "named twice" in _error(twice)
    odd = _emit(plan, tmp_path, "launch", "--hosts", "a,b;c", "--out", str(tmp_path / "x"))
    assert "no host name" in _error(odd)


def test_a_plan_for_cpus_says_so_or_is_refused(
    tiny_config: Path, tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Any, tmp_path: Path
) -> None:
    config = json.loads(tiny_config.read_text())
    plan = make_plan(tiny_spec, config, tiny_job, cpu_cluster, fixed={"zero": 1, "dp": 2})
    for target, script in (("launch", "deepspeed.sh"), ("slurm", "job.sbatch"),
                           ("llamafactory", "launch.sh"), ("accelerate", "launch.sh")):  # fmt: skip
        words = [w for w in SAID.get(target, ()) if w not in ("--hosts", "first,second")]
        folder = tmp_path / target
        result = _emit(plan, tmp_path, target, *words, "--out", str(folder))
        assert result.exit_code == 0, f"{result.output}{result.exception}"
        assert "DS_ACCELERATOR=cpu" in (folder / script).read_text()
        assert "gpus-per-node" not in (folder / script).read_text()
        assert not (folder / "hostfile").exists()
    for target in ("axolotl", "skypilot", "kubernetes"):
        words = [*SAID.get(target, ()), "--out", str(tmp_path / "x")]
        assert "writes for GPUs" in _error(_emit(plan, tmp_path, target, *words))


def test_slurm_asks_for_the_plans_nodes(plan: Plan, tmp_path: Path) -> None:
    folder = _folder(
        plan, tmp_path, "slurm", "--sbatch=--partition=gpu", "--sbatch=--time=01:00:00"
    )
    lines = (folder / "job.sbatch").read_text().splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=4", "#SBATCH --ntasks-per-node=1",
            "#SBATCH --partition=gpu", "#SBATCH --time=01:00:00"} <= set(lines)  # fmt: skip
    assert not any("no --time" in line for line in lines)
    # an #SBATCH line after the first command is a comment for Slurm
    assert lines.index("set -euo pipefail") > max(
        i for i, line in enumerate(lines) if line.startswith("#SBATCH")
    )
    odd = _emit(plan, tmp_path, "slurm", "--sbatch", "gpu", "--out", str(tmp_path / "x"))
    assert "no option of sbatch" in _error(odd)


def test_skypilot_rents_what_was_planned(plan: Plan, tmp_path: Path) -> None:
    task = yaml.safe_load((_folder(plan, tmp_path, "skypilot") / "task.yaml").read_text())
    assert (task["num_nodes"], task["resources"]) == (2, {"accelerators": "H100:4"})
    assert "--nproc_per_node=4" in task["run"]
    instance = dataclasses.replace(plan, cluster=resolve_hardware("aws/p5.48xlarge:1"))
    (tmp_path / "i").mkdir()
    folder = _folder(instance, tmp_path / "i", "skypilot")
    task = yaml.safe_load((folder / "task.yaml").read_text())
    assert task["resources"] == {"infra": "aws", "instance_type": "p5.48xlarge"}
    rare = dataclasses.replace(plan, cluster=resolve_hardware("h20:8/4", inter_node_gbps=100))
    refused = _emit(rare, tmp_path, "skypilot", "--out", str(tmp_path / "x"))
    assert "SkyPilot has no name" in _error(refused)


def test_kubernetes_gives_each_pod_its_gpus_and_the_program(plan: Plan, tmp_path: Path) -> None:
    folder = _folder(plan, tmp_path, "kubernetes")
    config, job = yaml.safe_load_all((folder / "trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 4}
    assert trainer["args"] == ["/data/text.txt"]
    for name, text in config["data"].items():
        assert (folder / name).read_text() == text
    without = _emit(plan, tmp_path, "kubernetes", "--out", str(tmp_path / "x"))
    assert "CLAIM/PATH" in _error(without)


@pytest.mark.parametrize(
    ("target", "change", "can"),
    [
        ("axolotl", {"dp": 4, "tp": 2, "grad_accum": 16, "micro_batch": 1}, "emit deepspeed"),
        ("skypilot", {"dp": 4, "sp": 2, "grad_accum": 16, "micro_batch": 1}, "emit deepspeed"),
        ("launch", {"loss": "chunked"}, "--for trainer"),
        ("accelerate", {"job": {"finetune": Finetune()}}, "emit axolotl and emit llamafactory"),
        ("slurm", {"activation_checkpointing": "full", "recompute_layers": 2}, "--for trainer"),
    ],
)
def test_what_a_target_cannot_say_names_the_one_that_can(
    target: str, change: dict[str, Any], can: str, plan: Plan, tmp_path: Path
) -> None:
    words = SAID.get(target, ())
    out = tmp_path / "out"
    error = _error(_emit(_changed(plan, **change), tmp_path, target, *words, "--out", str(out)))
    assert f"emit {target} cannot express" in error
    assert can in error
    assert not out.exists()


@pytest.mark.parametrize("target", ["axolotl", "llamafactory"])
def test_weights_and_text_are_asked_for(target: str, plan: Plan, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "x"))
    assert "--base-model" in _error(_emit(plan, tmp_path, target, "--data", "t.txt", *out))
    model = ("--base-model", "org/model")
    assert "--data" in _error(_emit(plan, tmp_path, target, *model, *out))
    assert "kind of file" in _error(_emit(plan, tmp_path, target, *model, "--data", "t.pdf", *out))
    other = tmp_path / "other"
    other.mkdir()
    config = plan.model.config | {"num_hidden_layers": 2}
    (other / "config.json").write_text(json.dumps(config))
    words = ("--base-model", str(other), "--data", "t.txt", *out)
    assert "another model than the plan's" in _error(_emit(plan, tmp_path, target, *words))


def test_a_plan_for_trainers_can_be_emitted_to_all_of_them(tmp_path: Path) -> None:
    """The same job planned for `outlay run` takes a pipeline or a chunked loss, which none can."""
    path = tmp_path / "plan.yaml"
    words = ["plan", "--model", "llama-3-8b", "--hardware", "a100-sxm-80gb:8", "--steps", "10"]
    for whose, code in (("trainer", 0), ("runner", 2)):
        made = CliRunner().invoke(cli, [*words, "--for", whose, "--out", str(path)])
        assert made.exit_code == 0, made.output
        for target in FOLDERS:
            said = [w for w in SAID.get(target.name, ()) if w not in ("--hosts", "first,second")]
            out = tmp_path / whose / target.name
            result = CliRunner().invoke(
                cli, ["emit", target.name, str(path), *said, "--out", str(out)]
            )
            error = getattr(result.exception, "exit_code", result.exit_code)
            assert error == code, f"{target.name} {result.output}{result.exception}"


def test_unknown_targets_and_broken_plans_say_where(plan: Plan, tmp_path: Path) -> None:
    near = CliRunner().invoke(cli, ["emit", "axolotel", "plan.yaml"])
    assert near.exit_code == 2
    assert "Did you mean axolotl?" in near.output
    text = to_yaml(plan)
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace("micro_batch: ", "micro_batch: many", 1))
    error = _error(
        CliRunner().invoke(cli, ["emit", "slurm", str(path), "--out", str(tmp_path / "x")])
    )
    line = next(
        i for i, t in enumerate(path.read_text().splitlines(), 1) if "micro_batch: many" in t
    )
    assert f"plan.yaml:{line}: strategy.micro_batch" in error


def test_a_version_reads_every_key_that_is_written_for_it(plan: Plan, tmp_path: Path) -> None:
    result = _emit(plan, tmp_path, "deepspeed", "--deepspeed", versions.WRITTEN_FOR)
    assert result.exit_code == 0, result.output
    assert "parsed by that version: yes" in result.stderr
    json.loads(result.stdout)
    unknown = _error(_emit(plan, tmp_path, "deepspeed", "--deepspeed", "0.16.99"))
    assert "DeepSpeed 0.16.99 was not looked at" in unknown
    assert "0.16.9, 0.17" in unknown
    none = _error(_emit(plan, tmp_path, "deepspeed", "--deepspeed", "latest"))
    assert versions.WRITTEN_FOR in none
    split = _changed(plan, dp=4, tp=2, zero=1, micro_batch=1, grad_accum=16)
    old = _error(_emit(split, tmp_path, "deepspeed", "--deepspeed", "0.15.4"))
    assert "DeepSpeed 0.15.4 does not read tensor_parallel" in old
    ours = _emit(split, tmp_path, "deepspeed", "--deepspeed", "0.19.7")
    assert ours.exit_code == 0, ours.output


def test_the_keys_of_versions_are_whole() -> None:
    known = versions.versions()
    assert known[-1] == versions.WRITTEN_FOR
    assert list(known) == sorted(known, key=lambda v: [int(x) for x in v.split(".")])
    for name in known:
        found = versions.version(name)
        assert found.parsed is None or found.parsed == found.of > 0
        assert (found.parsed is None) == (found.why is not None)
        assert {"train_batch_size", "zero_optimization", "bf16"} <= versions.known_keys(name, "top")
        assert {"stage", "offload_param"} <= versions.known_keys(name, "zero_optimization")
    assert "tensor_parallel" not in versions.known_keys("0.15.4", "top")
    assert "mics_shard_size" not in versions.known_keys("0.19.8", "zero_optimization")

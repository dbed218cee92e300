"""`outlay emit`: what is refused, and that Trainer's arguments and JSON agree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outlay.planner.emit.trainer import launch_command, trainer_deepspeed, training_arguments
from outlay.planner.planning import make_plan
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import to_yaml
from outlay.planner.spec.job import Job, Schedule
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Plan
from outlay.runner.cli import cli


@pytest.fixture
def plan(tiny_config: Path, tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> Plan:
    config = json.loads(tiny_config.read_text())
    return make_plan(tiny_spec, config, tiny_job, cpu_cluster, fixed={"zero": 2, "dp": 2})


def _emit(plan: Plan, tmp_path: Path, *words: str) -> Any:
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(plan))
    return CliRunner().invoke(cli, ["emit", words[0], str(path), *words[1:]])


def _autos(value: Any, at: str = "") -> set[str]:
    if isinstance(value, dict):
        return {k for key, v in value.items() for k in _autos(v, f"{at}.{key}" if at else key)}
    return {at} if value == "auto" else set()


def test_auto_exactly_where_the_trainer_compares(plan: Plan, tmp_path: Path) -> None:
    result = _emit(plan, tmp_path, "trainer", "--out", str(tmp_path / "t"))
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "t/ds_config.json").read_text())
    assert _autos(config) == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
    }
    assert config["zero_optimization"] == plan.deepspeed["zero_optimization"]
    arguments = json.loads((tmp_path / "t/training_args.json").read_text())
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    assert batch * plan.strategy.dp == plan.job.global_batch
    compile((tmp_path / "t/train.py").read_text(), "train.py", "exec")


def test_stage_3_gathers_the_weights_that_it_saves(plan: Plan) -> None:
    section = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    config = {**plan.deepspeed, "zero_optimization": section}
    saved = trainer_deepspeed(config)["zero_optimization"]
    assert saved["stage3_gather_16bit_weights_on_model_save"] is True
    assert section["stage3_gather_16bit_weights_on_model_save"] is False


def test_a_folder_with_something_in_it_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    result = _emit(plan, tmp_path, "trainer", "--out", str(tmp_path))
    assert result.exit_code != 0
    assert "something already" in str(result.exception)
    assert [p.name for p in tmp_path.iterdir() if p.name == "train.py"] == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recompute_layers": 2, "activation_checkpointing": "full"}, "some layers only"),
        ({"dp": 1, "tp": 2, "grad_accum": 8, "micro_batch": 1}, "tensor parallelism"),
        ({"loss": "chunked"}, "chunked loss"),
        ({"activation_checkpointing": "selective"}, "selective"),
    ],
)
def test_what_a_plain_trainer_would_not_do_is_refused(
    change: dict[str, Any], says: str, plan: Plan, tmp_path: Path
) -> None:
    other = dataclasses.replace(plan, strategy=dataclasses.replace(plan.strategy, **change))
    result = _emit(other, tmp_path, "trainer", "--out", str(tmp_path / "t"))
    assert says in str(result.exception)
    assert not (tmp_path / "t").exists()


def test_offload_to_nvme_asks_for_its_folder(plan: Plan, tmp_path: Path) -> None:
    nvme = dataclasses.replace(plan.strategy, zero=3, offload_optimizer="nvme")
    other = dataclasses.replace(plan, strategy=nvme)
    assert "--nvme-path" in str(_emit(other, tmp_path, "deepspeed").exception)
    result = _emit(other, tmp_path, "deepspeed", "--nvme-path", "/drive")
    config = json.loads(result.output)
    assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/drive"
    unused = _emit(plan, tmp_path, "deepspeed", "--nvme-path", "/drive")
    assert "offloads nothing" in str(unused.exception)


def test_a_precision_without_words_is_refused(plan: Plan, tmp_path: Path) -> None:
    fp8 = dataclasses.replace(plan, job=dataclasses.replace(plan.job, precision="fp8"))
    assert "fp8" in str(_emit(fp8, tmp_path, "deepspeed").exception)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_the_schedule_ends_where_the_jobs_does(name: Any, plan: Plan) -> None:
    job = dataclasses.replace(plan.job, schedule=Schedule(name=name, final_fraction=0.2))
    arguments = training_arguments(dataclasses.replace(plan, job=job))
    wanted = {
        "constant": ("constant_with_warmup", None),
        "linear": ("polynomial", {"lr_end": 0.2 * job.optimizer.lr, "power": 1.0}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.2}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": job.steps // 10, "decay_type": "linear", "min_lr_ratio": 0.2},
        ),
    }
    found = (arguments["lr_scheduler_type"], arguments.get("lr_scheduler_kwargs"))
    assert found == wanted[name]


def test_two_nodes_ask_for_rank_and_address(plan: Plan) -> None:
    cluster = dataclasses.replace(plan.cluster, nodes=2, ranks_per_node=1)
    script = launch_command(dataclasses.replace(plan, cluster=cluster))
    assert "--nnodes=2" in script
    assert "NODE_RANK:?" in script

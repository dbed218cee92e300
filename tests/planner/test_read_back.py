"""What `emit` writes, `check` reads back to the same strategy, and finds no fault in."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.check.mend import with_edits
from outlay.planner.check.question import Asked, question_of
from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.emit.order import Order
from outlay.planner.emit.targets import FOLDERS, Target
from outlay.planner.estimate.buckets import bucket_sizes
from outlay.planner.hardware import resolve_hardware
from outlay.planner.read.known import LATEST, parse_version
from outlay.planner.read.models import model_of
from outlay.planner.read.reader import read_configuration
from outlay.planner.rules import Context, broken
from outlay.planner.rules.config import found_in
from outlay.planner.rules.setup import setup_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.files import to_json
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.runner.cli import cli

SPEC = spec_from_config(TINY, name="tiny", source="test")
CLUSTERS = {n: resolve_hardware(f"a100-sxm-80gb:{n}") for n in (1, 2, 4, 8)}


@st.composite
def plans(draw: st.DrawFn, *, parallel: bool) -> Plan:
    """Legal plans; with tensor, pipeline and sequence parallel where the format has words for them."""
    size = st.sampled_from([1, 2]) if parallel else st.just(1)
    strategy = Strategy(
        zero=draw(st.integers(0, 3)), dp=draw(st.sampled_from([1, 2, 4])), tp=draw(size),
        pp=draw(size), sp=draw(size),
        micro_batch=draw(st.integers(1, 8)), grad_accum=draw(st.integers(1, 8)),
        activation_checkpointing=draw(st.sampled_from(["none", "full"])),
        offload_optimizer=draw(st.sampled_from(["none", "cpu", "nvme"])),
        offload_param=draw(st.sampled_from(["none", "cpu", "nvme"])),
        overlap_comm=draw(st.booleans()),
        reduce_bucket_size=draw(st.sampled_from([None, 1_000_000])),
    )  # fmt: skip
    if strategy.pp > 1:  # there DeepSpeed switches it off, and `check` says so
        strategy = dataclasses.replace(strategy, overlap_comm=False)
    job = Job(
        model="tiny", seq_len=64, global_batch=strategy.global_batch, steps=draw(st.integers(1, 999)),
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        optimizer=Optimizer(name=draw(st.sampled_from(["adamw", "adam"] if parallel else ["adamw"]))),
        gradient_clipping=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )  # fmt: skip
    cluster = CLUSTERS.get(strategy.world)
    legal = cluster is not None and not broken(
        strategy, Context(spec=SPEC, job=job, cluster=cluster), kinds=("arithmetic", "deepspeed")
    )
    if cluster is None or not legal:
        return draw(plans(parallel=parallel))
    return plan_of(job, cluster, strategy)


def plan_of(job: Job, cluster: Cluster, strategy: Strategy) -> Plan:
    return Plan(
        created="2026-01-01T00:00:00Z", outlay_version="test", job=job, cluster=cluster, strategy=strategy,
        model=ModelSource(name="tiny", source="test", parameters=0, config=TINY),
        estimate={}, deepspeed={}, considered=1, feasible=1,
    )  # fmt: skip


def files_of(target: Target, plan: Plan) -> dict[str, str]:
    config = deepspeed_config(plan.job, plan.strategy, SPEC, plan.cluster, nvme_path="/nvme")
    order = Order(
        plan=plan, spec=SPEC, where="plan.yaml", deepspeed=config, base_model="weights", data="text.jsonl"
    )  # fmt: skip
    return {name: text for name, text in target.write(order).files.items() if "." in name}


def sized(s: Strategy) -> Strategy:
    """With the buckets that the planner writes where the strategy leaves them to it."""
    if s.zero == 0:
        return dataclasses.replace(s, reduce_bucket_size=None, overlap_comm=False)
    reduce, gather = bucket_sizes(SPEC, s.tp, s.pp, swapped=s.offload_optimizer == "nvme")
    return dataclasses.replace(
        s, reduce_bucket_size=s.reduce_bucket_size or reduce, allgather_bucket_size=gather
    )


def read_back(files: dict[str, str], main: str, plan: Plan, asked: Asked) -> tuple[Strategy, Job]:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        meaning = read_configuration(Path(folder) / main)
    s = setup_of(meaning, parse_version(LATEST), spec=SPEC, cluster=plan.cluster)
    faults = [f for rule, f in found_in(s) if (f.level or rule.level) != "advice"]
    assert faults == []
    question = question_of(s, asked, "")
    return question.strategy, question.job


def compare(plan: Plan, strategy: Strategy, job: Job) -> None:
    assert strategy == sized(plan.strategy)
    for name in ("precision", "global_batch"):
        assert getattr(job, name) == getattr(plan.job, name)
    assert job.optimizer.name == plan.job.optimizer.name


@settings(max_examples=100, deadline=None)
@given(plans(parallel=True))
def test_a_deepspeed_json_is_read_back(plan: Plan) -> None:
    config = deepspeed_config(plan.job, plan.strategy, SPEC, plan.cluster, nvme_path="/nvme")
    # Recomputation has no place in the file except in a pipeline: the script decides it.
    asked = Asked(seq_len=64, activation_checkpointing=plan.strategy.activation_checkpointing)
    compare(plan, *read_back({"ds_config.json": to_json(config)}, "ds_config.json", plan, asked))


MAIN = {
    "trainer": "training_args.json", "accelerate": "accelerate.yaml", "axolotl": "axolotl.yaml",
    "llamafactory": "llamafactory.yaml",
}  # fmt: skip
"""Of the targets that have a file of settings, which one that is; the others write commands around these."""


@pytest.mark.parametrize("target", [t for t in FOLDERS if t.name in MAIN], ids=lambda t: t.name)
@settings(max_examples=30, deadline=None)
@given(plan=plans(parallel=False))
def test_a_frameworks_file_is_read_back(target: Target, plan: Plan) -> None:
    strategy, job = read_back(files_of(target, plan), MAIN[target.name], plan, Asked())
    compare(plan, strategy, job)
    assert job.steps == plan.job.steps


COMMANDS = (
    ("trainer", "launch.sh"), ("accelerate", "launch.sh"), ("launch", "torchrun.sh"),
    ("launch", "deepspeed.sh"), ("slurm", "job.sbatch"),
)  # fmt: skip


@pytest.mark.parametrize(("target", "command"), COMMANDS)
@settings(max_examples=15, deadline=None)
@given(plan=plans(parallel=False))
def test_a_command_is_read_back_through_its_program(target: str, command: str, plan: Plan) -> None:
    """Of all files: model, context and steps too, without a flag beside it."""
    files = files_of(next(t for t in FOLDERS if t.name == target), plan)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        meaning = read_configuration(Path(folder) / command)
        spec = model_of(meaning.said("model"), Path(folder))[0]
    assert spec is not None
    assert dataclasses.replace(spec, name="tiny", source="test") == SPEC
    assert meaning.said("world") == plan.cluster.ranks
    strategy, job = read_back(files, command, plan, Asked())
    compare(plan, strategy, job)
    assert (job.steps, job.seq_len) == (plan.job.steps, plan.job.seq_len)


@pytest.mark.parametrize("target", ["axolotl", "llamafactory"])
def test_a_frameworks_command_is_read_through(target: str, tmp_path: Path) -> None:
    """Its processes are the command's, also after a mend."""
    job = Job(model="tiny", seq_len=64, global_batch=4, steps=9, precision="bf16")
    plan = plan_of(job, CLUSTERS[4], Strategy(zero=2, dp=4))
    for name, text in files_of(next(t for t in FOLDERS if t.name == target), plan).items():
        (tmp_path / name).write_text(text)
    other = tmp_path / "other.sh"
    other.write_text(f"torchrun --nproc_per_node=2 train.py {target}.yaml --some flag\n")
    for command, ranks in ((tmp_path / "launch.sh", 4), (other, 2)):
        meaning = read_configuration(command)
        assert (meaning.framework, meaning.said("world")) == (target, ranks)
        after = with_edits(meaning, meaning.set_value("micro_batch", 3), target)
        assert (after.said("micro_batch"), after.said("world")) == (3, ranks)
    written = ["check", str(other), "--write", str(tmp_path / "mended.sh")]
    refused = CliRunner().invoke(cli, written).exception
    assert "the command names" in str(refused)


def test_a_program_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    """training_args.json may be somebody else's: only the script tells that it reads it."""
    job = Job(model="tiny", seq_len=64, global_batch=1, steps=1, precision="bf16")
    plan = plan_of(job, CLUSTERS[1], Strategy())
    files = files_of(next(t for t in FOLDERS if t.name == "trainer"), plan)
    (tmp_path / "launch.sh").write_text(files["launch.sh"])
    (tmp_path / "training_args.json").write_text(files["training_args.json"])
    (tmp_path / "train.py").write_text("print(1)")
    assert read_configuration(tmp_path / "launch.sh").said("micro_batch") is None


def test_every_file_of_settings_is_read_back() -> None:
    assert {t.name for t in FOLDERS} - set(MAIN) == {"launch", "slurm", "skypilot", "kubernetes"}

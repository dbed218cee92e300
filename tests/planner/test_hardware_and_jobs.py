"""--hardware references, job files and flags, defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from outlay.planner.cost import Range
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.hardware import resolve_hardware
from outlay.planner.jobs import JobFile, default_precision, merge, read_job_file, resolve_job
from outlay.planner.project_cost import Terms, project_cost
from outlay.planner.size.money import assumptions_of, included_in
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.files import to_yaml
from outlay.planner.spec.job import Job, Schedule
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import OutlayError, UnknownName, UsageError


def test_a_catalog_reference() -> None:
    c = resolve_hardware("h100-sxm:16", inter_node_gbps=3200)
    assert (c.nodes, c.ranks_per_node, c.ranks) == (2, 8, 16)
    assert c.intra.kind == "nvlink"
    assert c.inter is not None
    assert c.inter.bytes_per_s == 3200e9 / 8 / 8
    assert c.usable_bytes < 80 * 2**30
    assert c.price_usd_per_h is None


def test_an_instance_brings_network_and_price() -> None:
    c = resolve_hardware("aws/p4d.24xlarge:2")
    assert (c.nodes, c.ranks) == (2, 16)
    assert c.accelerator.name == "a100-sxm-40gb"
    assert c.inter is not None
    assert c.price_usd_per_h is not None
    assert "2026-" in (c.price_source or "")


def test_bridged_cards_have_no_nvlink_for_all() -> None:
    assert resolve_hardware("rtx-3090:8").intra.kind == "pcie"
    assert resolve_hardware("rtx-3090:2").intra.kind == "nvlink"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("h100-sxm:16", "network between 2 nodes is unknown"),
        ("h100-sxm:0", "at least one"),
        ("h100-sxm:12/5", "whole nodes of 5"),
        ("h100", "names no hardware"),
        ("h100-smx:8", "unknown accelerator"),
        ("aws/p9.huge:1", "p9.huge"),
        ("nowhere.yaml", "no such file"),
        ("cpu:2", "does not know how much memory"),
    ],
)
def test_what_cannot_be_meant(reference: str, says: str) -> None:
    with pytest.raises(OutlayError, match=says) as caught:
        resolve_hardware(reference)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_nonsense_prices(price: float) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        resolve_hardware("h100-sxm:8", price_usd_per_h=price)


def test_a_cluster_file_round_trips(cpu_cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(to_yaml(cpu_cluster))
    assert resolve_hardware(str(path)) == cpu_cluster
    dearer = resolve_hardware(str(path), price_usd_per_h=3.0)
    assert (dearer.price_usd_per_h, dearer.price_source) == (3.0, "--price-usd-per-h")


def test_a_stated_network_counts_or_is_said_to_change_nothing(tmp_path: Path) -> None:
    one = resolve_hardware("h100-sxm:8", inter_node_gbps=400)
    assert "changes nothing" in one.notes[-1] and resolve_hardware("h100-sxm:8").notes == ()
    two = resolve_hardware("h100-sxm:16", inter_node_gbps=400)
    path = tmp_path / "two.yaml"
    path.write_text(to_yaml(two))
    slower = resolve_hardware(str(path), inter_node_gbps=100)
    assert two.inter is not None and slower.inter is not None
    assert slower.inter.bytes_per_s == two.inter.bytes_per_s / 4
    assert slower.notes == two.notes


def test_a_warm_up_that_outlasts_the_steps_is_said(
    tiny_spec: ModelSpec, cpu_cluster: Cluster
) -> None:
    for warmup, said in ((100, False), (101, True)):
        file = JobFile(model="m", steps=100, schedule=Schedule(warmup_steps=warmup))
        notes = resolve_job(file, tiny_spec, cpu_cluster).assumptions
        assert ("schedule_warmup_steps" in {n["what"] for n in notes}) is said


def test_unknown_names_come_with_near_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        resolve_hardware("h100-sxn:8")
    assert "h100-sxm" in caught.value.near


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: m\ntokens: 1M\nseq_len: 128\nbudget: [5usd]\n")
    file = merge(read_job_file(path), {"seq_len": 64, "steps": 3, "budget": (), "model": None})
    assert (file.model, file.seq_len, file.steps, file.tokens) == ("m", 64, 3, None)
    assert file.budget == ("5usd",)


def test_defaults_are_stated(tiny_spec: ModelSpec, cpu_cluster: Cluster) -> None:
    resolved = resolve_job(JobFile(model="m"), tiny_spec, cpu_cluster)
    stated = {note["what"]: note["value"] for note in resolved.assumptions}
    assert stated == {
        "seq_len": 128, "global_batch": 16, "precision": "fp32", "tokens": 1_000_000_000,
    }  # fmt: skip
    assert resolved.job.tokens >= 1_000_000_000
    assert resolved.job.tokens - resolved.job.tokens_per_step < 1_000_000_000


def test_what_is_given_is_not_called_an_assumption(
    tiny_spec: ModelSpec, cpu_cluster: Cluster
) -> None:
    file = JobFile(model="m", seq_len=32, global_batch=4, precision="fp32", steps=5)
    resolved = resolve_job(file, tiny_spec, cpu_cluster)
    assert resolved.assumptions == []
    assert resolved.job.steps == 5


@pytest.mark.parametrize(
    "file",
    [
        JobFile(seq_len=0), JobFile(global_batch=-1), JobFile(steps=0), JobFile(tokens="1.5"),
        JobFile(tokens="many"), JobFile(precision="fp31"), JobFile(budget=("0usd",)),
        JobFile(optimizer="adamx"),
    ],
)  # fmt: skip
def test_nonsense_jobs(file: JobFile, tiny_spec: ModelSpec, cpu_cluster: Cluster) -> None:
    with pytest.raises(UsageError):
        resolve_job(file, tiny_spec, cpu_cluster)


def test_precision_follows_what_was_measured(cpu_cluster: Cluster) -> None:
    assert default_precision(cpu_cluster)[0] == "fp32"
    assert default_precision(resolve_hardware("h100-sxm:8"))[0] == "bf16"
    assert default_precision(resolve_hardware("v100-sxm-32gb:8"))[0] == "fp16"
    assert cpu_cluster.rates is not None
    fast = dataclasses.replace(cpu_cluster.rates, gemm_flops={"fp32": 1e11, "bf16": 4e11})
    assert default_precision(dataclasses.replace(cpu_cluster, rates=fast))[0] == "bf16"


def test_a_model_without_a_limit_of_positions_has_a_default_length(cpu_cluster: Cluster) -> None:
    spec, _ = resolve_model("bloom-560m")
    assert spec.max_positions == 0
    assert resolve_job(JobFile(model="m"), spec, cpu_cluster).job.seq_len == 2048


def test_a_job_of_data_epochs_and_a_method(
    tmp_path: Path, tiny_spec: ModelSpec, cpu_cluster: Cluster
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "some words"}\n' * 40)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: m\ndata: {data}\nepochs: 2\npacking: false\nseq_len: 32\nglobal_batch: 8\n"
        "finetune: qlora:r4\nattempts: 3\npilot: 2%\nprecision: fp32\n"
    )
    resolved = resolve_job(read_job_file(path), tiny_spec, cpu_cluster)
    job = resolved.job
    assert (job.steps, job.packing, job.attempts, job.pilot_fraction) == (10, False, 3, 0.02)
    assert job.finetune is not None
    assert (job.finetune.rank, job.finetune.quant) == (4, "nf4-dq")
    what = [note["what"] for note in resolved.assumptions]
    # a length that was asked for is not called a default: a budget may not shorten it
    assert what == ["data", "packing", "length", "finetune", "project"]
    assert merge(read_job_file(path), {"tokens": "1M"}).epochs is None
    with pytest.raises(UsageError, match="not two of them"):
        merge(JobFile(), {"epochs": 2.0, "steps": 3})


def test_frozen_weights_have_no_gradients_to_compute_send_or_keep() -> None:
    spec, _ = resolve_model("llama-3-8b")
    cluster = resolve_hardware("rtx-4090:1", price_usd_per_h=0.35)
    base = JobFile(model="m", seq_len=2048, global_batch=16, steps=100)
    jobs = [
        resolve_job(dataclasses.replace(base, finetune=f), spec, cluster).job
        for f in (None, "lora:r16", "qlora:r16")
    ]
    one = Candidates.of([Strategy(grad_accum=16)])
    full, lora, qlora = (evaluate(spec, job, cluster, one, own=False) for job in jobs)
    assert full.step is not None and lora.step is not None and qlora.step is not None
    # two of three products are left; 4-bit weights are unpacked besides
    assert 0.6 < lora.step.time_s[0] / full.step.time_s[0] < 0.8
    assert lora.step.time_s[0] < qlora.step.time_s[0] < full.step.time_s[0]
    assert lora.step.parts["optimizer"][0] < 0.01 * full.step.parts["optimizer"][0]
    # 6.98B weights of linear layers at 0.5159 bytes, 1.05B of embedding and head at two
    frozen = qlora.memory.parts["parameters"][0]
    assert frozen == pytest.approx(6.98e9 * 0.5159 + 1.05e9 * 2, rel=0.01)
    told = estimate_dict(spec, jobs[2], cluster, qlora, 0)
    assert told["model"]["trainable_parameters"] == 32 * 16 * (2 * 4096 + 4096 + 1024)


def test_attempts_and_a_pilot_are_in_the_total() -> None:
    job = Job(model="m", seq_len=1, global_batch=1, steps=1, precision="fp32")
    many = dataclasses.replace(job, attempts=3, pilot_fraction=0.5)
    training = Range(low=3600.0, expected=3600.0, high=3600.0)
    terms = Terms(kind="owned", price_usd_per_h=None)
    one, project = (
        project_cost(
            terms, training, accelerators=1, nodes=1, tdp_w=None, assumptions=assumptions_of(j)
        ).wall_s.expected / 3600
        for j in (job, many)
    )  # fmt: skip
    setup = 0.75
    assert project - 4 * setup == pytest.approx(3.5 * (one - setup))
    assert included_in(many)[0] == "3 attempts and a pilot of 50.0% of one"
    with pytest.raises(UsageError, match="attempts"):
        dataclasses.replace(job, attempts=0)
    with pytest.raises(UsageError, match="pilot"):
        dataclasses.replace(job, pilot_fraction=1.5)

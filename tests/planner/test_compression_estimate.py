"""What compression adds to the estimate: sizes, memory by part, time by part, limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.compression import cache_bytes, exported_bytes
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.exported import compression_dict, require_export_size, smallest_bytes
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.compress import Compression, Distill, Pruning, Qat
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.packing import Packing
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """Eight blocks of the tiny model; a config is enough to plan with."""
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    return str(tmp_path)


def figures(
    spec: ModelSpec, job: Job, cluster: Cluster, compress: Compression | None, **how: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """(memory parts, step parts) of one strategy."""
    strategy = Strategy(**{"dp": 2, "micro_batch": 4, **how})
    made = dataclasses.replace(job, compress=compress)
    e = evaluate(spec, made, cluster, Candidates.of([strategy]), own=False)
    assert e.step is not None
    return (
        {k: float(v[0]) for k, v in e.memory.parts.items()},
        {k: float(v[0]) for k, v in e.step.parts.items()},
    )


def test_sizes_by_hand(tiny_spec: ModelSpec) -> None:
    """Four blocks of q, k, v, o and gate, up, down; the rest as it is."""
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    dense = 4 * parameter_counts(tiny_spec).total
    weights = 4 * sum(o * i for o, i in shapes)
    rows = 4 * sum(o for o, _ in shapes)
    assert exported_bytes(tiny_spec, 4, None) == dense
    int8 = dense - 4 * weights + weights + rows * (4 + 1)
    assert exported_bytes(tiny_spec, 4, Packing(bits=8)) == int8
    groups = 4 * sum(o * (i // 32) for o, i in shapes)
    int4 = dense - 4 * weights + weights // 2 + 4 * groups + 16 * 28
    assert exported_bytes(tiny_spec, 4, Packing(bits=4, group=32)) == int4
    head = 512 * 64
    assert smallest_bytes(tiny_spec, 4) == int4 - 4 * head + head // 2 + 4 * 512 * 2 + 16


def test_an_8b_model_within_a_limit() -> None:
    """Llama-3-8B in bf16: 16.06 GB dense, 9.09 as int8, 6.03 as int4 in groups of 32."""
    from outlay.planner.spec.families import resolve_model

    spec, _ = resolve_model("llama-3-8b")
    sizes = [
        exported_bytes(spec, 2, p) / 1e9 for p in (None, Packing(bits=8), Packing(bits=4, group=32))
    ]
    assert sizes == pytest.approx([16.06, 9.09, 6.03], abs=0.02)


def test_masks_are_a_byte_of_the_partition(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster
) -> None:
    masked = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    for zero, share in ((0, 1.0), (1, 0.5), (3, 0.5)):
        plain = figures(tiny_spec, tiny_job, cpu_cluster, None, zero=zero)
        pruned = figures(
            tiny_spec, tiny_job, cpu_cluster, Compression(pruning=Pruning(sparsity=0.5)), zero=zero
        )
        more = pruned[0]["optimizer_states"] - plain[0]["optimizer_states"]
        assert more == pytest.approx(masked * share)
        assert pruned[1]["optimizer"] > plain[1]["optimizer"]
        assert pruned[1]["forward"] == plain[1]["forward"]


def test_a_teacher_has_weights_logits_and_a_forward_pass(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster, teacher: str
) -> None:
    count = 512 * 64 * 2 + 64 + 8 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64 + 128)
    plain = figures(tiny_spec, tiny_job, cpu_cluster, None, zero=0)
    whole = figures(
        tiny_spec, tiny_job, cpu_cluster, Compression(distill=Distill(teacher=teacher)), zero=0
    )
    assert whole[0]["parameters"] - plain[0]["parameters"] == pytest.approx(4 * count)
    # of 4 sequences of 64 tokens: logits, log-probabilities, gradient and three copies of the rows
    assert whole[0]["logits"] == pytest.approx(6 * 4 * 64 * 512 * 4)
    assert 1.5 < whole[1]["forward"] / plain[1]["forward"] < 3.5
    assert whole[1]["backward"] == plain[1]["backward"]
    split = Compression(distill=Distill(teacher=teacher, teacher_zero=3))
    half = figures(tiny_spec, tiny_job, cpu_cluster, split, zero=0)
    assert half[0]["parameters"] - plain[0]["parameters"] == pytest.approx(2 * count)


def test_cached_logits_are_disk_not_a_teacher(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster, teacher: str
) -> None:
    compress = Compression(distill=Distill(teacher=teacher, top_k=16))
    job = dataclasses.replace(tiny_job, compress=compress)
    assert cache_bytes(tiny_spec, job) == job.tokens * 16 * 4 + 8 * job.tokens // 64
    plain = figures(tiny_spec, tiny_job, cpu_cluster, None, zero=0)
    cached = figures(tiny_spec, tiny_job, cpu_cluster, compress, zero=0)
    assert cached[0]["parameters"] == plain[0]["parameters"]
    assert cached[0]["logits"] > plain[0]["logits"]
    made = compression_dict(tiny_spec, job, cpu_cluster, 2.0)
    assert made is not None
    # twice the blocks, the same head: between one and two of the student's passes, at 0.1 USD/h
    assert 1.0 < made["caching_s"] / (job.steps * 2.0) < 2.0
    assert made["caching_usd"] == pytest.approx(made["caching_s"] * 0.1 / 3600)


def test_fake_quantizers_take_time_in_both_passes(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster
) -> None:
    plain = figures(tiny_spec, tiny_job, cpu_cluster, None, zero=2)[1]
    ratios = []
    for qat in (Qat(bits=8), Qat(bits=8, activation_bits=8)):
        found = figures(tiny_spec, tiny_job, cpu_cluster, Compression(qat=qat), zero=2)[1]
        assert all(found[k] > plain[k] for k in ("forward", "backward"))
        ratios.append(found["forward"] + found["backward"])
    assert ratios[1] > ratios[0], "inputs are quantized too"


def test_limits_on_the_export(tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> None:
    dense, least = exported_bytes(tiny_spec, 4, None), smallest_bytes(tiny_spec, 4)

    def of(limit: int, qat: Qat | None = None) -> Job:
        return dataclasses.replace(tiny_job, compress=Compression(export_bytes=limit, qat=qat))

    for limit, name, size in (
        (dense, "none", dense), (dense - 1, "mixed", dense - 1), (least, "mixed", least),
    ):  # fmt: skip
        require_export_size(tiny_spec, of(limit))
        made = compression_dict(tiny_spec, of(limit), cpu_cluster, 1.0)
        assert made is not None and (made["quantize"], made["export_bytes"]) == (name, size)
    with pytest.raises(NotFeasible, match="does not become"):
        require_export_size(tiny_spec, of(least - 1))
    with pytest.raises(NotFeasible, match="as int8 its weights"):
        require_export_size(tiny_spec, of(least, Qat(bits=8)))
    assert compression_dict(tiny_spec, tiny_job, cpu_cluster, 1.0) is None
    floors = [c["decode_floor_s"] for c in made["choices"] if not c["trained_for"]]
    assert np.all(np.diff(floors) <= 0) and floors[0] == pytest.approx(dense / 10e9)


def test_choices_with_what_training_for_them_takes(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster
) -> None:
    """Packed after training costs nothing more; trained for it, the step of that job, in time and money."""
    cluster = dataclasses.replace(cpu_cluster, price_usd_per_h=3.6)
    job = dataclasses.replace(tiny_job, compress=Compression(qat=Qat(bits=8)))

    def step_s(other: Job) -> float | None:
        qat = None if other.compress is None else other.compress.qat
        return 2.0 if qat is None else 3.0

    made = compression_dict(tiny_spec, job, cluster, 1.0, step_s)
    assert made is not None
    found = [(c["quantize"], c["trained_for"], c["steps_s"]) for c in made["choices"]]
    after, trained = 2.0 * job.steps, 3.0 * job.steps
    assert found == [
        ("none", False, after), ("int8", False, after), ("int8-dynamic", False, after),
        ("int4:g32", False, after), ("int8-dynamic", True, trained), ("int4:g32", True, trained),
    ]  # fmt: skip
    assert made["choices"][-1]["steps_usd"] == pytest.approx(3.6 / 3600 * trained)
    assert {c["loss_difference"] for c in made["choices"]} == {"unknown"}
    sliced = compression_dict(tiny_spec, job, cluster, 1.0, step_s, quantizes=False)
    assert sliced is not None and not any(c["trained_for"] for c in sliced["choices"])


def test_other_families_have_sizes_too(tiny_job: Job, cpu_cluster: Cluster) -> None:
    config = {
        "model_type": "gpt2",
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    }
    spec = spec_from_config(config, name="gpt2", source="test")
    assert exported_bytes(spec, 4, Packing(bits=8)) < exported_bytes(spec, 4, None)
    job = dataclasses.replace(tiny_job, compress=Compression(export_bytes=10**9))
    made = compression_dict(spec, job, cpu_cluster, 1.0)
    assert made is not None and not any(c["trained_for"] for c in made["choices"]), "Conv1D"

"""The compress block of a job: what it says, what contradicts itself or the model, how it is carried."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.compression import check_compression, matrices
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.planning import read_plan
from outlay.planner.rules import Context, broken
from outlay.planner.shrink import shrunk_config, sizes_after
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.compress import (
    BLOCK_PARTS,
    Compression,
    Distill,
    Pruning,
    Qat,
    Shrink,
    with_flags,
)
from outlay.planner.spec.families import resolve_model, spec_from_config
from outlay.planner.spec.files import parse
from outlay.planner.spec.job import Finetune, Job
from outlay.planner.spec.model import Mlp, ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import FileError, UsageError
from outlay.runner.cli import cli
from outlay.runner.compress.schedule import pruned_of_group, quantizes_at, sparsity_at

ALL = (*BLOCK_PARTS, "head", "embedding")


def test_a_block_as_a_file_has_it() -> None:
    value = {"qat": {"bits": 4, "group": 32}, "pruning": {"pattern": 124}, "export_bytes": "4GB"}
    found = parse(Compression, value, path="job.yaml")
    # an unquoted 2:4 is 124 to YAML 1.1
    assert found == Compression(
        qat=Qat(bits=4, group=32), pruning=Pruning(pattern="2:4"), export_bytes=4_000_000_000
    )
    assert found.pruning is not None and found.pruning.final_sparsity == 0.5
    with pytest.raises(FileError, match=r"qat\.bits"):
        parse(Compression, {"qat": {"bits": 5}}, path="job.yaml")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Compression(), "says nothing"),
        (lambda: Compression(export_bytes=0), "0 bytes"),
        (lambda: Pruning(), "how sparse"),
        (lambda: Pruning(sparsity=1.0), "between 0 and 1"),
        (lambda: Pruning(pattern="4:4"), "none is pruned"),
        (lambda: Pruning(pattern="half"), "no pattern"),
        (lambda: Pruning(pattern="2:4", sparsity=0.75), "sparsity of 0.5"),
        (lambda: Pruning(pattern="2:4", scope="global"), "global"),
        (lambda: Pruning(sparsity=0.5, start=0.5, end=0.5), "start below end"),
        (lambda: Pruning(sparsity=0.5, updates=0), "at least 1"),
        (lambda: Pruning(sparsity=0.5, parts=()), "no matrix"),
        (lambda: Pruning(sparsity=0.5, parts=("mlp", "mlp")), "twice"),
        (lambda: Qat(bits=8, group=32), "output channel"),
        (lambda: Qat(bits=4, group=12), "power of two"),
        (lambda: Qat(parts=("embedding",)), "token table"),
        (lambda: Qat(start=1.5), "share"),
        (lambda: Distill(teacher="t", temperature=0), "positive"),
        (lambda: Distill(teacher="t", weight=0), "nothing is distilled"),
        (lambda: Distill(teacher="t", top_k=8, hidden=1.0), "cached"),
        (lambda: Distill(teacher="t", teacher_offload="cpu"), "teacher_zero"),
        (lambda: Shrink(), "nothing is pruned"),
        (lambda: Pruning.parse("50%,often"), "often"),
        (lambda: Pruning.parse("50h"), "share"),
        (lambda: Pruning.parse("half"), "50%, 2:4"),
        (lambda: Qat.parse("int5"), "int8"),
        (lambda: Qat.parse("int4:32"), "int8"),
    ],
)  # fmt: skip
def test_what_contradicts_itself(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_flags_over_a_file() -> None:
    file = Compression(pruning=Pruning(sparsity=0.5), export_bytes=10**9)
    both = with_flags(file, "2:4,one-shot", "int4:g64")
    assert both is not None
    assert both.pruning == Pruning(pattern="2:4", schedule="one_shot")
    assert both.qat == Qat(bits=4, group=64) and both.export_bytes == 10**9
    assert with_flags(file, "none", None) == Compression(export_bytes=10**9)
    assert with_flags(Compression(qat=Qat()), None, "none") is None
    assert with_flags(None, "30%,global", None) == Compression(
        pruning=Pruning(sparsity=0.3, scope="global")
    )
    assert both.label() == "pruned 2:4, at once; trained for int4 in groups of 64"
    assert Pruning.parse("30%").label() == "30% of each matrix pruned, little by little"
    assert Compression(export_bytes="1GB").label() == ""
    assert Qat.parse("int8") == Qat(bits=8, activation_bits=8)
    assert Qat.parse("int4").group_size == 32 and Qat.parse("int8").group_size is None


def test_what_the_model_does_not_allow(tiny_spec: ModelSpec) -> None:
    """tiny: 64 wide, MLP 160, 4 heads of 16."""

    def refused(compress: Compression, spec: ModelSpec = tiny_spec, **more: Any) -> str:
        with pytest.raises(UsageError) as caught:
            check_compression(compress, spec, **more)
        return caught.value.message()

    pattern = Compression(pruning=Pruning(pattern="3:7"))
    text = refused(pattern)
    assert "no multiple of 7: attention output projection, attention q projection" in text
    assert "mlp up projection: 64 inputs; mlp down projection: 160 inputs" in text
    check_compression(Compression(pruning=Pruning(pattern="4:8")), tiny_spec)
    groups = refused(Compression(qat=Qat(bits=4, group=64)))
    assert "no multiple of 64: mlp down projection: 160 inputs" in groups
    check_compression(Compression(qat=Qat(bits=4, group=64, parts=("attention",))), tiny_spec)
    tied = dataclasses.replace(tiny_spec, tie_embeddings=True)
    twice = Compression(pruning=Pruning(sparsity=0.5, parts=("head", "embedding")))
    assert "pruned twice" in refused(twice, tied)
    check_compression(twice, tiny_spec)
    nf4 = Finetune(quant="nf4-dq")
    assert "nf4-dq" in refused(Compression(pruning=Pruning(sparsity=0.5)), finetune=nf4)
    experts = dataclasses.replace(
        tiny_spec.blocks[0], mlp=Mlp(ffn=64, gated=True, experts=4, top_k=2)
    )
    moe = dataclasses.replace(tiny_spec, blocks=(experts,))
    assert "mixture" in refused(Compression(qat=Qat()), moe)
    gpt2, _ = resolve_model("gpt2")
    assert "Conv1D" in refused(Compression(qat=Qat()), gpt2)
    check_compression(None, moe)


def test_rules(tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> None:
    def names(strategy: Strategy, **job: Any) -> list[str]:
        x = Context(
            spec=dataclasses.replace(tiny_spec, tie_embeddings=True),
            job=dataclasses.replace(tiny_job, **job),
            cluster=cpu_cluster,
        )
        return [rule.name for rule, _ in broken(strategy, x, kinds=("runner",))]

    sliced = Strategy(dp=1, tp=2, micro_batch=8)
    assert "quantizes_whole_matrices" in names(sliced, compress=Compression(qat=Qat()))
    swapped = Strategy(zero=3, dp=2, micro_batch=4, offload_optimizer="nvme")
    half = Compression(pruning=Pruning(sparsity=0.5))
    assert "masks_masters_in_memory" in names(swapped, compress=half)
    staged = Strategy(dp=1, pp=2, micro_batch=8)
    table = Compression(pruning=Pruning(sparsity=0.5, parts=("embedding",)))
    assert "pipeline_prunes_one_copy" in names(staged, compress=table)
    assert "pipeline_prunes_one_copy" not in names(staged, compress=half)
    wide = Compression(pruning=Pruning(pattern="8:16"))
    cut = dataclasses.replace(sliced, tp=4)
    assert "pattern_divides_slices" in names(dataclasses.replace(sliced, tp=8), compress=wide)
    assert "pattern_divides_slices" in names(
        cut, compress=Compression(pruning=Pruning(pattern="8:32"))
    )
    assert "pattern_divides_slices" not in names(sliced, compress=wide)
    chunked = Strategy(zero=1, dp=2, micro_batch=4, loss="chunked")
    head = Compression(qat=Qat(parts=("head",)))
    assert "quantized_head_makes_logits" in names(chunked, compress=head)
    assert "quantized_head_makes_logits" not in names(chunked, compress=Compression(qat=Qat()))
    split = Strategy(zero=3, dp=2, micro_batch=4)
    assert "qlora_without_zero_init" in names(split, finetune=Finetune(quant="nf4"))
    assert "qlora_without_zero_init" not in names(split, finetune=Finetune())
    assert len(Candidates.of([split])) == 1


@given(
    steps=st.integers(1, 500), start=st.floats(0, 0.9), length=st.floats(0.01, 1),
    updates=st.integers(1, 80), one_shot=st.booleans(),
)  # fmt: skip
def test_schedule_rises_and_arrives(
    steps: int, start: float, length: float, updates: int, one_shot: bool
) -> None:
    """Whatever the length of the run: never falling, and exactly what was asked at its last step."""
    pruning = Pruning(
        sparsity=0.8, start=start, end=min(1.0, start + length), updates=updates,
        schedule="one_shot" if one_shot else "cubic",
    )  # fmt: skip
    found = [sparsity_at(pruning, step, steps) for step in range(steps)]
    assert found == sorted(found) and found[-1] == 0.8
    assert len(set(found) - {0.0}) <= updates
    assert all(value == 0 for value in found[: min(int(start * steps), steps - 1)])


def test_zhu_and_gupta() -> None:
    """Equation 1 half-way through the ramp: 1 − (1 − ½)³ = ⅞ of the final sparsity."""
    pruning = Pruning(sparsity=0.8, start=0.2, end=0.6, updates=40)
    assert sparsity_at(pruning, 40, 100) == pytest.approx(0.8 * 7 / 8)
    assert [pruned_of_group(Pruning(pattern="4:8"), s) for s in (0.0, 0.124, 0.125, 0.49, 0.5)] == [
        0, 0, 1, 3, 4,
    ]  # fmt: skip
    assert [quantizes_at(Qat(start=0.5), step, 10) for step in (4, 5, 9)] == [False, True, True]
    assert quantizes_at(Qat(start=0.99), 0, 1)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-7b", "gpt2", "opt-125m", "pythia-160m"])
def test_matrices_are_those_of_the_module(name: str) -> None:
    """The planner's list against transformers' module on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from outlay.planner.spec.plan import ModelSource
    from outlay.runner.compress.parts import targets_of
    from outlay.runner.model import model_config

    spec, config = resolve_model(name)
    source = ModelSource(name=name, source="test", parameters=0, config=config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(source))  # type: ignore[no-untyped-call]
    for part in ALL:
        planned = sorted(
            size for m in matrices(spec, (part,)) for size in [(m.inputs, m.outputs)] * m.count
        )
        tied = part == "head" and spec.tie_embeddings
        found = sorted((t.inputs, t.outputs) for t in targets_of(model, (part,)))
        assert found == planned, (part, tied)


def test_a_smaller_config(tiny_spec: ModelSpec) -> None:
    from conftest import TINY

    from outlay.planner.estimate.parameters import parameter_counts

    sizes = sizes_after(tiny_spec, Shrink(heads=0.5, channels=0.5, layers=1, multiple=16))
    assert (sizes.heads, sizes.kv_heads, sizes.ffn, sizes.layers) == (2, 1, 80, 3)
    made = shrunk_config(TINY, tiny_spec, sizes, (0, 2, 3))
    smaller = spec_from_config(made, name="smaller", source="test")
    old, new = parameter_counts(tiny_spec), parameter_counts(smaller)
    assert smaller.blocks[0].attention.head_dim == tiny_spec.blocks[0].attention.head_dim
    assert new.blocks[0].mlp * 2 == old.blocks[0].mlp
    assert new.blocks[0].attention * 2 == old.blocks[0].attention
    for how, says in (
        (Shrink(heads=0.2), "whole group"), (Shrink(layers=4), "none is left"),
        (Shrink(channels=0.5, multiple=256), "leaves"), (Shrink(channels=0.001), "leaves"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            sizes_after(tiny_spec, how)
    gpt2, _ = resolve_model("gpt2")
    with pytest.raises(UsageError, match="head_dim"):
        sizes_after(gpt2, Shrink(heads=0.5))
    three = {**TINY, "num_attention_heads": 8, "num_key_value_heads": 8}
    spec = spec_from_config(three, name="three", source="test")
    with pytest.raises(UsageError, match=r"hidden size 64[\s\S]*50\.0%"):
        shrunk_config(three, spec, sizes_after(spec, Shrink(heads=0.25)), range(4))


def test_a_plan_carries_it(tmp_path: Path, tiny_config: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("compress: {qat: {bits: 4, group: 32}, pruning: {pattern: 2:4}}\n")
    out = str(tmp_path / "plan.yaml")
    base = [
        "plan", "--model", str(tiny_config), "--hardware", "a100-sxm-80gb:2", "--steps", "5", "--seq-len", "64",
        "--global-batch", "8", "--out", out,
    ]  # fmt: skip
    done = CliRunner().invoke(cli, [*base[:1], str(job), *base[1:], "--prune", "4:8"])
    assert done.exit_code == 0, done.output
    compress = read_plan(out).job.compress
    assert compress == Compression(qat=Qat(bits=4, group=32), pruning=Pruning(pattern="4:8"))
    refused = CliRunner().invoke(cli, [*base, "--qat", "int4:g64"])
    assert isinstance(refused.exception, UsageError)
    assert "160 inputs" in str(refused.exception)

"""Rules as masks and as messages, and the search over what they leave."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.buckets import reduce_buckets, smaller_buckets
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.interval import TIGHT_RISK, risk_above
from outlay.planner.hardware import resolve_hardware
from outlay.planner.rules import RULES, Context, allowed, broken
from outlay.planner.search import alternatives, candidates_for, divisors, ranked, search
from outlay.planner.size.engine import Ask, Sizer, Timed
from outlay.planner.space import TARGETS, with_small_buckets
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.job import Data, Finetune, Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import NotFeasible, UsageError

FINE = Strategy(zero=1, dp=2, micro_batch=2, grad_accum=2)
BROKEN = {
    "world_is_ranks": {"dp": 4, "grad_accum": 1},
    "batch_closes": {"grad_accum": 3},
    "zero_stage_exists": {"zero": 9},
    "stages_have_blocks": {"pp": 8},
    "pipeline_without_zero_2": {"pp": 2, "zero": 2},
    "pipeline_without_ulysses": {"pp": 2, "sp": 2},
    "tensor_parallel_divides_heads": {"tp": 3},
    "sequence_parallel_divides": {"sp": 3},
    "expert_parallel_divides": {"ep": 2},
    "offload_param_needs_stage_3": {"offload_param": "cpu"},
    "offload_needs_zero": {"zero": 0, "offload_optimizer": "cpu"},
    "recomputed_layers_exist": {"activation_checkpointing": "full", "recompute_layers": 999},
    "not_run_by_deepspeed": {"vpp": 2},
    "runner_does_not_yet": {"activation_checkpointing": "selective"},
}
"""One change each that breaks the rule of that name (and perhaps others)."""


@pytest.fixture
def context(tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster) -> Context:
    return Context(spec=tiny_spec, job=tiny_job, cluster=cpu_cluster)


def test_a_plain_strategy_breaks_nothing(context: Context) -> None:
    assert broken(FINE, context) == []


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_forbids_and_explains(name: str, context: Context) -> None:
    strategy = dataclasses.replace(FINE, **BROKEN[name])  # type: ignore[arg-type]
    found = {rule.name: text for rule, text in broken(strategy, context)}
    assert name in found
    assert not allowed(Candidates.of([strategy]), context)[0]
    assert len(found[name]) > 20


def test_rules_of_job_and_hardware(context: Context) -> None:
    fp16 = dataclasses.replace(context, job=dataclasses.replace(context.job, precision="fp16"))
    assert [r.name for r, _ in broken(FINE, fp16)] == ["precision_runs_on_cpu"]
    bf16 = dataclasses.replace(context, job=dataclasses.replace(context.job, precision="bf16"))
    unsplit = dataclasses.replace(FINE, zero=0, dp=1, pp=2, grad_accum=4)
    assert [r.name for r, _ in broken(unsplit, bf16)] == ["bf16_pipeline_resumes_from_zero_1"]
    assert broken(unsplit, context) == []
    tpu = dataclasses.replace(context.cluster.accelerator, deepspeed=False)
    elsewhere = dataclasses.replace(
        context, cluster=dataclasses.replace(context.cluster, accelerator=tpu)
    )
    assert [r.name for r, _ in broken(FINE, elsewhere)] == ["deepspeed_runs_there"]
    learned = dataclasses.replace(
        context, spec=dataclasses.replace(context.spec, positions="learned", max_positions=32)
    )
    assert [r.name for r, _ in broken(FINE, learned)] == ["sequence_fits_positions"]


def test_what_the_runner_cannot_do_is_not_recommended(context: Context) -> None:
    flash = dataclasses.replace(context, job=dataclasses.replace(context.job, attention="flash"))
    assert [r.name for r, _ in broken(FINE, flash)] == ["flash_needs_gpu"]
    encoder, _ = resolve_model("bert-base-uncased")
    seq2seq, _ = resolve_model("t5-small")
    for spec in (encoder, seq2seq):
        names = [r.name for r, _ in broken(FINE, dataclasses.replace(context, spec=spec))]
        assert names == ["runner_trains_causal_models"]
    staged = dataclasses.replace(FINE, zero=0, dp=1, pp=2, grad_accum=4)
    bloom = dataclasses.replace(context, spec=resolve_model("bloom-560m")[0])
    assert [r.name for r, _ in broken(staged, bloom)] == ["runner_pipelines_its_families"]
    assert broken(FINE, bloom) == []
    narrow = dataclasses.replace(context.job, finetune=Finetune(rank=4, quant="int8"))
    rows = dataclasses.replace(context.job, data=Data(path="train.jsonl", format="text"))
    padded = dataclasses.replace(context.job, packing=False)
    for job, rule in (
        (narrow, "runner_adapts_with_lora"), (rows, "runner_trains_packed_text"),
        (padded, "runner_trains_packed_text"),
    ):  # fmt: skip
        x = dataclasses.replace(context, job=job)
        assert [r.name for r, _ in broken(FINE, x)] == [rule]
        assert broken(FINE, x, kinds=("arithmetic", "deepspeed")) == []


def test_every_rule_is_tested_and_has_evidence() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    of_job_and_hardware = {
        "precision_runs_on_cpu", "deepspeed_runs_there", "sequence_fits_positions",
        "flash_needs_gpu", "runner_trains_causal_models", "runner_pipelines_its_families",
        "runner_trains_packed_text", "bf16_pipeline_resumes_from_zero_1",
        "qlora_without_zero_init",
    }  # fmt: skip
    tested = {*BROKEN, *of_job_and_hardware}
    assert tested <= set(names)  # those of arithmetic and DeepSpeed: all in test_rules_random.py
    assert all(len(rule.evidence) > 10 for rule in RULES)


@given(n=st.integers(1, 200_000))
def test_divisors(n: int) -> None:
    found = divisors(n)
    assert found == sorted(set(found))
    assert all(n % d == 0 for d in found)
    assert {1, n} <= set(found)
    if n < 5000:
        assert found == [d for d in range(1, n + 1) if n % d == 0]


def test_search_equals_brute_force(context: Context) -> None:
    """Every legal strategy over wide loops, estimated one at a time: the same winner."""
    result = search(context.spec, context.job, context.cluster, {"tp": 1, "sp": 1})
    best, count = None, 0
    words: list[tuple[Any, int | None]] = [("none", None), *(("full", n) for n in (None, 1, 2, 3))]
    losses: tuple[Any, ...] = ("plain", "chunked")
    recomputed = [(word, layers, loss) for word, layers in words for loss in losses]
    count_small = 0
    for zero in range(4):
        for dp in (1, 2):
            for pp in (1, 2):
                for micro in range(1, 9):
                    for accum in range(1, 9):
                        for word, layers, loss in recomputed:
                            s = Strategy(
                                zero=zero, dp=dp, pp=pp, micro_batch=micro, grad_accum=accum,
                                activation_checkpointing=word, recompute_layers=layers, loss=loss,
                            )  # fmt: skip
                            if broken(s, context) or (zero and dp == 1):
                                continue
                            count += 1
                            e = evaluate(
                                context.spec, context.job, context.cluster, Candidates.of([s])
                            )
                            assert e.step is not None
                            if e.risk[0] <= TIGHT_RISK:
                                seconds = float(e.step.time_s[0])
                                best = seconds if best is None else min(best, seconds)
                            small = int(smaller_buckets(context.spec, Candidates.of([s]))[0])
                            usual = int(reduce_buckets(context.spec, Candidates.of([s]))[0])
                            count_small += bool(zero) and 2 * small <= usual
    assert result.legal == count + count_small
    assert result.estimates.step is not None
    chosen = float(result.estimates.step.time_s[int(result.order[0])])
    assert best is not None
    assert chosen <= best * 1.006  # ties within half a per cent go to less memory


def test_fixed_values_are_kept(context: Context) -> None:
    result = search(context.spec, context.job, context.cluster, {"zero": 3, "micro_batch": 2})
    c = result.estimates.candidates
    assert set(c.zero.tolist()) == {3}
    assert set(c.micro_batch.tolist()) == {2}


def test_alternatives_say_why(context: Context) -> None:
    result = search(context.spec, context.job, context.cluster)
    rows = alternatives(result, context.cluster)
    assert len(rows) >= 5
    assert all(row.why for row in rows)
    assert result.best not in [row.strategy for row in rows]


def test_nothing_fits_says_how_much_is_missing(context: Context) -> None:
    small = dataclasses.replace(context.cluster, usable_bytes=10_000_000)
    with pytest.raises(NotFeasible) as caught:
        search(context.spec, context.job, small)
    assert caught.value.exit_code == 3
    assert "of 10 MiB a rank" in str(caught.value)
    assert "do:" in str(caught.value)


def test_a_batch_that_does_not_divide(context: Context) -> None:
    job = dataclasses.replace(context.job, global_batch=7)
    with pytest.raises(UsageError, match="no strategy closes"):
        search(context.spec, job, context.cluster, {"pp": 1, "tp": 1, "sp": 1})


def test_unknown_speed_cannot_be_ranked(context: Context) -> None:
    unmeasured = dataclasses.replace(context.cluster, rates=None)
    with pytest.raises(UsageError, match="probe --measure"):
        search(context.spec, context.job, unmeasured)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=st.integers(1, 64), ranks=st.integers(1, 16), name=st.sampled_from(sorted(TARGETS)))
def test_candidates_close_the_batch(
    batch: int, ranks: int, name: str, tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster
) -> None:
    job = dataclasses.replace(tiny_job, global_batch=batch)
    cluster = dataclasses.replace(cpu_cluster, ranks_per_node=ranks)
    c, looked = candidates_for(tiny_spec, job, cluster, {}, target=TARGETS[name])
    assert len(c) <= looked
    assert np.all(c.dp * c.tp * c.pp * c.cp * c.sp == ranks)
    assert np.all(c.micro_batch * c.grad_accum * c.dp == batch)
    for dp in set(c.dp[c.vpp == 1].tolist()):
        micro = {m for m in divisors(batch) if batch // dp % m == 0}
        assert set(c.micro_batch[(c.dp == dp) & (c.vpp == 1)].tolist()) == micro


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("memory_mib", [60, 100, 8000])
def test_pruned_search_equals_the_plain_product(
    name: str, memory_mib: int, tiny_spec: ModelSpec, cpu_cluster: Cluster
) -> None:
    """The product of all axes, every rule, every estimate at once: the same set and the same best."""
    target = TARGETS[name]
    job = Job(model="tiny", seq_len=2048, global_batch=8, steps=10, precision="bf16")
    # The catalog's GPU, with so little memory that it binds.
    gpu = dataclasses.replace(
        resolve_hardware("a100-sxm-80gb:8/4", inter_node_gbps=400),
        usable_bytes=3 * 2**30 + memory_mib * 2**20,
    )
    megatron = name == "megatron"
    product = Candidates.grid(
        zero=range(4) if not megatron else range(2), tp=[1, 2], pp=[1, 2, 4, 8], vpp=[1, 2, 4],
        cp=[1, 2], sp=[1, 2, 4], dp=[1, 2, 4, 8], micro_batch=[1, 2, 4, 8], grad_accum=[1, 2, 4, 8],
        activation_checkpointing=[0, 1, 2], recompute_layers=[-1, 1, 2, 3],
        offload_optimizer=[0, 1], offload_param=[0, 1], loss=[0, 2],
    )  # fmt: skip
    c = product
    keep = allowed(c, Context(spec=tiny_spec, job=job, cluster=gpu), kinds=target.kinds)
    keep &= c.micro_batch * c.grad_accum * c.dp == job.global_batch
    keep &= (c.zero == 0) | (c.dp * c.cp * c.sp > 1) | (c.offload_optimizer > 0)
    keep &= (c.recompute_layers < 0) | (c.activation_checkpointing == 2)
    for axis, value in target.fixed.items():
        keep &= getattr(c, axis) == value
    if name == "trainer":
        keep &= c.activation_checkpointing != 1
    if megatron:
        keep &= (c.sp == 1) & (c.offload_optimizer + c.offload_param + c.loss == 0)
        keep &= (c.vpp == 1) | ((c.pp > 1) & (4 % (c.pp * c.vpp) == 0) & (c.grad_accum % c.pp == 0))
    c = c.take(keep)
    c = dataclasses.replace(c, sequence_parallel=(c.tp > 1).astype(int) * megatron)
    e = evaluate(tiny_spec, job, gpu, c, software=target.software_on(gpu))
    legal, _ = candidates_for(tiny_spec, job, gpu, {}, target=target)
    assert {legal.strategy(i) for i in range(len(legal))} == {c.strategy(i) for i in range(len(c))}
    assert e.step is not None
    fits = np.flatnonzero(e.risk <= TIGHT_RISK)
    if not fits.size:
        with pytest.raises(NotFeasible):
            search(tiny_spec, job, gpu, target=target)
        return
    found = search(tiny_spec, job, gpu, target=target)
    plain = {c.strategy(int(i)) for i in fits}
    assert {
        s
        for i in found.order
        if (s := found.estimates.candidates.strategy(int(i))).reduce_bucket_size is None
    } == plain
    assert found.estimates.step is not None
    best = float(found.estimates.step.time_s[found.best_index])
    least = float(e.step.time_s[fits].min())
    assert best <= least * 1.005


VOCABULARY = 128_256
"""As large as today's: a table of it is most of a small model, and larger than what a bucket should be."""


@pytest.mark.parametrize("name", ["runner", "deepspeed", "trainer"])
@pytest.mark.parametrize("spare_mib", [-40, -10, 30, 120, 500, 8000])
def test_small_buckets_are_searched_exactly(
    name: str, spare_mib: int, tiny_spec: ModelSpec
) -> None:
    """Every strategy with the usual and with small buckets, all ranked at once: the same first."""
    target = TARGETS[name]
    spec = dataclasses.replace(tiny_spec, vocab=VOCABULARY)
    job = Job(model="tiny", seq_len=2048, global_batch=8, steps=10, precision="bf16")
    gpu = resolve_hardware("a100-sxm-80gb:8/4", inter_node_gbps=400)
    legal, _ = candidates_for(spec, job, gpu, {}, target=target)
    both, usual = with_small_buckets(spec, legal, {}, target)
    assert np.all(both.reduce_bucket_size[: len(legal)] < 0)
    assert np.all(both.reduce_bucket_size[len(legal) :] == both.allgather_bucket_size[len(legal) :])
    assert len(both) == len(legal) + int((legal.zero >= 1).sum())
    software = target.software_on(gpu)
    whole = evaluate(spec, job, gpu, both, software=software)
    assert whole.step is not None
    small = np.flatnonzero(usual != np.arange(len(both)))
    assert np.all(whole.step.time_s[small] >= whole.step.time_s[usual[small]] * (1 - 1e-12))
    first = small[both.zero[small] < 3]
    assert np.all(whole.memory.device[first] <= whole.memory.device[usual[first]])
    # Memory such that it binds for the smallest with the usual buckets, or nearly.
    least = float(whole.memory.device[: len(legal)].min())
    gpu = dataclasses.replace(gpu, usable_bytes=round(1.1 * least) + spare_mib * 2**20)
    e = evaluate(spec, job, gpu, both, software=software)
    fits = np.flatnonzero(e.risk <= TIGHT_RISK)
    if not fits.size:
        with pytest.raises(NotFeasible):
            search(spec, job, gpu, target=target)
        return
    first = fits[ranked(e.take(fits), fits.size)[0]]
    found = search(spec, job, gpu, target=target)
    assert found.best == both.strategy(int(first))
    sizer = Sizer(Ask(spec=spec, job=job, target=target, most_ranks=8, precision_given=True))
    sized = sizer.best(gpu, job)
    assert isinstance(sized, Timed)
    assert sized.strategy == found.best
    config = deepspeed_config(job, found.best, spec, gpu)["zero_optimization"]
    if found.best.reduce_bucket_size is not None:
        assert config["reduce_bucket_size"] == found.best.reduce_bucket_size
        assert config["reduce_bucket_size"] < VOCABULARY * spec.hidden


def test_small_buckets_make_a_model_fit(tiny_spec: ModelSpec) -> None:
    """Where only they fit they are the plan, its label and its configuration."""
    target = TARGETS["deepspeed"]
    spec = dataclasses.replace(tiny_spec, vocab=VOCABULARY)
    job = Job(model="tiny", seq_len=2048, global_batch=8, steps=10, precision="bf16")
    gpu = resolve_hardware("a100-sxm-80gb:8/4", inter_node_gbps=400)
    legal, _ = candidates_for(spec, job, gpu, {}, target=target)
    both, _ = with_small_buckets(spec, legal, {}, target)
    e = evaluate(spec, job, gpu, both)
    usual, small = e.memory.least[: len(legal)].min(), e.memory.least[len(legal) :].min()
    assert small < usual
    width = e.figures["interval.memory_fraction"]
    limits = np.linspace(small, 2 * usual, 400)
    only = [
        limit for limit in limits
        if risk_above(small, limit, width) <= TIGHT_RISK < risk_above(usual, limit, width)
    ]  # fmt: skip
    between = dataclasses.replace(gpu, usable_bytes=int(only[len(only) // 2]))
    best = search(spec, job, between, target=target).best
    assert best.reduce_bucket_size is not None
    assert f"bucket{best.reduce_bucket_size / 1e6:.3g}M" in best.label()
    with pytest.raises(NotFeasible):
        search(
            spec,
            job,
            between,
            {"reduce_bucket_size": -1, "allgather_bucket_size": -1},
            target=target,
        )

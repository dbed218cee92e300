"""Loading, evaluation and saving; host, NVMe and disk; what would change a verdict."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.emit.deepspeed import deepspeed_config
from outlay.planner.estimate.candidates import CHECKPOINTING, OFFLOAD, Candidates
from outlay.planner.estimate.disk import CHECKPOINTS_KEPT, checkpoint_bytes, export_bytes
from outlay.planner.estimate.estimator import Estimates, evaluate_memory, host_of
from outlay.planner.estimate.host import pinned
from outlay.planner.estimate.memory import PARTS
from outlay.planner.estimate.parameters import largest_matrix, parameter_counts
from outlay.planner.estimate.phases import PHASES, STEP_PHASES
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.estimate.software import DEEPSPEED
from outlay.planner.estimate.states import deepspeed_moments
from outlay.planner.hardware import resolve_hardware
from outlay.planner.options import OPTIMIZERS
from outlay.planner.rules.runner_methods import OPTIMIZERS as RUN
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model, spec_from_config
from outlay.planner.spec.job import Finetune, Job, Optimizer
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import UsageError

MIB = 2**20
LLAMA = resolve_model("llama-3-8b")[0]
H100 = resolve_hardware("h100-sxm:8/8")
SMALL = spec_from_config(
    {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16000,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    },
    name="small", source="test",
)  # fmt: skip
"""42 M parameters: what MEASURED was measured with."""


def _job(
    precision: str = "bf16", optimizer: str = "adamw", seq_len: int = 4096, batch: int = 512
) -> Job:
    return Job(
        model="any", seq_len=seq_len, global_batch=batch, steps=1, precision=precision,  # type: ignore[arg-type]
        optimizer=Optimizer(name=optimizer),  # type: ignore[arg-type]
    )  # fmt: skip


# Two CPU processes, gloo, sequence 128, micro-batch 2, DeepSpeed 0.19.8, torch 2.13, 2026-11-24: growth of
# the first rank's resident set in each phase (MiB; save = the export at the end), bytes of a checkpoint.
MEASURED = [
    ("fp32", {"zero": 0}, (161, 516, 646), 505121351),
    ("fp32", {"zero": 1}, (321, 436, 566), 673433439),
    ("fp32", {"zero": 2}, (321, 436, 566), 673433439),
    ("fp32", {"zero": 1, "pp": 2}, (278, 380, 536), 673459626),
    ("bf16", {"zero": 0}, (866, 611, 654), 589309537),
    ("bf16", {"zero": 1}, (241, 369, 412), 589268044),
    ("fp32", {"zero": 3}, (305, 720, 639), 505152094),
    ("bf16", {"zero": 3}, (202, 506, 449), 505152460),
]


@pytest.mark.parametrize(("precision", "how", "phases_mib", "checkpoint"), MEASURED)
def test_phases_and_files_as_measured(
    cpu_cluster: Cluster,
    precision: str,
    how: dict[str, int],
    phases_mib: tuple[int, ...],
    checkpoint: int,
) -> None:
    """Stage 3 within 35 %: its zero-filled buffers are not touched while loading, and on a CPU only
    touched pages count. All others within 5 %, files within 0.1 %."""
    pp = how.get("pp", 1)
    strategy = Strategy(**how, dp=2 // pp, micro_batch=2, grad_accum=2 * pp)
    job = _job(precision, seq_len=128, batch=8)
    e = evaluate_memory(SMALL, job, cpu_cluster, Candidates.of([strategy]))
    runtime = float(e.memory.parts["runtime"][0])
    found = (e.memory.each_phase[STEP_PHASES:, 0] - runtime) / MIB
    assert found == pytest.approx(phases_mib, rel=0.35 if how["zero"] == 3 else 0.05)
    assert checkpoint_bytes(SMALL, job, strategy) == pytest.approx(checkpoint, rel=0.001)
    width = 4 if precision == "fp32" else 2
    assert (
        export_bytes(SMALL, job) == width * 42_082_816
    )  # written: 168340241 and 84174586 with names


powers = st.sampled_from([1, 2, 4, 8])


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    pp = draw(powers)
    zero = draw(st.integers(0, 3)) if pp == 1 else draw(st.integers(0, 1))
    offload = draw(st.sampled_from(OFFLOAD)) if zero else "none"
    return Strategy(
        zero=zero, dp=draw(powers), tp=draw(powers), pp=pp, micro_batch=draw(st.integers(1, 8)),
        grad_accum=draw(st.integers(1, 8)), loss=draw(st.sampled_from(["plain", "fused", "chunked"])),
        activation_checkpointing=draw(st.sampled_from(CHECKPOINTING)),  # type: ignore[arg-type]
        offload_optimizer=offload,  # type: ignore[arg-type]
        offload_param=draw(st.sampled_from(OFFLOAD)) if zero == 3 else "none",  # type: ignore[arg-type]
    )  # fmt: skip


def _evaluate(job: Job, *several: Strategy) -> Estimates:
    return evaluate_memory(LLAMA, job, H100, Candidates.of(several))


@settings(max_examples=800, deadline=None)
@given(strategies(), st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from(OPTIMIZERS))
def test_parts_of_the_worst_phase_sum(strategy: Strategy, precision: str, optimizer: str) -> None:
    m = _evaluate(_job(precision, optimizer), strategy).memory
    assert len(m.each_phase) == len(PHASES)
    assert sum(float(m.parts[name][0]) for name in PARTS) == pytest.approx(float(m.device[0]))
    assert float(m.each_phase.max()) == pytest.approx(float(m.device[0]))
    for values in (*m.parts.values(), m.each_phase):
        assert np.isfinite(values).all()
        assert (values >= 0).all()


@settings(max_examples=400, deadline=None)
@given(strategies(), st.sampled_from(OPTIMIZERS))
def test_the_host_holds_what_the_device_gave(strategy: Strategy, optimizer: str) -> None:
    """Never negative; offload takes states from the device (but for one temporary) to the host; NVMe
    only where it is asked."""
    job = _job(optimizer=optimizer)
    several = [dataclasses.replace(strategy, offload_optimizer=w) for w in OFFLOAD]  # type: ignore[arg-type]
    e = _evaluate(job, *several)
    host = host_of(LLAMA, job, H100, e.candidates, e.memory, DEEPSPEED, e.figures)
    for values in (*host.parts.values(), host.nvme):
        assert np.isfinite(values).all()
        assert (values >= 0).all()
    assert host.total == pytest.approx(sum(host.parts.values()))
    if strategy.zero:
        temporary = 2 * largest_matrix(LLAMA) / strategy.tp
        assert e.memory.allocated[1] <= e.memory.allocated[0] + temporary
        assert host.parts["optimizer_states"][1] > host.parts["optimizer_states"][0]
        assert host.nvme[2] > host.nvme[0]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(OPTIMIZERS), st.sampled_from(["bf16", "fp32"]))
def test_no_phase_of_zero3_grows_with_ranks(optimizer: str, precision: str) -> None:
    ranks = [Strategy(zero=3, dp=n) for n in (1, 2, 3, 5, 8, 64, 1000)]
    m = _evaluate(_job(precision, optimizer), *ranks).memory
    runtime = m.parts["runtime"]
    assert (np.diff(m.each_phase - runtime, axis=1) <= 1.0).all()


def test_nvme_bytes_of_one_node() -> None:
    """ZeRO-Infinity (arXiv 2104.07857, section 3): master, two moments and gradients in fp32, and weights."""
    strategy = Strategy(zero=3, dp=8, offload_optimizer="nvme", offload_param="nvme")
    e = _evaluate(_job(), strategy)
    host = host_of(LLAMA, _job(), H100, e.candidates, e.memory, DEEPSPEED, e.figures)
    assert float(host.nvme[0]) == pytest.approx((16 + 2) * parameter_counts(LLAMA).total, rel=1e-6)


def test_adapters_are_saved_alone() -> None:
    """LoRA of rank 8 on q and v of Llama-3-8B: 3.4 M weights, 2 + 12 bytes each."""
    job = dataclasses.replace(_job(), finetune=Finetune())
    trained = 32 * 8 * (2 * 4096 + 4096 + 1024)
    strategy = Strategy(zero=2, dp=8)
    # beside the whole that they are merged into
    assert export_bytes(LLAMA, job) - export_bytes(LLAMA, _job()) == 2 * trained
    assert checkpoint_bytes(LLAMA, job, strategy) == 14 * trained
    e = evaluate_memory(LLAMA, job, H100, Candidates.of([strategy]))
    assert float(e.memory.device[0]) < float(_evaluate(_job(), strategy).memory.device[0])


def test_pinned_memory_is_a_power_of_two() -> None:
    assert pinned(np.array([0.0, 4096.0, 4097.0, 3e9])).tolist() == [0, 4096, 8192, 2**32]


def test_kept_checkpoints_are_the_runners() -> None:
    pytest.importorskip("torch")
    from outlay.runner.checkpoint import save_checkpoint

    assert inspect.signature(save_checkpoint).parameters["keep"].default == CHECKPOINTS_KEPT


@pytest.mark.parametrize(("precision", "zero", "bytes_"), [("bf16", 1, 4.0), ("fp32", 0, 0.01)])
def test_adafactor_is_not_factored_in_a_flat_vector(
    precision: str, zero: int, bytes_: float
) -> None:
    width = 4 if precision == "fp32" else 2
    assert float(deepspeed_moments("adafactor", zero, width, 0.1)) == bytes_


def test_muon_leaves_tables_to_adam() -> None:
    assert float(deepspeed_moments("muon", 1, 2, 0.25)) == pytest.approx(0.75 * 4 + 0.25 * 8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_offered_optimizer_is_run_or_refused(optimizer: str) -> None:
    job, strategy = _job(optimizer=optimizer), Strategy(zero=1, dp=8)
    assert np.isfinite(_evaluate(job, strategy).memory.device).all()
    if optimizer in RUN:
        config = deepspeed_config(job, strategy, LLAMA, H100)
        assert optimizer == "adamw_8bit" or config["optimizer"]["type"]
    else:
        with pytest.raises(UsageError, match="can be estimated"):
            deepspeed_config(job, strategy, LLAMA, H100)


def _printed(strategy: Strategy) -> dict[str, object]:
    job = _job()
    return estimate_dict(LLAMA, job, H100, _evaluate(job, strategy), 0)


def test_changes_save_what_they_say() -> None:
    strategy = Strategy(zero=1, dp=8, micro_batch=2, activation_checkpointing="full", grad_accum=32)
    e = _printed(strategy)
    assert e["verdict"] == "tight"
    rows: list[dict[str, object]] = e["changes"]  # type: ignore[assignment]
    assert {"what", "device_bytes", "saves_bytes", "verdict", "runs"} == set(rows[0])
    by_name = {row["what"]: row for row in rows}
    for what, change in {
        "ZeRO-2": {"zero": 2},
        "micro-batch 1": {"micro_batch": 1, "grad_accum": 64},
    }.items():
        other = _printed(dataclasses.replace(strategy, **change))
        memory: dict[str, int] = other["memory"]  # type: ignore[assignment]
        assert by_name[what]["device_bytes"] == memory["device_bytes"]
        assert by_name[what]["verdict"] == other["verdict"] == "ok"
    assert by_name["8-bit AdamW"]["runs"] is True


def test_changes_are_combined_where_none_suffices() -> None:
    e = _printed(Strategy(zero=1, dp=8, micro_batch=8, grad_accum=8))
    rows: list[dict[str, object]] = e["changes"]  # type: ignore[assignment]
    assert e["verdict"] == "no"
    assert rows[0]["verdict"] == "ok"
    assert str(rows[0]["what"]).count(" + ") == 3


def test_what_fits_needs_no_change() -> None:
    e = _printed(
        Strategy(zero=3, dp=8, micro_batch=1, grad_accum=64, activation_checkpointing="full")
    )
    assert (e["verdict"], e["changes"]) == ("ok", [])

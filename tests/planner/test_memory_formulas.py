"""Formulas of memory against numbers that others printed."""

from __future__ import annotations

import numpy as np
import pytest

from outlay.planner.estimate.activations import Execution, block_saved, logits_bytes_per_token
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.memory import adapter_parameters, in_flight
from outlay.planner.estimate.software import DEEPSPEED, MEGATRON, SINGLE
from outlay.planner.estimate.states import QUANTIZED_BYTES, Held, state_bytes
from outlay.planner.spec.job import Finetune
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec
from outlay.planner.spec.strategy import Strategy

H, HEADS, SEQ = 1024, 16, 2048


def _gpt(dropout: float = 0.1) -> ModelSpec:
    attention = Attention(heads=HEADS, kv_heads=HEADS, head_dim=H // HEADS, dropout=dropout)
    block = Block(count=4, attention=attention, mlp=Mlp(ffn=4 * H, gated=False, activation="gelu"))
    return ModelSpec(name="gpt", source="test", family="gpt", hidden=H, vocab=51200, blocks=(block,),
                     positions="learned", max_positions=SEQ, norm="layernorm", residual_dropout=dropout)  # fmt: skip


def test_korthikanti_34_sbh() -> None:
    """arXiv 2205.05198, equation 1: s·b·h·(34 + 5·a·s/h) bytes, a token: 34·h and 5·a a key."""
    spec = _gpt()
    ex = Execution(width=2, kernels="fused", attention="eager")
    s = block_saved(spec, spec.blocks[0], ex)
    assert s.sharded + s.replicated == pytest.approx(34 * H, rel=0.002)
    assert s.scores == 5 * HEADS


def test_korthikanti_tensor_parallel() -> None:
    """Equation 2: 10 of the 34 are not divided by tensor parallelism."""
    spec = _gpt()
    s = block_saved(spec, spec.blocks[0], Execution(width=2, kernels="fused", attention="eager"))
    assert s.replicated == pytest.approx(10 * H, rel=0.002)


@pytest.mark.parametrize(
    ("pp", "vpp", "accumulate", "first", "last"),
    [(4, 1, 32, 4, 1), (8, 1, 2, 2, 1), (4, 3, 8, 15 / 3, 9 / 3), (4, 8, 8, 35 / 8, 29 / 8)],
)
def test_micro_batches_in_flight(
    pp: int, vpp: int, accumulate: int, first: float, last: float
) -> None:
    """1F1B: pp on the first stage, one on the last; interleaved by Megatron's warm-up count."""
    c = Candidates.of([Strategy(pp=pp, vpp=vpp, grad_accum=accumulate)])
    flight = in_flight(c)
    assert float(flight[0, 0]) == pytest.approx(first)
    assert float(flight[2, 0]) == pytest.approx(last)


def _states(
    strategy: Strategy, software: object, precision: str, **more: float
) -> dict[str, float]:
    c = Candidates.of([strategy])
    size = np.full((3, 1), 1e9)
    held = Held(
        dense=size, experts=0 * size, block=np.zeros(1), root=0 * size, largest_tensor=1e6, **more
    )
    s = state_bytes(
        held, c, software=software, precision=precision, optimizer="adamw", bucket=np.zeros(1)
    )  # type: ignore[arg-type]
    return {k: float(v[0, 0]) / 1e9 for k, v in vars(s).items()}


def test_megatron_holds_18_bytes_a_parameter() -> None:
    """Megatron-LM docs, distributed optimizer: 18 bytes; 6 + 12/d with it."""
    s = _states(Strategy(zero=0), MEGATRON, "bf16")
    assert s["parameters"] + s["gradients_held"] + s["optimizer_states"] == pytest.approx(18)
    s = _states(Strategy(zero=1, dp=4), MEGATRON, "bf16")
    assert s["parameters"] + s["gradients_held"] + s["optimizer_states"] == pytest.approx(
        6 + 12 / 4
    )


def test_zero_stages_of_the_paper() -> None:
    """ZeRO (arXiv 1910.02054, figure 1): 16Ψ, 4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N, 16Ψ/N with N = 64."""
    for stage, bytes_ in ((0, 16), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)):
        s = _states(Strategy(zero=stage, dp=64), DEEPSPEED, "bf16")
        assert s["parameters"] + s["gradients_held"] + s["optimizer_states"] == pytest.approx(
            bytes_, rel=1e-6
        )


def test_sixteen_bit_single_gpu_and_qlora() -> None:
    s = _states(Strategy(), SINGLE, "bf16")
    assert s["parameters"] + s["gradients_held"] + s["optimizer_states"] == pytest.approx(8)
    frozen = QUANTIZED_BYTES["nf4-dq"]
    s = _states(Strategy(), SINGLE, "bf16", trainable=0.0, frozen_bytes=frozen)
    assert s["parameters"] == pytest.approx(0.516, abs=1e-3)
    assert s["gradients_held"] == s["optimizer_states"] == 0


def test_lora_parameters_of_litgpt() -> None:
    """4,194,304 for Llama 2 7B at rank 8 on q and v (litgpt's table of fine-tuning memory)."""
    attention = Attention(heads=32, kv_heads=32, head_dim=128)
    block = Block(count=32, attention=attention, mlp=Mlp(ffn=11008, gated=True))
    spec = ModelSpec(name="l", source="test", family="llama", hidden=4096, vocab=32000, blocks=(block,),
                     positions="rotary", max_positions=4096)  # fmt: skip
    assert adapter_parameters(spec, Finetune(rank=8)) == 4_194_304


def test_frozen_weights_keep_no_linear_inputs() -> None:
    spec = _gpt(0.0)
    full = Execution(width=2, kernels="fused", attention="flash")
    lora = Execution(width=2, kernels="fused", attention="flash", finetune=Finetune(dropout=0.0))
    saved = (
        block_saved(spec, spec.blocks[0], full).sharded
        - block_saved(spec, spec.blocks[0], lora).sharded
    )
    assert saved == pytest.approx(2 * 4 * H)


def test_logits_of_a_plain_loss() -> None:
    """16-bit logits, fp32 copy and log-softmax and two fp32 gradients: 14 bytes an entry at the peak."""
    spec = _gpt()
    assert logits_bytes_per_token(spec, 2, loss="plain") == (6 * 51200, 14 * 51200)
    assert logits_bytes_per_token(spec, 4, loss="plain") == (8 * 51200, 16 * 51200)
    assert (
        logits_bytes_per_token(spec, 2, loss="plain", implementation="vocab_parallel")[1]
        == 6 * 51200
    )
    assert logits_bytes_per_token(spec, 2, loss="chunked")[0] == 0

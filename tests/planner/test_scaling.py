"""The scaling law against the papers' own optimal points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.scaling import (
    BESIROGLU,
    batch_tokens,
    loss,
    optimum,
    optimum_for_loss,
    optimum_for_parameters,
)
from outlay.planner.size.models import llama_of
from outlay.profiles.errors import UsageError

HOFFMANN_TABLE_3 = [
    (1.21e20, 1e9, 20.2e9), (1.23e22, 10e9, 205.1e9), (5.76e23, 67e9, 1.5e12),
    (3.85e24, 175e9, 3.7e12), (9.90e24, 280e9, 5.9e12), (1.27e26, 1e12, 21.2e12),
]  # fmt: skip
"""FLOPs, parameters, tokens: arXiv 2203.15556, table 3 (approach 1), which the refit agrees with."""


@pytest.mark.parametrize(("flops", "parameters", "tokens"), HOFFMANN_TABLE_3)
def test_optimal_points_of_the_paper(flops: float, parameters: float, tokens: float) -> None:
    """Besiroglu's fit of approach 3 lies within 20 % of approach 1's table."""
    best = optimum(flops)
    assert best.parameters == pytest.approx(parameters, rel=0.20)
    assert best.tokens == pytest.approx(tokens, rel=0.20)
    assert best.flops == pytest.approx(flops)


def test_chinchilla_itself() -> None:
    """70B on 1.4T tokens, about 20 tokens a parameter (arXiv 2203.15556, section 4.1)."""
    best = optimum(5.76e23)
    assert best.parameters == pytest.approx(70e9, rel=0.05)
    assert 17 < best.tokens / best.parameters < 23


@given(log_flops=st.floats(17, 27), factor=st.floats(0.5, 2.0))
def test_the_optimum_is_least(log_flops: float, factor: float) -> None:
    best = optimum(10**log_flops)
    n = best.parameters * factor
    assert loss(n, best.flops / 6 / n) >= best.loss - 1e-12


@given(log_flops=st.floats(17, 27), over=st.floats(1.0, 50.0))
def test_the_ways_back(log_flops: float, over: float) -> None:
    best = optimum(10**log_flops, overtrain=over)
    assert best.flops == pytest.approx(10**log_flops, rel=1e-9)
    assert optimum_for_loss(best.loss, overtrain=over).flops == pytest.approx(best.flops, rel=1e-6)
    plain = optimum(10**log_flops)
    again = optimum_for_parameters(plain.parameters)
    assert again.tokens == pytest.approx(plain.tokens, rel=1e-9)
    assert best.tokens / best.parameters == pytest.approx(over * plain.tokens / plain.parameters)


@pytest.mark.parametrize("wanted", [BESIROGLU.e, 1.0, 20.0, float("nan")])
def test_a_loss_out_of_reach(wanted: float) -> None:
    with pytest.raises(UsageError, match="out of reach"):
        optimum_for_loss(wanted)


@pytest.mark.parametrize("flops", [0.0, -1.0, float("inf")])
def test_no_compute(flops: float) -> None:
    with pytest.raises(UsageError):
        optimum(flops)


def test_batch_of_deepseek_67b() -> None:
    """4,608 sequences of 4,096 tokens for 67B parameters and 2T tokens (arXiv 2401.02954, table 2)."""
    assert batch_tokens(6 * 67e9 * 2e12) == pytest.approx(4608 * 4096, rel=0.1)


@pytest.mark.parametrize("parameters", [1e8, 1e9, 7e9, 7e10, 1e12])
def test_a_model_of_that_size(parameters: float) -> None:
    spec, config = llama_of(parameters, seq_len=2048)
    assert parameter_counts(spec).total == pytest.approx(parameters, rel=0.06)
    assert 50 < spec.hidden / spec.layers < 260
    assert config["hidden_size"] == spec.hidden


def test_no_model_of_that_size() -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        llama_of(1e3, seq_len=2048)

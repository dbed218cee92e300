"""How large a model, on how many tokens: compute-optimal training and what loss to expect.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 3: L(N, D) = E + A/N^alpha + B/D^beta for N parameters
and D tokens, with C = 6·N·D FLOPs. Constants are those of Besiroglu et al. 2024 (arXiv 2404.10102), who
fitted the same data anew and found the published ones inconsistent with it. The loss is nats a token on
Hoffmann's data (MassiveText) with its tokenizer: compare models by it, do not promise it on other data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from outlay.profiles.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Law:
    """The five constants of one fit."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str


BESIROGLU = Law(
    e=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658,
    source="Besiroglu et al. 2024 (arXiv 2404.10102), section 3",
)  # fmt: skip
HOFFMANN = Law(
    e=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28,
    source="Hoffmann et al. 2022 (arXiv 2203.15556), equation 10; inconsistent with its own data",
)  # fmt: skip
FLOPS_A_PARAMETER_TOKEN = 6.0
"""Forward 2, backward 4 (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); attention is not in it."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """A model and its data."""

    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        return FLOPS_A_PARAMETER_TOKEN * self.parameters * self.tokens


def loss(parameters: float, tokens: float, law: Law = BESIROGLU) -> float:
    """Expected loss, nats a token."""
    return float(law.e + law.a / parameters**law.alpha + law.b / tokens**law.beta)


def _check_overtrain(overtrain: float) -> None:
    if not 0 < overtrain < math.inf:
        raise UsageError(
            f"over-training of {overtrain:g} makes no sense", where="--overtrain",
            do="give a factor of 1 or more",
        )  # fmt: skip


def optimum(flops: float, *, overtrain: float = 1.0, law: Law = BESIROGLU) -> Optimum:
    """Parameters and tokens of least loss for so many FLOPs (Hoffmann, equation 4):
    N = G·(C/6)^a, D = (C/6)^b/G, G = (alpha·A/(beta·B))^(1/(alpha+beta)), a = beta/(alpha+beta).

    `overtrain` f: f times as many tokens a parameter for the same FLOPs, a smaller model that is cheaper to
    use: N/√f, D·√f.
    """
    if not 0 < flops < math.inf:
        raise UsageError(f"{flops:g} FLOPs train nothing")
    _check_overtrain(overtrain)
    whole = law.alpha + law.beta
    g = (law.alpha * law.a / (law.beta * law.b)) ** (1 / whole)
    product = flops / FLOPS_A_PARAMETER_TOKEN
    n = g * product ** (law.beta / whole) / math.sqrt(overtrain)
    d = product / n
    return Optimum(parameters=n, tokens=d, loss=loss(n, d, law))


def optimum_for_parameters(
    parameters: float, *, overtrain: float = 1.0, law: Law = BESIROGLU
) -> Optimum:
    """The tokens that make a model of that size compute-optimal, times the over-training."""
    _check_overtrain(overtrain)
    if not 0 < parameters < math.inf:
        raise UsageError(f"a model of {parameters:g} parameters makes no sense", do="give 7B")
    whole = law.alpha + law.beta
    g = (law.alpha * law.a / (law.beta * law.b)) ** (1 / whole)
    product = (parameters / g) ** (whole / law.beta)
    d = product / parameters * overtrain
    return Optimum(parameters=parameters, tokens=d, loss=loss(parameters, d, law))


def optimum_for_loss(wanted: float, *, overtrain: float = 1.0, law: Law = BESIROGLU) -> Optimum:
    """The least compute that reaches a loss. Along the optimum L − E falls as a power of C, so bisection
    over log C is exact to its tolerance."""
    if not law.e < wanted < 12:
        raise UsageError(
            f"a loss of {wanted:g} is out of reach",
            why=f"the law's floor is {law.e} nats a token however large the model ({law.source})",
            do=f"give a loss between {law.e + 0.03:.2f} and 12",
        )
    low, high = math.log(1e8), math.log(1e35)
    for _ in range(200):
        middle = (low + high) / 2
        if optimum(math.exp(middle), overtrain=overtrain, law=law).loss > wanted:
            low = middle
        else:
            high = middle
    return optimum(math.exp(high), overtrain=overtrain, law=law)


def batch_tokens(flops: float) -> float:
    """Tokens a step near the best for so much compute: 0.2920·C^0.3271 (DeepSeek LLM, arXiv 2401.02954,
    section 3.1, fitted to 1e17…2e19 FLOPs and used there at 67B and 2T tokens)."""
    return float(0.2920 * flops**0.3271)

"""A rule over strategies: a mask for the search, a message for a person, its evidence, and where it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from outlay.planner.estimate.candidates import Array, Candidates
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy

VERSIONS = ">=0.19.8,<0.20"
"""DeepSpeed's versions that `outlay run` takes and whose source was read line by line."""
READ = ">=0.12.6,<0.20"
"""Versions whose source was looked at for what an older DeepSpeed does."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rule may look at besides the candidates."""

    spec: ModelSpec
    job: Job
    cluster: Cluster


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One constraint."""

    name: str
    kind: str
    """arithmetic | deepspeed | runner | json, trainer (what `outlay emit` has words for)."""
    forbids: Callable[[Candidates, Context], Array]
    """True where the candidate is forbidden; [n]."""
    message: Callable[[Strategy, Context], str]
    evidence: str
    versions: str = READ
    """DeepSpeed's versions that it holds for."""
    effect: str = "illegal"
    """illegal: refused, or fails at the first step | ignored | changed: it starts and does something else, so
    nothing recommends it."""


RULES: list[Rule] = []


def rule(
    name: str,
    kind: str,
    evidence: str,
    message: Callable[[Strategy, Context], str],
    versions: str = READ,
    effect: str = "illegal",
) -> Callable[[Callable[[Candidates, Context], Array]], Callable[[Candidates, Context], Array]]:
    """Register a mask under its name."""

    def register(
        forbids: Callable[[Candidates, Context], Array],
    ) -> Callable[[Candidates, Context], Array]:
        made = Rule(
            name=name,
            kind=kind,
            forbids=forbids,
            message=message,
            evidence=evidence,
            versions=versions,
            effect=effect,
        )
        RULES.append(made)
        return forbids

    return register


def allowed(
    c: Candidates, x: Context, *, kinds: tuple[str, ...] = ("arithmetic", "deepspeed", "runner")
) -> Array:
    """True where no rule of these kinds forbids the candidate; [n]."""
    ok = np.ones(len(c), bool)
    for rule in RULES:
        if rule.kind in kinds:
            ok &= ~rule.forbids(c, x)
    return ok


def broken(
    strategy: Strategy,
    x: Context,
    *,
    kinds: tuple[str, ...] = ("arithmetic", "deepspeed", "runner"),
) -> list[tuple[Rule, str]]:
    """The rules that one strategy breaks, each with its message."""
    one = Candidates.of([strategy])
    return [
        (rule, rule.message(strategy, x))
        for rule in RULES
        if rule.kind in kinds and bool(rule.forbids(one, x)[0])
    ]

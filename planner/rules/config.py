"""A rule over a configuration: what it finds, how grave that is, its evidence, and a mend.

illegal   DeepSpeed, or the trainer in front of it, refuses to start or fails at the first step
ignored   it starts, and what the file says there has no effect
changed   it starts, and does something else than the file says
advice    it does what it says; something else would be better, or something is left over
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from outlay.planner.read.known import holds
from outlay.planner.read.meaning import DocEdit
from outlay.planner.rules.core import READ
from outlay.planner.rules.setup import Setup

LEVELS = ("illegal", "ignored", "changed", "advice")


@dataclass(frozen=True, kw_only=True)
class Found:
    """One place where a rule is broken."""

    what: str
    """One sentence with the numbers."""
    where: str
    """`file:line: key`."""
    do: str
    """The mend, in words."""
    edits: tuple[DocEdit, ...] = ()
    """The mend, as edits; empty where the files cannot say it."""
    level: str = ""
    """Where it differs from the rule's."""


@dataclass(frozen=True, kw_only=True)
class ConfigRule:
    """One constraint on what a file says."""

    name: str
    level: str
    evidence: str
    versions: str
    find: Callable[[Setup], Iterable[Found]]
    deepspeed: bool
    """It looks at the DeepSpeed configuration, so there must be one."""

    @property
    def summary(self) -> str:
        """The first line of its function's docstring."""
        return (self.find.__doc__ or "").strip().splitlines()[0]


_MODULES = (
    "keys", "batch", "precision", "zero", "offload", "optimizer", "params", "values", "accelerate", "frameworks",
    "arguments", "words", "launch",
)  # fmt: skip
CONFIG_RULES: list[ConfigRule] = []
"""Filled when `all_config_rules` is first called."""


def config_rule(
    name: str, level: str, evidence: str, *, versions: str = READ, deepspeed: bool = True
) -> Callable[[Callable[[Setup], Iterable[Found]]], Callable[[Setup], Iterable[Found]]]:
    """Register a rule under its name."""

    def register(find: Callable[[Setup], Iterable[Found]]) -> Callable[[Setup], Iterable[Found]]:
        rule = ConfigRule(
            name=name,
            level=level,
            evidence=evidence,
            versions=versions,
            find=find,
            deepspeed=deepspeed,
        )
        CONFIG_RULES.append(rule)
        return find

    return register


def all_config_rules() -> list[ConfigRule]:
    """Every rule over configurations, in the order of the modules, whichever was imported first."""
    order = [f"outlay.planner.rules.config_{module}" for module in _MODULES]
    for module in order:
        importlib.import_module(module)
    return sorted(CONFIG_RULES, key=lambda rule: order.index(rule.find.__module__))


def found_in(s: Setup) -> list[tuple[ConfigRule, Found]]:
    """All that the rules find, gravest first, in the order of the file's keys within a level."""
    rows = [
        (rule, found)
        for rule in all_config_rules()
        if (s.uses_deepspeed or not rule.deepspeed) and holds(rule.versions, s.version)
        for found in rule.find(s)
    ]
    return sorted(rows, key=lambda row: LEVELS.index(row[1].level or row[0].level))

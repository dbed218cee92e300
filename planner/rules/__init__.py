"""What is forbidden, one function a rule, each with its evidence and the DeepSpeed versions it holds for.

Rules over strategies (here) mask the search's candidates. Rules over configurations
(`outlay.planner.rules.config`) look at what a person's file says; `outlay check` imports those.
"""

from outlay.planner.rules import strategies  # first: messages come in this order

# isort: split
from outlay.planner.rules import (
    emitted,
    runner,
    runner_compress,
    runner_distill,
    runner_expert,
    runner_methods,
    runner_parallel,
)
from outlay.planner.rules.core import RULES, VERSIONS, Context, Rule, allowed, broken
from outlay.planner.rules.runner import OFFLOADED, PIPELINE_FAMILIES, ROWS

__all__ = [
    "OFFLOADED", "PIPELINE_FAMILIES", "ROWS", "RULES", "VERSIONS", "Context", "Rule", "allowed", "broken",
    "emitted", "runner", "runner_compress", "runner_distill", "runner_expert", "runner_methods", "runner_parallel",
    "strategies",
]  # fmt: skip

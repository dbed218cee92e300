"""How much is compressed at which step. Everything here follows from the step and the total alone,
so that a resume, and a run whose end moves with its budget, come to the same."""

from __future__ import annotations

from outlay.planner.spec.compress import Pruning, Qat


def bounds_of(pruning: Pruning, total: int) -> tuple[int, int]:
    """(first, last) step at which masks are chosen, counted from 0; the last is always run."""
    first = min(int(pruning.start * total), total - 1)
    if pruning.schedule == "one_shot":
        return first, first
    return first, max(first, min(round(pruning.end * total), total - 1))


def sparsity_at(pruning: Pruning, step: int, total: int) -> float:
    """Share of zeros that the masks chosen at `step` (0 … total-1) have.

    Zhu & Gupta 2017 (arXiv:1710.01878), equation 1, with nothing pruned at first:
    s = s_f·(1 − (1 − i/n)³) at the i-th of n updates.
    """
    first, last = bounds_of(pruning, total)
    if step < first:
        return 0.0
    if step >= last:
        return pruning.final_sparsity
    updates = min(pruning.updates, last - first)
    done = (step - first) * updates // (last - first)
    return pruning.final_sparsity * (1 - (1 - done / updates) ** 3)


def pruned_of_group(pruning: Pruning, sparsity: float) -> int:
    """Of each M neighbours, how many are zero on the way to N:M: whole weights, rounded down."""
    kept, group = pruning.kept_of()
    return min(group - kept, int(sparsity * group + 1e-9))


def quantizes_at(qat: Qat, step: int, total: int) -> bool:
    """Whether the forward passes of `step` see quantized weights."""
    return step >= min(int(qat.start * total), total - 1)

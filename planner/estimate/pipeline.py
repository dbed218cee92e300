"""How long a pipeline takes, from the passes of a micro-batch on its first, middle and last stage."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array


def slowest_stage(per_stage: Array) -> Array:
    """Index into {first, middle, last} of the stage with the most work; the later of equals, since
    the last of the middle stages waits least for its gradients. `per_stage` is [3, n]."""
    return np.asarray(2 - np.argmax(per_stage[::-1], axis=0))


def _around(t: Array, k: int, pp: Array) -> tuple[Array, Array, Array, Array | int]:
    """(time of all stages before stage k, of all after it, of the slowest after it, how many)."""
    first, middle, last = t
    inner, none = np.maximum(pp - 2, 0) * middle, np.zeros(last.shape)
    if k == 0:
        worst = np.maximum(np.where(pp > 2, middle, 0.0), last)
        return none, inner + last, worst, pp - 1
    if k == 1:
        return first + inner - middle, last, last, 1
    return first + inner, none, none, 0


def waits_s(forward: Array, backward: Array, pp: Array, vpp: Array, micro: Array) -> Array:
    """Time in which each stage of 1F1B would wait if it set the pace, a step [3, n]; passes are [3, n].

    A stage with n = min(stages after it, M − 1) forwards in flight before its first backward waits
    for the fill before it, for the round trip behind it less the n forwards, and at the end for the
    last micro-batch to come back less the n backwards. Equal stages give the (pp − 1)·(f + b) of
    Narayanan et al. 2021 (arXiv 2104.04473, section 2.2); vpp virtual stages a rank divide it by vpp.
    """
    per_stage = forward + backward
    found = np.zeros(per_stage.shape)
    if not (pp > 1).any():
        return found
    for k in range(3):
        exists = (pp > 1) & ((k != 1) | (pp > 2))
        before, after, worst, behind = _around(per_stage, k, pp)
        n = np.minimum(behind, np.maximum(micro - 1, 0))
        start = np.maximum(after, n * forward[k])
        # The last of the middle stages has one forward in flight, so its first cycle has no forward.
        cycle = np.maximum(np.where(pp > 2, backward[1], 0.0), per_stage[2])
        end = np.maximum(n * backward[k], np.minimum(after, (n - 1) * worst + cycle))
        found[k] = np.where(exists, (before + start + end - n * per_stage[k]) / vpp, 0.0)
    return found


def bubble_s(per_stage: Array, waits: Array, micro: Array) -> Array:
    """What the pipeline takes beyond the work of its slowest stage, a step [n].

    The stage that finishes last decides; which one changes with the number of micro-batches. An event
    simulation agrees within 1 % where stages differ as balanced ones do, within 4 % where they
    differ twofold and micro-batches are fewer than stages.
    """
    return np.asarray((micro * per_stage + waits).max(axis=0) - micro * per_stage.max(axis=0))


def zero_bubble_s(
    forward: Array, input_gradient: Array, weight_gradient: Array, pp: Array
) -> Array:
    """Idle seconds of a step under ZB-H1 with equal stages [n]: (pp - 1)·(f + b - w), where backward is cut
    into the gradient of the input (b) and of the weights (w), and the latter fills what would be idle
    (Qi et al., arXiv 2401.10241, table 2). As much activation memory as 1F1B. DeepSpeed has no such
    schedule, so no plan proposes it.

    Of at least 2·pp micro-batches; an event simulation agrees within 1 % there.
    """
    return np.asarray((pp - 1.0) * np.maximum(forward + input_gradient - weight_gradient, 0.0))


def two_way_bubble_s(forward: Array, backward: Array, pp: Array) -> Array:
    """Idle seconds of a step under DualPipe [n]: (pp/2 − 1)·(f&b + b − 3·w) of arXiv 2412.19437, table 2, with
    f&b = f + b for the pair that overlaps and w = b/2 for the weights' part of backward."""
    return np.asarray(np.maximum(pp / 2.0 - 1.0, 0.0) * (forward + backward / 2.0))

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
    Narayanan et al. 2021 (arXiv 2104.04473, section 2.2); `_interleaved_waits` has vpp > 1.
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
        found[k] = np.where(exists, before + start + end - n * per_stage[k], 0.0)
    if not (vpp > 1).any():
        return found
    return np.where(vpp > 1, _interleaved_waits(forward, backward, pp, vpp, micro), found)


def _interleaved_waits(
    forward: Array, backward: Array, pp: Array, vpp: Array, micro: Array
) -> Array:
    """The same [3, n] for vpp chunks a rank, each a vpp-th of it (Narayanan et al. 2021, section 2.2; micro-
    batches in groups of pp). A rank warms up two chunks for each rank behind it, so both round trips have
    n = min(2·behind, (M − pp)·vpp + pp − 1) passes beside them. Equal ranks give (pp − 1)·(f + b)/vpp.

    An event simulation agrees to the last bits where no rank is slower than those after it, as where all
    have as many blocks and the last the head, spread over its chunks or in its last alone. Elsewhere it is off:
    up to 4.2 % short where the first rank is up to a tenth slower, up to 2.6 % long where the first chunk alone is
    short by a tenth of a rank, up to 14 % short at M = pp where the ends have up to half a stage more.
    """
    per_rank, found = forward + backward, np.zeros(forward.shape)
    for k in range(3):
        exists = (pp > 1) & ((k != 1) | (pp > 2))
        before, after, _, behind = _around(per_rank, k, pp)
        n = np.clip((micro - pp) * vpp + pp - 1.0, 0.0, 2.0 * behind)
        fill = np.maximum(after - n * forward[k], 0.0)
        drain = np.maximum(after - n * backward[k], 0.0)
        found[k] = np.where(exists, (before + fill + drain) / vpp, 0.0)
    return found


def bubble_s(per_stage: Array, waits: Array, micro: Array) -> Array:
    """What the pipeline takes beyond the work of its slowest stage, a step [n].

    The stage that finishes last decides; which one changes with the number of micro-batches. An event
    simulation agrees within 1 % where stages differ as balanced ones do, within 4 % where they
    differ twofold and micro-batches are fewer than stages.
    """
    return np.asarray((micro * per_stage + waits).max(axis=0) - micro * per_stage.max(axis=0))


def zero_bubble_s(
    forward: Array, input_gradient: Array, weight_gradient: Array, pp: Array, micro: Array
) -> Array:
    """Idle seconds of a step under ZB-H1 with equal stages [n]: (pp − 1)·(f + b − w), where backward is cut
    into the gradient of the input (b) and of the weights (w), and the latter fills what would be idle
    (Qi et al., arXiv 2401.10241, table 2). As much activation memory as 1F1B.

    Of M micro-batches at most M − 1 weight gradients can fill it, and only where a stage waits for
    backward passes, never the (pp − 1)·f of the first forward: exact against an event simulation for
    any M where f/2 ≤ w ≤ f and 0.9 f ≤ b; a w that is longer than a wait leaves up to a fifth more.
    """
    filled = np.minimum(pp, micro) - 1.0
    rest = (pp - 1.0) * input_gradient - filled * weight_gradient
    return np.asarray((pp - 1.0) * forward + np.maximum(rest, 0.0))


def two_way_bubble_s(forward: Array, backward: Array, pp: Array) -> Array:
    """Idle seconds of a step under DualPipe [n]: (pp/2 − 1)·(f&b + b − 3·w) of arXiv 2412.19437, table 2, with
    f&b = f + b for the pair that overlaps and w = b/2 for the weights' part of backward."""
    return np.asarray(np.maximum(pp / 2.0 - 1.0, 0.0) * (forward + backward / 2.0))

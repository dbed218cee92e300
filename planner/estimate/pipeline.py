"""How long a pipeline takes, from the time of a micro-batch on its first, middle and last stage."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import Array


def all_stages(first: Array, middle: Array, last: Array, pp: Array) -> Array:
    """Sum over the pp stages; with pp = 1, `last` is the same stage as `first`."""
    return np.where(pp > 1, first + last + np.maximum(pp - 2, 0) * middle, last)


def bubble_s(per_stage: Array, slowest: Array, pp: Array, vpp: Array) -> Array:
    """Time in which the slowest stage has nothing to do [n]; `per_stage` is [3, n].

    1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): the first micro-batch passes all
    stages forward and backward, then the slowest stage sets the pace: sum + (M − 1)·slowest, of
    which M·slowest is work. With vpp virtual stages a rank the fill is divided by vpp. An event
    simulation in the tests agrees within 1 %.
    """
    fill = all_stages(per_stage[0], per_stage[1], per_stage[2], pp) - slowest
    return np.where(pp > 1, fill / vpp, 0.0)

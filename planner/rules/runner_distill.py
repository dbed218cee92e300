"""What `outlay run` does not execute of a distillation."""

from __future__ import annotations

import numpy as np

from outlay.planner.estimate.candidates import LOSS, Array, Candidates
from outlay.planner.rules.core import Context, rule

DISTILL_RULES = ("distills_whole_logits",)
"""Those of this file; the runner refuses by them too (runner/refuse.py)."""


@rule(
    "distills_whole_logits",
    "runner",
    "runner/compress/distill.py: the student's logits are set against the teacher's as a whole, on one rank",
    lambda s, x: (
        f"distillation is run with data parallelism and the plain loss (pp {s.pp}, tp {s.tp}, sp {s.sp}, "
        f"loss {s.loss}); --pp 1 --tp 1 --sp 1 --loss plain"
    ),
)
def distills_whole_logits(c: Candidates, x: Context) -> Array:
    distills = x.job.compress is not None and x.job.compress.distill is not None
    spread = (c.pp > 1) | (c.tp > 1) | (c.sp > 1) | (c.loss != LOSS.index("plain"))
    return np.asarray(spread & distills)

"""Feeds what a run measured back to the planner (planner/own_runs.py)."""

from __future__ import annotations

from pathlib import Path

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate, software_for
from outlay.planner.own_runs import append
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.measurement import Measurement
from outlay.planner.spec.plan import Plan

LEAST_STEPS = 3
"""Fewer timed steps say too little to correct anything."""


def record(plan: Plan, m: Measurement) -> Path | None:
    """Append the run to this user's own measurements, beside the planner's uncorrected prediction.
    None where nothing was written: too few steps, a compiled model (which is not what was predicted), an
    accelerator whose speed is unknown, or switched off."""
    if m.step_s is None or m.steps_timed < LEAST_STEPS or plan.job.compile:
        return None
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=plan.model.source)
    found = evaluate(spec, plan.job, plan.cluster, Candidates.of([plan.strategy]), own=False)
    if found.step is None:
        return None
    return append(
        spec=spec,
        job=plan.job,
        cluster=plan.cluster,
        strategy=plan.strategy,
        software=software_for(plan.cluster).family,
        measured_s=m.step_s,
        predicted_s=float(found.step.time_s[0]),
        name=m.id,
        measured_at=m.measured_at,
    )

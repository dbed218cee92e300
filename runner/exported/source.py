"""What is exported: a run, one of its checkpoints, or any folder of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from outlay.planner.spec.files import parse, read_mapping
from outlay.planner.spec.measurement import Outcome
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import CheckpointError, FileError, UsageError
from outlay.runner.evaluate.load import Folder, read_folder
from outlay.runner.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Source:
    """Dense weights, and what is known of how they came to be."""

    dense: Folder
    run: RunFolder | None = None
    plan: Plan | None = None
    outcome: Outcome | None = None
    """Null where the run did not end, or a checkpoint was named that is not its last."""
    step: int | None = None


def find(path: Path, work: Path) -> Source:
    """`work`: an empty folder that may hold weights gathered from a checkpoint."""
    if not path.exists():
        raise UsageError("no such folder", where=str(path))
    run = RunFolder(path)
    if run.is_run():
        return _of_run(run, work)
    if path.name.startswith("step-") and RunFolder(path.resolve().parent.parent).is_run():
        return _of_checkpoint(RunFolder(path.resolve().parent.parent), path.resolve(), work)
    folder = read_folder(path)
    if folder.packed is not None:
        raise UsageError(
            f"these weights are packed already ({folder.packed})", where=str(path),
            do="export from the run, or from dense weights",
        )  # fmt: skip
    above = RunFolder(path.resolve().parent)
    if above.is_run() and path.resolve() == above.export.resolve():
        return _of_run(above, work)
    return Source(dense=folder)


def _of_run(run: RunFolder, work: Path) -> Source:
    """The export that its end wrote; where there is none, the newest checkpoint that verifies."""
    outcome = _outcome(run)
    if outcome is not None and outcome.export is not None and run.export.is_dir():
        dense = read_folder(run.export)
        plan = run.read_plan()
        return Source(dense=dense, run=run, plan=plan, outcome=outcome, step=outcome.steps)
    from outlay.runner.checkpoint import newest_valid

    newest, rejected = newest_valid(run.checkpoints)
    if newest is None:
        why = "; ".join(f"{r.path.name}: {r.reason}" for r in rejected) or "it has none"
        raise CheckpointError(
            "this run has no checkpoint that verifies", where=str(run.root), why=why
        )
    return _of_checkpoint(run, newest, work)


def _of_checkpoint(run: RunFolder, checkpoint: Path, work: Path) -> Source:
    from outlay.runner.exported.gather import write_dense

    plan, outcome = run.read_plan(), _outcome(run)
    step = int(checkpoint.name.rpartition("-")[2])
    tokenizer = run.dataset(plan) / "tokenizer.json" if plan.job.data is not None else None
    write_dense(
        plan, checkpoint.absolute(), tokenizer if tokenizer and tokenizer.is_file() else None,
        work / "dense",
    )  # fmt: skip
    known = outcome if outcome is not None and outcome.steps == step else None
    return Source(dense=read_folder(work / "dense"), run=run, plan=plan, outcome=known, step=step)


def _outcome(run: RunFolder) -> Outcome | None:
    if not run.outcome.is_file():
        return None
    return parse(Outcome, read_mapping(run.outcome), path=run.outcome)


def read_record(folder: Path) -> dict[str, object]:
    """The `outlay.json` of an earlier export in that folder; empty where there is none."""
    path = folder / "outlay.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError("not valid JSON", where=str(path), why=str(error)) from None
    if not isinstance(value, dict):
        raise FileError("this is no record of an export", where=str(path))
    return value


def training_usd(folder: Path) -> float | None:
    """What the run that made this folder cost: by the folder's own `outlay.json`, or by its run. Null = unknown."""
    training = read_record(folder).get("training")
    if isinstance(training, dict):
        cost = training.get("cost_usd")
        return float(cost) if isinstance(cost, int | float) else None
    run = RunFolder(folder.resolve().parent)
    if not run.is_run() or folder.resolve() != run.export.resolve():
        return None
    outcome = _outcome(run)
    return None if outcome is None else outcome.cost_usd

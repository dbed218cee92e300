"""What planner's commands share: the question as a job file and flags put it, and the way out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.profiles.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.job import Job
    from outlay.planner.spec.model import ModelSpec


def console() -> Console:
    """stdout; a pipe gets 110 columns (or COLUMNS) and no colours."""
    from rich.console import Console

    known = sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))
    return Console(soft_wrap=False, width=None if known else 110)


def emit_text(text: str, out: str | None) -> None:
    """To the file, or to stdout."""
    from outlay.planner.spec.files import write_text

    if out:
        write_text(out, text)
        click.echo(f"wrote {out}", err=True)
    else:
        click.echo(text, nl=not text.endswith("\n"))


class Question:
    """Model, job and cluster as resolved from a job file and flags."""

    def __init__(self, job_file: str | None, flags: dict[str, Any]) -> None:
        from outlay.planner.hardware import resolve_hardware
        from outlay.planner.jobs import JobFile, merge, read_job_file, resolve_job
        from outlay.planner.options import show_money
        from outlay.planner.spec.families import resolve_model

        file = merge(read_job_file(job_file) if job_file else JobFile(), flags)
        if not file.model:
            raise UsageError("no model", do="pass --model, or a job file with the key `model`")
        self.spec: ModelSpec
        self.spec, self.config = resolve_model(file.model)
        self.weights = _weights(file.model)
        self.cluster: Cluster = resolve_hardware(
            file.hardware or "probe",
            inter_node_gbps=file.inter_node_gbps,
            price_usd_per_h=file.price_usd_per_h,
        )
        resolved = resolve_job(file, self.spec, self.cluster)
        self.job: Job = resolved.job
        show_money(self.job.currency)
        self.assumptions = resolved.assumptions
        if self.weights:
            self.assumptions.append(
                {
                    "what": "weights",
                    "value": self.weights,
                    "source": "the folder has safetensors: training starts from them "
                    "(pass its config.json instead to start from random weights)",
                }
            )


def _weights(reference: str) -> str | None:
    """A model folder with safetensors is a pretrained model; a config alone is a shape."""
    folder = Path(reference).expanduser()
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        return str(folder.resolve())
    return None

"""`outlay emit`: a plan in the format that another program reads."""

from __future__ import annotations

import click

from outlay.planner.commands.question import emit_text


@click.group()
def emit() -> None:
    """Write a plan in the format that another program reads."""


@emit.command("deepspeed")
@click.argument("plan_file")
@click.option("--nvme-path", help="Folder on every node's drive, where the plan offloads to NVMe.")
@click.option("--out", help="Write there instead of stdout.")
def emit_deepspeed(plan_file: str, nvme_path: str | None, out: str | None) -> None:
    """The DeepSpeed JSON of a plan."""
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.emit.writable import writable_spec
    from outlay.planner.planning import read_plan
    from outlay.planner.spec.files import to_json

    p = read_plan(plan_file)
    spec = writable_spec(p, plan_file, nvme_path)
    config = deepspeed_config(p.job, p.strategy, spec, p.cluster, nvme_path=nvme_path)
    emit_text(to_json(config), out)


@emit.command("trainer")
@click.argument("plan_file")
@click.option("--nvme-path", help="Folder on every node's drive, where the plan offloads to NVMe.")
@click.option("--out", required=True, help="Folder to write; new or empty.")
def emit_trainer(plan_file: str, nvme_path: str | None, out: str) -> None:
    """A folder for Hugging Face's Trainer: arguments, JSON, script and command."""
    from pathlib import Path

    from outlay.planner.emit.trainer import trainer_files
    from outlay.planner.emit.writable import writable_spec
    from outlay.planner.planning import read_plan
    from outlay.profiles.errors import UsageError

    p = read_plan(plan_file)
    spec = writable_spec(p, plan_file, nvme_path)
    files = trainer_files(p, spec, plan_file, nvme_path)
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError("there is something already", where=out, do="name a new folder")
    for name, text in files.items():
        emit_text(text, str(folder / name))

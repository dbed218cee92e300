"""`outlay emit`: a plan in the format that another program reads."""

from __future__ import annotations

from typing import Any

import click

from outlay.planner.commands.question import emit_text
from outlay.planner.emit.order import Emitted, Order
from outlay.planner.emit.targets import FOLDERS, Target
from outlay.profiles.errors import UsageError

_OPTIONS = {
    "base_model": click.option(
        "--base-model",
        help="Weights and tokenizer to start from: a hub id, or a folder as the nodes see it.",
    ),
    "data": click.option(
        "--data", help="Text to train on, as the nodes see it (kubernetes: CLAIM/PATH)."
    ),
    "hosts": click.option(
        "--hosts", default="", help="Names of the nodes, with commas; the first has rank 0."
    ),
    "sbatch": click.option(
        "--sbatch", "lines", multiple=True, help="A further option of sbatch, as --partition=gpu."
    ),
    "image": click.option("--image", help="Container image with torch and a CUDA compiler."),
}


class Targets(click.Group):
    """Names the nearest targets where one is not known."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            import difflib

            near = difflib.get_close_matches(name.lower(), self.commands, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"No target {name!r}.{hint} Known: {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


@click.group(cls=Targets)
def emit() -> None:
    """Write a plan in the format that another program reads."""


def _shared(command: Any) -> Any:
    """The plan and the options that every target has."""
    for decorate in (
        click.option(
            "--deepspeed", "version", help="DeepSpeed that will read it; nothing that it does not know."
        ),
        click.option(
            "--nvme-path", help="Folder on every node's drive, where the plan offloads to NVMe."
        ),
        click.argument("plan_file"),
    ):  # fmt: skip
        command = decorate(command)
    return command


def _order(plan_file: str, nvme_path: str | None, version: str | None, **named: Any) -> Order:
    """The plan, checked, with its JSON for the DeepSpeed that was asked for."""
    from outlay.planner.emit import versions
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.emit.writable import writable_spec
    from outlay.planner.planning import read_plan

    asked = versions.version(version) if version else None
    plan = read_plan(plan_file)
    spec = writable_spec(plan, plan_file, nvme_path)
    config = deepspeed_config(plan.job, plan.strategy, spec, plan.cluster, nvme_path=nvme_path)
    if asked:
        versions.require_known(config, asked.name, plan_file)
        click.echo(f"DeepSpeed {asked.name}: parsed by that version: {asked.verdict}", err=True)
    hosts = tuple(h.strip() for h in (named.pop("hosts", None) or "").split(",") if h.strip())
    lines = tuple(named.pop("lines", None) or ())
    return Order(
        plan=plan, spec=spec, where=plan_file, deepspeed=config, hosts=hosts, lines=lines,
        version=asked.name if asked else versions.WRITTEN_FOR, **named,
    )  # fmt: skip


@emit.command("deepspeed")
@_shared
@click.option("--out", help="Write there instead of stdout.")
def emit_deepspeed(
    plan_file: str, nvme_path: str | None, version: str | None, out: str | None
) -> None:
    """The DeepSpeed JSON of a plan, every value explicit."""
    from outlay.planner.emit.deepspeed import left_to_the_script
    from outlay.planner.spec.files import require_new, to_json

    order = _order(plan_file, nvme_path, version)
    text = to_json(order.deepspeed)
    if out is not None:
        require_new(out, text)
    emit_text(text, out)
    for note in left_to_the_script(order.plan.job, order.plan.strategy):
        click.echo(f"note: {note}", err=True)


def _write(emitted: Emitted, out: str) -> None:
    import shlex
    from pathlib import Path

    from outlay.planner.spec.files import write_text

    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError("there is something already", where=out, do="name a new folder")
    for name, text in emitted.files.items():
        write_text(folder / name, text)
    click.echo(f"wrote {out}: {', '.join(emitted.files)}", err=True)
    for note in emitted.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"next: cd {shlex.quote(out)} && {emitted.command}", err=True)


def _add(target: Target) -> None:
    """`outlay emit NAME`, for a target that is a folder."""

    def callback(plan_file: str, out: str, **named: Any) -> None:
        order = _order(plan_file, named.pop("nvme_path"), named.pop("version"), **named)
        _write(target.write(order), out)

    command: Any = click.option("--out", required=True, help="Folder to write; new or empty.")(
        callback
    )
    for option in reversed(target.takes):
        command = _OPTIONS[option](command)
    command = _shared(command)
    command.__doc__ = target.line
    emit.command(target.name, short_help=target.line)(command)


for _target in FOLDERS:
    _add(_target)

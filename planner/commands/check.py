"""`outlay check`: a configuration that somebody already has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.commands.question import console
from outlay.planner.estimate.candidates import CHECKPOINTING
from outlay.planner.options import OPTIMIZERS, format_option
from outlay.planner.read.kinds import KINDS
from outlay.planner.read.known import LATEST
from outlay.profiles.errors import UsageError

if TYPE_CHECKING:
    from outlay.planner.check.answer import Answer, Request


@click.command()
@click.argument("file")
@click.option(
    "--hardware", help="ACCELERATOR:COUNT[/PER_NODE], PROVIDER/INSTANCE:COUNT, cluster.yaml, probe."
)
@click.option("--inter-node-gbps", type=float, help="Network of one node, gigabits a second.")
@click.option(
    "--price-usd-per-h", type=float, help="Of all the hardware, where the catalog has no price."
)
@click.option(
    "--model", help="Preset, folder or config.json, where the file does not name one that is here."
)
@click.option(
    "--seq-len", type=click.IntRange(1), help="Tokens a sequence, where the file does not say it."
)
@click.option("--micro-batch", type=click.IntRange(1), help="Likewise.")
@click.option("--grad-accum", type=click.IntRange(1), help="Likewise.")
@click.option("--activation-checkpointing", type=click.Choice(CHECKPOINTING), help="Likewise.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Likewise.")
@click.option("--finetune", help="full, lora:r16, qlora:r16, where the script decides it.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of the run.")
@click.option("--tokens", help="Tokens of the run, e.g. 2B.")
@click.option("--data", help="Its data, counted for the file's epochs.")
@click.option(
    "--deepspeed",
    "version",
    default=LATEST,
    show_default=True,
    metavar="VERSION",
    help="Whose rules hold.",
)
@click.option(
    "--as",
    "kind",
    type=click.Choice(KINDS),
    help="Whose configuration it is, where its keys leave that open.",
)
@click.option(
    "--fix", is_flag=True, help="Make it fit: the nearest change that is ok by the estimate."
)
@click.option(
    "--better", is_flag=True, help="Take up what is clearly faster, where it fits already."
)
@click.option(
    "--write",
    "out",
    metavar="OUT",
    help="Write the mended file there; the exit code is then of OUT.",
)
@click.option("--strict", is_flag=True, help="Exit 2 for anything that is ignored or changed, too.")
@format_option("table", "json", "md")
def check(file: str, format_: str, out: str | None, kind: str | None, **flags: Any) -> None:
    """What a configuration means, what will happen, what is wrong, and the mend.

    FILE: ds_config.json, an Accelerate, axolotl or LLaMA-Factory YAML, Trainer arguments, or a shell file that
    starts the training. Exit codes: 0 it starts and fits (or that is not known), 2 it will not start, or FILE
    cannot be read, 3 it starts and does not fit.
    """
    from outlay.planner.check.answer import check as answer_of
    from outlay.planner.check.answer import exit_code_after
    from outlay.planner.read.document import read_document

    request = _request(**flags)
    path = Path(file).expanduser()
    if out is not None and Path(out).expanduser().resolve() == path.resolve():
        raise UsageError(
            "--write would overwrite the file that is checked",
            where="--write",
            do="name another file",
        )
    answer = answer_of(read_document(path, file), kind, request)
    code = answer.exit_code
    if out is not None:
        _require_suffix(answer, path, out)
        _write(answer, out)
        code = exit_code_after(answer)
    _print(answer, format_, out, fix=request.fix)
    sys.exit(code)


def _request(
    *, hardware: str | None, inter_node_gbps: float | None, price_usd_per_h: float | None, model: str | None,
    version: str, fix: bool, better: bool, strict: bool, **asked: Any,
) -> Request:  # fmt: skip
    from outlay.planner.check.answer import Request
    from outlay.planner.check.question import Asked
    from outlay.planner.hardware import resolve_hardware
    from outlay.planner.read.known import parse_version

    cluster = None
    if hardware is not None:
        cluster = resolve_hardware(
            hardware, inter_node_gbps=inter_node_gbps, price_usd_per_h=price_usd_per_h
        )
    return Request(
        cluster=cluster, model=model, version=parse_version(version), fix=fix, better=better, strict=strict,
        asked=Asked(**asked),
    )  # fmt: skip


def _require_suffix(answer: Answer, path: Path, out: str) -> None:
    """Refuse to write the configuration that a command names into a file that looks like a command."""
    from outlay.planner.read.meaning import MAIN

    main = answer.before.documents[MAIN].path
    if main.resolve() != path.resolve() and Path(out).suffix != main.suffix:
        raise UsageError(
            f"the command names {main}, and that is what is mended", where=f"--write {out}",
            do=f"name a file that ends in {main.suffix}, and let the command name it",
        )  # fmt: skip


def _write(answer: Answer, out: str) -> None:
    from outlay.planner.read.meaning import FIXED
    from outlay.planner.spec.files import require_new, write_text

    texts = answer.texts(out)
    for name, text in texts.items():
        require_new(name, text)
    for name, text in texts.items():
        write_text(name, text)
        fixed = [f for f in FIXED.values() if name != out and name.endswith(f".{f}")]
        place = f", to be put in the place of {fixed[0]}" if fixed else ""
        click.echo(f"wrote {name}{place}", err=True)
    answer.value["written"] = list(texts)


def _print(answer: Answer, format_: str, out: str | None, *, fix: bool) -> None:
    from outlay.planner.check.report import markdown, print_check
    from outlay.planner.spec.files import to_json

    if format_ == "json":
        click.echo(to_json(answer.value), nl=False)
    elif format_ == "md":
        click.echo(markdown(answer.value), nl=False)
    else:
        hint = (
            ""
            if out
            else ": --write OUT writes it"
            + (", --fix makes it fit" if answer.value["fit"] and not fix else "")
        )
        print_check(console(), answer.value, write_hint=hint)

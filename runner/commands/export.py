"""`outlay export`: a run's weights as a folder for others, dense or packed, with a model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from outlay.planner.spec.packing import Packing
    from outlay.runner.exported.source import Source
    from outlay.runner.exported.write import Chosen


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT|FOLDER")
@click.option("--out", required=True, help="Folder to write; must be new or empty.")
@click.option(
    "--quantize", help="none, int8, int8-dynamic, int4:g32; default: as the run was trained for."
)
@click.option(
    "--at-most", help="Size of the folder, e.g. 4GB: bits are taken where text says it costs least."
)
@click.option("--data", help="A folder that `outlay data prepare` wrote; default: the run's.")
@click.option(
    "--calibration", type=click.IntRange(1), default=16, show_default=True,
    help="Windows of the training part that --at-most reads for each matrix.",
)  # fmt: skip
@click.option("--seq-len", type=click.IntRange(2), help="Tokens a window; default: the run's.")
@click.option(
    "--evaluate", is_flag=True, help="Read held-out text before and after; into the card."
)
def export(
    source: str, out: str, quantize: str | None, at_most: str | None, data: str | None,
    calibration: int, seq_len: int | None, evaluate: bool,
) -> None:  # fmt: skip
    """A run's weights as a folder for others, dense or packed, with a model card.

    RUN: its export, or else its newest checkpoint that verifies. int8 is packed by torchao, int4 and
    mixtures by compressed-tensors; transformers loads them all, dense ones by itself.
    """
    from outlay.runner.commands.run import require_run_extra
    from outlay.runner.exported.write import require_new

    require_run_extra()
    if quantize is not None and at_most is not None:
        raise UsageError(
            "--at-most chooses the packing itself", do="leave out --quantize or --at-most"
        )
    limit = None if at_most is None else parse_bytes(at_most, where="--at-most")
    packing = _packing(quantize)
    target = Path(out)
    require_new(target)
    with tempfile.TemporaryDirectory(prefix="outlay-export-") as work:
        from outlay.runner.exported.source import find

        found = find(Path(source), Path(work))
        if quantize is None and limit is None:
            packing, limit = _as_planned(found)
        text = _Text(found, data, seq_len, calibration)
        chosen = _chosen(found, packing, limit, text)
        _write(found, chosen, target, text if evaluate else None, limit)


def _packing(text: str | None) -> Packing | None:
    from outlay.planner.spec.packing import Packing

    return None if text in (None, "none") else Packing.parse(str(text))


def _as_planned(found: Source) -> tuple[Packing | None, int | None]:
    """(packing, size limit) of the job's `compress` block."""
    from outlay.planner.spec.packing import Packing

    asked = None if found.plan is None else found.plan.job.compress
    if asked is None:
        return None, None
    if asked.qat is not None:
        return Packing.of_training(asked.qat), None
    return None, None if asked.export_bytes is None else int(asked.export_bytes)


class _Text:
    """Where text comes from, asked for only when it is needed."""

    def __init__(self, found: Source, data: str | None, seq_len: int | None, windows: int) -> None:
        self.found, self.data, self.given, self.windows = found, data, seq_len, windows

    def folder(self) -> Path:
        if self.data is not None:
            return Path(self.data)
        if self.found.run is None or self.found.plan is None:
            raise UsageError("on what text?", do="pass --data")
        return self.found.run.dataset(self.found.plan)

    def seq_len(self) -> int:
        if self.given is not None:
            return self.given
        if self.found.plan is not None:
            return self.found.plan.job.seq_len
        limit = int(self.found.dense.config.get("max_position_embeddings") or 1024)
        return min(1024, limit)


def _chosen(found: Source, packing: Packing | None, limit: int | None, text: _Text) -> Chosen:
    from outlay.runner.exported.choice import calibration_tokens, described, mixture, uniform

    if limit is None:
        return uniform(found.dense, packing)
    tokens = calibration_tokens(text.folder(), text.seq_len(), text.windows)
    done: list[str] = []

    def progress(name: str) -> None:
        done.append(name)
        if len(done) % 10 == 0:
            click.echo(f"measured {len(done)} matrices", err=True)

    chosen = mixture(found.dense, limit, tokens, batch=8, progress=progress)
    click.echo(f"within {format_bytes(limit)}: {described(chosen)}", err=True)
    return chosen


def _write(found: Source, chosen: Chosen, out: Path, text: _Text | None, limit: int | None) -> None:
    from outlay.profiles.errors import NotFeasible
    from outlay.runner.evaluate.load import hushed, read_folder
    from outlay.runner.exported.write import finish, new_partial, record_of, write

    partial = new_partial(out)
    try:
        with hushed():
            write(found, chosen, partial)
        evaluation = None if text is None else _evaluation(found, partial, text)
        record = record_of(found, chosen, partial, evaluation)
        finish(record, partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = read_folder(out).folder_bytes
    click.echo(
        f"{out}: {chosen.name}, weights {record.weights_bytes:,} bytes "
        f"({record.weights_bytes / record.dense_bytes:.3f} of dense; "
        f"planned {record.planned_bytes:,}, {record.weights_bytes / record.planned_bytes - 1:+.2%}), "
        f"folder {format_bytes(size)}"
    )
    if limit is not None and size > limit:
        raise NotFeasible(
            f"the folder has {size:,} bytes, the limit is {limit:,}", where=str(out),
            do="ask for a little less",
        )  # fmt: skip


def _evaluation(found: Source, partial: Path, text: _Text) -> dict[str, Any]:
    """Dense and exported on the same held-out windows; speed is `outlay eval`'s."""
    from outlay.planner.spec.files import plain
    from outlay.runner.evaluate.load import hushed, read_folder
    from outlay.runner.evaluate.report import evaluate
    from outlay.runner.evaluate.text import held_out

    read = held_out(text.folder(), seq_len=text.seq_len(), sequences=256)
    targets = [("dense", found.dense), ("exported", read_folder(partial))]
    with hushed():
        made: dict[str, Any] = plain(evaluate(targets, read, batch=8, repeats=0))
    made["text"]["path"] = Path(read.path).name
    for model in made["models"]:
        # where it was measured before it had its name, and on whose machine, is nobody's business
        model["folder"] = Path(model["folder"]).name.removeprefix(".").split(".partial-")[0]
    return made

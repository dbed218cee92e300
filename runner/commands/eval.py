"""`outlay eval`: loss, size and speed of finished models on this machine, each with an interval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.options import format_option
from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_seconds, format_usd

if TYPE_CHECKING:
    from rich.console import Console

    from outlay.runner.evaluate.intervals import Measured
    from outlay.runner.evaluate.load import Folder
    from outlay.runner.evaluate.report import Difference, Evaluated, Evaluation

DEFAULT_SEQ_LEN = 1024
"""Of a folder whose run is not known, unless its positions end before."""

FEWEST_REPEATS = 5


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN|FOLDER…")
@click.option("--data", help="A folder that `outlay data prepare` wrote; default: the run's.")
@click.option("--seq-len", type=click.IntRange(2), help="Tokens a window; default: the run's.")
@click.option(
    "--sequences", type=click.IntRange(1), default=256, show_default=True,
    help="Held-out windows to read, at most.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows at once."
)
@click.option(
    "--repeats", type=click.IntRange(0), default=20, show_default=True,
    help="Of each timing; 0 = speed is not measured.",
)  # fmt: skip
@format_option("table", "json")
@click.option("--out", help="Write there instead of to stdout.")
def eval(
    targets: tuple[str, ...], data: str | None, seq_len: int | None, sequences: int, batch: int,
    repeats: int, format_: str, out: str | None,
) -> None:  # fmt: skip
    """Loss, size and speed of finished models on this machine, each with an interval.

    RUN|FOLDER: a run that has exported, or a folder of transformers. Several are read on the same text,
    timed in turn and compared with the first. Intervals are 90 %: losses are resampled by document,
    times by repeat.
    """
    from outlay.planner.commands.question import console, emit_text
    from outlay.planner.spec.files import to_json
    from outlay.runner.commands.run import require_run_extra

    require_run_extra()
    if 0 < repeats < FEWEST_REPEATS:
        raise UsageError(
            f"{repeats} repeats have no interval", where="--repeats",
            do=f"at least {FEWEST_REPEATS}, or 0 to leave speed out",
        )  # fmt: skip
    from outlay.runner.evaluate.load import hushed
    from outlay.runner.evaluate.report import evaluate
    from outlay.runner.evaluate.text import held_out

    found = [(target, *_resolve(Path(target))) for target in targets]
    folders = [(name, folder) for name, folder, _ in found]
    known = next((run for _, _, run in found if run is not None), None)
    text = held_out(
        _data(data, known), seq_len=_seq_len(seq_len, known, folders), sequences=sequences
    )
    with hushed():
        result = evaluate(folders, text, batch=batch, repeats=repeats)
    if format_ == "json":
        emit_text(to_json(result), out)
        return
    if out:
        raise UsageError("--out writes JSON", do="add --format json")
    print_evaluation(console(), result)


def _resolve(path: Path) -> tuple[Folder, Path | None]:
    """(folder of transformers, the run that it comes from if that is known)."""
    from outlay.runner.evaluate.load import read_folder
    from outlay.runner.folder import RunFolder

    if not path.is_dir():
        raise UsageError("no such folder", where=str(path))
    if RunFolder(path).is_run():
        export = RunFolder(path).export
        if not export.is_dir():
            raise UsageError(
                "this run has exported nothing", where=str(path),
                do=f"outlay export {path} --out FOLDER, then evaluate that",
            )  # fmt: skip
        return read_folder(export), path
    above = path.resolve().parent
    return read_folder(path), above if RunFolder(above).is_run() else None


def _data(given: str | None, run: Path | None) -> Path:
    from outlay.runner.folder import RunFolder

    if given is not None:
        return Path(given)
    if run is None:
        raise UsageError("on what text?", do="pass --data, or the run that trained it")
    folder = RunFolder(run)
    return folder.dataset(folder.read_plan())


def _seq_len(given: int | None, run: Path | None, folders: list[tuple[str, Folder]]) -> int:
    from outlay.runner.folder import RunFolder

    limits = [
        f.config.get("max_position_embeddings") or f.config.get("n_positions") for _, f in folders
    ]
    limit = min((int(n) for n in limits if n), default=None)
    if given is not None:
        if limit is not None and given > limit:
            raise UsageError(
                f"the model has {limit} positions, windows of {given} do not fit", where="--seq-len"
            )
        return given
    if run is not None:
        return RunFolder(run).read_plan().job.seq_len
    return min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)


def print_evaluation(out: Console, e: Evaluation) -> None:
    """One column a model; for several, what each differs by from the first."""
    from rich.table import Table

    text, machine = e.text, e.machine
    out.print(
        f"text     {text.path}: {text.windows} held-out windows of {text.seq_len}, "
        f"{text.predicted_tokens:,} tokens; losses resampled by {text.unit} ({text.units})\n"
        f"machine  {machine.device}, {machine.threads} threads, "
        + ", ".join(f"{k} {v}" for k, v in machine.software.items()),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for model in e.models:
        table.add_column(model.target, overflow="fold")
    for name, cells in _rows(e.models):
        table.add_row(name, *cells)
    out.print(table)
    for line in _front(e.models):
        out.print(line, highlight=False, soft_wrap=True)
    for difference in e.differences:
        out.print(_difference_text(difference), highlight=False, soft_wrap=True)
    out.print("(intervals in parentheses are 90 %)", highlight=False)


def _rows(models: tuple[Evaluated, ...]) -> list[tuple[str, list[str]]]:
    rows = [
        ("loss, nats a token", [_shown(m.loss, "{:.4f}".format) for m in models]),
        ("perplexity", [_shown(m.perplexity, "{:.2f}".format) for m in models]),
        ("bits a byte", [_shown(m.bits_per_byte, "{:.4f}".format) for m in models]),
        ("parameters", [_parameters(m) for m in models]),
        ("weights on disk", [f"{m.weights_bytes:,} bytes ({m.dtype}, {m.packed or 'dense'})" for m in models]),
    ]  # fmt: skip
    if any(m.training_usd is not None for m in models):
        rows.append(("training cost", [_cost(m.training_usd) for m in models]))
    speeds = [m.speed for m in models if m.speed is not None]
    if speeds:
        batch = speeds[0].batch
        rows += [
            ("one window", [_shown(s.window_s, format_seconds) for s in speeds]),
            ("a generated token", [_shown(s.token_s, format_seconds) for s in speeds]),
            (f"reading {batch} at once", [_shown(s.tokens_per_s, "{:,.0f}".format) + " tokens/s" for s in speeds]),
        ]  # fmt: skip
    return rows


def _cost(usd: float | None) -> str:
    return "unknown" if usd is None else format_usd(usd)


def _front(models: tuple[Evaluated, ...]) -> list[str]:
    """Which of several are worth having, and what beats the others."""
    if len(models) < 2:
        return []
    known = sum(m.training_usd is not None for m in models)
    weighed = {len(models): "size, loss and training cost", 0: "size and loss (cost unknown)"}
    said = weighed.get(known, "size, loss and, where it is known of both, training cost")
    front = [m.target for m in models if m.beaten_by is None]
    lines = [f"worth having, by {said}: {', '.join(front)}"]
    return lines + [
        f"  not {m.target}: {m.beaten_by} is no larger, loses no more and is not known to be dearer"
        for m in models
        if m.beaten_by is not None
    ]


def _parameters(m: Evaluated) -> str:
    zeros = (
        ""
        if m.nonzero in (None, m.parameters)
        else f", {1 - (m.nonzero or 0) / m.parameters:.2%} zero"
    )
    return f"{m.parameters:,}{zeros}"


def _shown(m: Measured, text: Any) -> str:
    return f"{text(m.value)} ({text(m.low)} to {text(m.high)})"


def _difference_text(d: Difference) -> str:
    parts = [
        f"loss {_shown(d.loss, '{:+.4f}'.format)}",
        f"weights {d.weights:.3f} times",
    ]
    ratios = (("one window", d.window), ("a generated token", d.token), ("batch", d.batch))
    parts += [f"{name} {_shown(r, '{:.2f}'.format)} times" for name, r in ratios if r is not None]
    return f"{d.target} against {d.against}: " + " · ".join(parts)

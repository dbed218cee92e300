"""`outlay data prepare` and `outlay data inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from outlay.planner.options import format_option
from outlay.profiles.errors import UsageError
from outlay.profiles.units import parse_bytes


@click.group()
def data() -> None:
    """Prepare text for training, and look at it."""


@data.command()
@click.argument("source")
@click.option("--out", required=True, help="Folder to write; must be new or empty.")
@click.option("--tokenizer", help="tokenizer.json to use; without it one is trained.")
@click.option("--vocab-size", type=click.IntRange(257), help="Of the tokenizer to train.")
@click.option("--heldout-fraction", type=float, default=0.05, show_default=True)
@click.option("--max-bytes", help="Take at most so much text, e.g. 20MB.")
@click.option("--seed", type=int, default=0, show_default=True)
def prepare(
    source: str,
    out: str,
    tokenizer: str | None,
    vocab_size: int | None,
    heldout_fraction: float,
    max_bytes: str | None,
    seed: int,
) -> None:
    """Tokenize text into a folder: train.bin, heldout.bin, tokenizer.json, dataset.json.

    SOURCE is a text file, a folder of text, or `stdlib`: the source files of Python's standard
    library.
    """
    from outlay.runner.commands.run import require_run_extra
    from outlay.runner.data.corpus import standard_library_files, text_files
    from outlay.runner.data.prepare import prepare as prepare_files

    require_run_extra()
    if (tokenizer is None) == (vocab_size is None):
        raise UsageError("give either --tokenizer or --vocab-size")
    files = standard_library_files() if source == "stdlib" else text_files(source)
    info = prepare_files(
        files,
        Path(out),
        seed=seed,
        vocab_size=vocab_size,
        tokenizer_path=tokenizer,
        heldout_fraction=heldout_fraction,
        max_bytes=None if max_bytes is None else parse_bytes(max_bytes, where="--max-bytes"),
    )
    click.echo(
        f"{out}: {info.train.tokens:,} tokens to train on, {info.heldout.tokens:,} held out, "
        f"vocabulary {info.vocab_size:,}"
    )


@data.command()
@click.argument("folder")
@format_option("table", "json")
def inspect(folder: str, format_: str) -> None:
    """What a prepared folder holds."""
    from outlay.planner.spec.files import parse, plain, read_mapping, to_json
    from outlay.runner.data.prepare import DatasetInfo

    path = Path(folder) / "dataset.json"
    info = parse(DatasetInfo, read_mapping(path), path=path)
    if format_ == "json":
        click.echo(to_json(info), nl=False)
        return
    for name in ("train", "heldout"):
        part = getattr(info, name)
        click.echo(
            f"{name:<10}{part.tokens:>14,} tokens  {part.text_bytes:>14,} bytes of text  "
            f"{len(part.files):>6,} files"
        )
    click.echo(f"{'vocabulary':<10}{info.vocab_size:>14,}")
    click.echo(f"{'unigram':<10}{info.heldout_unigram_nats:>14.3f} nats a token, held out")
    if info.skipped:
        click.echo("skipped   " + ", ".join(f"{n} {why}" for why, n in plain(info.skipped).items()))

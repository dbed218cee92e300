"""`outlay shrink`: structured pruning, a trained folder in, a smaller one out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from outlay.planner.options import format_option
from outlay.profiles.errors import UsageError


@click.command()
@click.argument("model")
@click.option(
    "--heads", help="Share of the attention heads that goes, e.g. 50%; with their keys and values."
)
@click.option("--channels", help="Share of the MLP's inner width that goes, e.g. 50%.")
@click.option("--layers", type=click.IntRange(0), default=0, help="Whole blocks that go.")
@click.option(
    "--importance",
    type=click.Choice(["magnitude", "activation", "taylor"]),
    default="magnitude",
    show_default=True,
    help="What stays: the largest weights, or what matters on some text (--data).",
)
@click.option("--data", help="Folder that `outlay data prepare` wrote with the model's tokenizer.")
@click.option(
    "--sequences",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Looked at, of --data.",
)
@click.option(
    "--seq-len", type=click.IntRange(2), default=512, show_default=True, help="Tokens a sequence."
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="The width stays a multiple of it.",
)
@click.option("--out", required=True, help="The new folder; must not exist.")
@format_option("table", "json")
def shrink(
    model: str, heads: str | None, channels: str | None, layers: int, importance: str, data: str | None,
    sequences: int, seq_len: int, multiple: int, out: str, format_: str,
) -> None:  # fmt: skip
    """Write a smaller model: fewer heads, channels and blocks, really gone.

    MODEL is a folder of transformers with safetensors. Train back what was lost with an ordinary plan:
    `outlay plan --model OUT …`.
    """
    from outlay.planner.spec.compress import Shrink, share_of
    from outlay.runner.commands.run import require_run_extra

    how = Shrink(
        heads=0.0 if heads is None else share_of(heads, "--heads"),
        channels=0.0 if channels is None else share_of(channels, "--channels"),
        layers=layers,
        importance=importance,  # type: ignore[arg-type]
        multiple=multiple,
    )
    if importance != "magnitude" and data is None:
        raise UsageError(
            f"importance by {importance} looks at text", where="--importance",
            do="pass --data, or --importance magnitude",
        )  # fmt: skip
    require_run_extra()
    from outlay.runner.compress.structured import shrink_model

    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise UsageError("no such folder", where=model, do="name a folder of transformers")
    batches = [] if data is None else _batches(model, data, sequences, seq_len)
    made = shrink_model(folder, Path(out).expanduser(), how, batches)
    _show(made, format_)


def _batches(model: str, data: str, sequences: int, seq_len: int) -> list[Any]:
    import torch

    from outlay.planner.spec.families import resolve_model
    from outlay.runner.data.dataset import TokenDataset

    spec, _ = resolve_model(model)
    dataset = TokenDataset(Path(data).expanduser(), seq_len=seq_len, seed=0)
    if dataset.info.vocab_size > spec.vocab:
        raise UsageError(
            f"the data has {dataset.info.vocab_size} different tokens, the model {spec.vocab}", where=data,
            do="prepare it with the model's tokenizer",
        )  # fmt: skip
    if seq_len > spec.max_positions > 0:
        raise UsageError(
            f"{seq_len} tokens exceed the {spec.max_positions} positions of the model",
            where="--seq-len", do=f"at most {spec.max_positions}",
        )  # fmt: skip
    count = min(sequences, dataset.windows)
    return [torch.from_numpy(dataset.sample(i))[None] for i in range(count)]


def _show(made: Any, format_: str) -> None:
    from outlay.planner.spec.files import to_json

    if format_ == "json":
        click.echo(to_json(made), nl=False)
        return
    share = made.parameters / made.parameters_before
    click.echo(
        f"{made.folder}: {made.parameters:,} parameters, {share:.1%} of {made.parameters_before:,}\n"
        f"  a block    {made.sizes.heads} heads on {made.sizes.kv_heads} keys and values, "
        f"{made.sizes.ffn} channels\n"
        f"  blocks     {made.sizes.layers}: {', '.join(map(str, made.kept_layers))} of the old\n"
        f"  train back outlay plan --model {made.folder} --data …"
    )

"""`outlay size`: what to rent or buy, and the largest model that a budget trains."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.commands.question import console, emit_text
from outlay.planner.commands.reader import reader_may_leave
from outlay.planner.options import (
    as_integers,
    format_option,
    job_options,
    split_strategy,
    strategy_options,
)
from outlay.planner.size.chosen import SIZE_FILE, deadline_s, target_option
from outlay.profiles.errors import UsageError

if TYPE_CHECKING:
    from outlay.planner.size.asked import Asked


@click.command()
@click.argument("job_file", required=False)
@click.option("--model", help="Preset, folder or config.json of transformers; none: see --budget.")
@click.option(
    "--hardware", multiple=True,
    help="Only these, repeatable: ACCELERATOR, PROVIDER, PROVIDER/INSTANCE (each with every count), "
    "ACCELERATOR:COUNT, probe, cluster.yaml. Default: the whole catalog.",
)  # fmt: skip
@click.option("--inter-node-gbps", type=float, help="Network of a node where the catalog has none.")
@click.option("--price-usd-per-h", type=float, help="Of one piece of --hardware with a count.")
@click.option(
    "--buy", is_flag=True, help="Beside rent: the same accelerators bought, and when that pays."
)
@click.option(
    "--purchase-usd", multiple=True,
    help="With --buy, price of one accelerator with its share of the server: h100-sxm=31000; repeatable.",
)  # fmt: skip
@job_options
@strategy_options
@target_option
@click.option("--deadline", help="14d, 72h. Without one, nothing longer than a year is shown.")
@click.option(
    "--objective", type=click.Choice(["balanced", "cheapest", "fastest", "energy", "carbon"]),
    help="What A is. Default: cheapest with a deadline, else balanced (least money × time).",
)  # fmt: skip
@click.option("--most", default="16384", show_default=True, help="Accelerators, at most.")
@click.option("--parameters", help="No model named: one of that size, e.g. 7B, on optimal tokens.")
@click.option(
    "--reach-loss", "wanted_loss", type=float, help="No model named: reach that loss, nats a token."
)
@click.option(
    "--overtrain", type=float, default=1.0, show_default=True,
    help="Tokens a parameter over the compute-optimal ones: a smaller model, cheaper to use.",
)  # fmt: skip
@format_option("table", "json", "csv", "md")
@click.option("--out", default=SIZE_FILE, show_default=True, help="Where `outlay plan A` finds it.")
@click.option("--dry-run", is_flag=True, help="Write nothing.")
def size(job_file: str | None, format_: str, out: str, dry_run: bool, **flags: Any) -> None:
    """What to rent or buy for a job, over the whole catalog, and which strategy.

    With --budget and no model: the compute-optimal parameters and tokens, the expected loss, and the
    hardware. With --parameters or --reach-loss: what that costs.
    """
    from datetime import UTC, datetime

    from outlay.planner.report import size as report
    from outlay.planner.size.allocator import keep_freed_memory
    from outlay.planner.size.answer import answer, answer_dict
    from outlay.planner.spec.files import to_json, write_text

    keep_freed_memory()
    asked = _asked(job_file, flags)
    found = answer(
        asked.ask, asked.offers, asked.limits, asked.objective, references=asked.references,
        assumptions=asked.assumptions, extra=asked.extra,
    )  # fmt: skip
    value = answer_dict(
        found, reference=asked.reference, weights=asked.weights, today=datetime.now(UTC).date()
    )
    value["model"]["config"] = asked.config
    if not dry_run:
        write_text(out, to_json(value))
    with reader_may_leave():
        if format_ == "table":
            report.print_size(console(), value, out=None if dry_run else out)
            return
        texts = {"json": to_json, "csv": report.to_csv, "md": report.to_md}
        emit_text(texts[format_](value).rstrip("\n"), None)


def _asked(job_file: str | None, flags: dict[str, Any]) -> Asked:
    """The question from file and flags."""
    from outlay.planner.size.asked import Sizing, asked

    own = {k: flags.pop(k) for k in [f.name for f in dataclasses.fields(Sizing) if f.name in flags]}
    flags, strategy = split_strategy(flags)
    own["hardware"], own["purchase_usd"] = tuple(own["hardware"]), tuple(own["purchase_usd"])
    limit = own.pop("deadline", None)
    if limit is not None:
        own["deadline_s"] = deadline_s(limit)
    if flags.get("model") and (own.get("parameters") or own.get("wanted_loss")):
        raise UsageError(
            "--parameters and --reach-loss size a model; --model names one: give one of them"
        )
    if flags.get("model") and own.get("overtrain", 1.0) != 1.0:
        raise UsageError(
            "--overtrain sizes a model; --model names one", do="give its length with --tokens"
        )
    return asked(job_file, flags, as_integers(strategy), Sizing(**own))

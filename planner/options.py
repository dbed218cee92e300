"""The flags that planner's commands share, under the names of the job file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from outlay.planner.estimate.candidates import CHECKPOINTING, LOSS, OFFLOAD
from outlay.profiles.money import Currency, show_in, unshow

OPTIMIZERS = (
    "adamw", "adam", "sgd", "rmsprop", "lamb", "lion", "muon", "adafactor",
    "adamw_8bit", "paged_adamw", "paged_adamw_8bit",
)  # fmt: skip
"""Those whose memory is known."""
SCHEDULES = ("cosine", "wsd", "linear", "constant")

F = TypeVar("F", bound=Callable[..., Any])


def _stack(options: list[Callable[[F], F]], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def model_options(function: F) -> F:
    """--model and --hardware with what describes them further."""
    options: list[Callable[[F], F]] = [
        click.option("--model", help="Preset, folder or config.json of transformers."),
        click.option(
            "--hardware",
            help="probe (default), ACCELERATOR:COUNT[/PER_NODE], PROVIDER/INSTANCE:COUNT, cluster.yaml.",
        ),
        click.option("--inter-node-gbps", type=float, help="Network of one node, gigabits a second."),
        click.option("--price-usd-per-h", type=float, help="Of all the hardware, where the catalog has no price."),
    ]  # fmt: skip
    return _stack(options, function)


def job_options(function: F) -> F:
    """What to train."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--data",
            help=".jsonl, .csv, .parquet or .txt file, folder, or what `outlay data prepare` wrote.",
        ),
        click.option("--epochs", type=float, help="Times over --data, instead of --tokens; 1 where neither is given."),
        click.option("--tokenizer", help="tokenizer.json or its folder: counts --data exactly."),
        click.option(
            "--packing/--no-packing", default=None,
            help="Rows joined end to end (default), or one padded sequence each.",
        ),
        click.option("--tokens", help="Tokens to train on, e.g. 20B."),
        click.option("--steps", type=int, help="Optimizer steps, instead of --tokens."),
        click.option("--seq-len", type=int, help="Tokens a sequence."),
        click.option(
            "--global-batch", type=int, help="Sequences an optimizer step, over all ranks."
        ),
        click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"])),
        click.option(
            "--optimizer", type=click.Choice(OPTIMIZERS), help="lamb and the paged ones are estimated only."
        ),
        click.option("--optimizer-lr", type=float, help="Peak learning rate."),
        click.option("--optimizer-momentum", type=float, help="Of sgd, rmsprop and muon."),
        click.option("--optimizer-adam-lr", type=float, help="Of what muon leaves to Adam."),
        click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate, after the warm-up."),
        click.option("--schedule-warmup-steps", type=click.IntRange(0), help="Steps to the peak."),
        click.option("--gradient-clipping", type=float, help="Largest norm of the gradient; 0 = none. Default 1."),
        click.option(
            "--finetune", help="full (default), lora:r16, dora:r16, qlora:r16; adapter, adapter_v2: estimated only."
        ),
        click.option("--prune", help="50%, 50%,global, 50%,one-shot, 2:4, 4:8: weights held at zero; or none."),
        click.option("--qat", help="int8, int8-weight, int4:g32, int4-act8:g32: trained as it is stored; or none."),
        click.option("--attention", type=click.Choice(["eager", "sdpa", "flash"])),
        click.option("--compile/--no-compile", default=None, help="Blocks through torch.compile; not estimated."),
        click.option("--expert-capacity", type=float,
                     help="Most tokens an expert takes, of an even share: 1.25. Default: none is dropped."),
        click.option("--budget", multiple=True, help="5000usd, 72h, 100gpuh; repeatable."),
        click.option("--currency", help="Money is shown in it: eur, at a --rate. Default: the budget's, or usd."),
        click.option("--rate", multiple=True, help="USD for one of a currency: eur=1.08; repeatable."),
        click.option("--region", help="Where the electricity is from: us-central1, FRA, US-Texas."),
        click.option("--assume", multiple=True,
                     help="Sets what totals take for granted: pue=1.2; repeatable (outlay catalog list assumptions)."),
        click.option("--attempts", type=int, help="Whole runs to pay for; 1 where not given."),
        click.option("--pilot", help="A trial run before them, part of one: 2%."),
        click.option("--seed", type=int),
    ]  # fmt: skip
    return _stack(options, function)


def strategy_options(function: F) -> F:
    """How it is spread; what is left out is searched (plan) or taken as 1 (estimate)."""
    options: list[Callable[[F], F]] = [
        click.option("--zero", type=click.IntRange(0, 3), help="ZeRO stage."),
        *(click.option(f"--{k}", type=click.IntRange(1), help=h) for k, h in (
            ("dp", "Data parallel."), ("tp", "Tensor parallel."), ("pp", "Pipeline parallel."),
            ("vpp", "Virtual pipeline stages a rank."), ("cp", "Context parallel."),
            ("sp", "Ulysses sequence parallel."), ("ep", "Expert parallel."))),
        click.option("--micro-batch", type=click.IntRange(1), help="Sequences a forward pass."),
        click.option("--activation-checkpointing", type=click.Choice(CHECKPOINTING)),
        click.option("--recompute-layers", type=click.IntRange(0)),
        click.option("--sequence-parallel", is_flag=True, default=None, help="Megatron's."),
        click.option("--offload-optimizer", type=click.Choice(OFFLOAD)),
        click.option("--offload-param", type=click.Choice(OFFLOAD)),
        click.option("--loss", type=click.Choice(LOSS)),
    ]  # fmt: skip
    return _stack(options, function)


STRATEGY_KEYS = (
    "zero", "dp", "tp", "pp", "vpp", "cp", "sp", "ep", "micro_batch", "activation_checkpointing",
    "recompute_layers", "sequence_parallel", "offload_optimizer", "offload_param", "loss",
)  # fmt: skip


def show_money(currency: Currency | None) -> None:
    """What money is shown in until the command ends."""
    token = show_in(currency)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(lambda: unshow(token))


def format_option(*formats: str) -> Callable[[F], F]:
    """--format, first one the default."""
    return click.option("--format", "format_", type=click.Choice(formats), default=formats[0])


def split_strategy(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(job flags, strategy flags that were given)."""
    strategy = {k: flags.pop(k) for k in STRATEGY_KEYS if k in flags}
    return flags, {k: v for k, v in strategy.items() if v is not None}


def as_integers(strategy: dict[str, Any]) -> dict[str, int]:
    """Strategy flags as the integers of the candidate arrays."""
    words = {
        "activation_checkpointing": CHECKPOINTING,
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
        "loss": LOSS,
    }
    return {k: words[k].index(v) if k in words else int(v) for k, v in strategy.items()}

"""An option that `outlay size` printed, taken up by `outlay plan A`; flags that both commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from outlay.profiles.errors import UsageError
from outlay.profiles.units import parse_seconds

if TYPE_CHECKING:
    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.job import Job
    from outlay.planner.spec.model import ModelSpec

F = TypeVar("F", bound=Callable[..., Any])

SCHEMA_SIZE = "outlay/size@1"
SIZE_FILE = "size.json"
OPTION = re.compile(r"[A-Z]")


def target_option(function: F) -> F:
    """--for: whose trainer."""
    return click.option(
        "--for",
        "target",
        type=click.Choice(["runner", "deepspeed", "trainer", "megatron"]),
        default="runner",
        show_default=True,
        help="Whose trainer: what `outlay run` executes; what DeepSpeed executes; what transformers' Trainer "
        "and Accelerate execute, for `outlay emit`; Megatron-Core's "
        "conventions (estimated only).",
    )(function)


def deadline_s(text: str) -> float:
    """`14d` → seconds; nonsense and zero are refused."""
    seconds = parse_seconds(text, where="--deadline")
    if not seconds > 0:
        raise UsageError(
            f"a deadline of {text!r} has passed", where="--deadline", do="give 14d, 72h"
        )
    return seconds


@dataclass
class Chosen:
    """What a plan needs, from an option of size.json; the same names as a Question."""

    spec: ModelSpec
    config: dict[str, Any]
    job: Job
    cluster: Cluster
    assumptions: list[dict[str, Any]]
    weights: str | None


def _model(model: dict[str, Any]) -> tuple[ModelSpec, dict[str, Any]]:
    """The named model, or the one that was sized, whose configuration is in the file."""
    from outlay.planner.spec.families import resolve_model, spec_from_config

    if config := model.get("config"):
        return spec_from_config(config, name=model["name"], source="sized"), config
    return resolve_model(model["reference"])


def chosen_of(letter: str, flags: dict[str, Any], target: str) -> tuple[Chosen, str]:
    """(the job and the hardware of that option, whose trainer it was sized for)."""
    from outlay.planner.options import show_money
    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.files import check_schema, parse, read_mapping
    from outlay.planner.spec.job import Job

    if not Path(SIZE_FILE).is_file():
        raise UsageError(
            f"option {letter} of which answer? There is no {SIZE_FILE} here",
            do="run `outlay size JOB` first: it writes it; or pass a job file",
        )
    other = sorted(
        "--" + k.replace("_", "-")
        for k, v in flags.items()
        if v is not None and v != () and v is not False
    )
    if other:
        raise UsageError(
            f"option {letter} of {SIZE_FILE} has its job and hardware already; {', '.join(other)} given too",
            do="change the question in `outlay size`, or plan without the letter",
        )
    value = read_mapping(SIZE_FILE)
    check_schema(value, SCHEMA_SIZE, SIZE_FILE)
    options = {o["option"]: o for o in value["options"] if o["option"]}
    if letter not in options:
        raise UsageError(
            f"{SIZE_FILE} has no option {letter}", do=f"choose one of {', '.join(sorted(options))}"
        )
    option = options[letter]
    spec, config = _model(value["model"])
    cluster: Cluster = parse(Cluster, option["cluster"], path=f"{SIZE_FILE}: {letter}")
    # Where nobody stated it, each accelerator has its own.
    job: Job = parse(Job, value["job"] | {"precision": option["precision"]}, path=SIZE_FILE)
    show_money(job.currency)
    notes = [*value["assumptions"]]
    return Chosen(spec, config, job, cluster, notes, value["model"].get("weights")), value["target"]

"""Rules of Accelerate's configuration file."""

from __future__ import annotations

from collections.abc import Iterable

from outlay.planner.read.edits import remove, rename, set_to
from outlay.planner.read.known import names
from outlay.planner.read.meaning import MAIN
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_keys import near
from outlay.planner.rules.places import here, is_of, main_edits
from outlay.planner.rules.setup import Setup


@config_rule(
    "accelerate_unknown_key",
    "illegal",
    "accelerate 1.15, commands/config/config_args.py: ValueError on unknown keys",
    deepspeed=False,
)
def accelerate_unknown_key(s: Setup) -> Iterable[Found]:
    """A top-level key that Accelerate does not know."""
    if not is_of(s, "accelerate"):
        return
    for key in s.meaning.documents[MAIN].value:
        if key in names("accelerate", "keys"):
            continue
        meant = near(key, names("accelerate", "keys"))
        free = meant is not None and meant not in s.meaning.documents[MAIN].value
        yield Found(
            what=f"{key} is no key of an Accelerate configuration: accelerate launch refuses the file",
            where=here(s, key), do=f"write {meant}" if free else "remove it",
            edits=main_edits(rename(key, key=str(meant)) if free else remove(key)),
        )  # fmt: skip


@config_rule(
    "accelerate_deepspeed_key",
    "ignored",
    "accelerate 1.15, utils/launch.py: prepare_deepspeed_cmd_env reads its own keys only; huggingface/accelerate#2298",
    deepspeed=False,
)
def accelerate_deepspeed_key(s: Setup) -> Iterable[Found]:
    """A key of deepspeed_config that Accelerate does not pass on."""
    if not is_of(s, "accelerate"):
        return
    listed = names("accelerate", "deepspeed_keys")
    for key in s.meaning.flags.get("deepspeed_keys", {}):
        if key in listed:
            continue
        meant = near(key, listed)
        free = meant is not None and meant not in s.meaning.flags["deepspeed_keys"]
        path = ("deepspeed_config", key)
        yield Found(
            what=f"deepspeed_config.{key} has no effect: Accelerate passes its own keys on and no other",
            where=here(s, *path),
            do=f"write {meant}" if free
            else "remove it, or put it into a DeepSpeed JSON and name that in deepspeed_config_file",
            edits=main_edits(rename(*path, key=str(meant)) if free else remove(*path)),
        )  # fmt: skip


@config_rule(
    "accelerate_keys_beside_file",
    "illegal",
    "accelerate 1.15, utils/dataclasses.py: _deepspeed_config_checks; huggingface/accelerate#941",
    deepspeed=False,
)
def accelerate_keys_beside_file(s: Setup) -> Iterable[Found]:
    """Accelerate's own DeepSpeed keys, or mixed_precision, beside deepspeed_config_file."""
    keys = s.meaning.flags.get("deepspeed_keys", {}) if is_of(s, "accelerate") else {}
    if not isinstance(keys.get("deepspeed_config_file"), str):
        return
    document = s.meaning.documents[MAIN]
    owned = names("accelerate", "owned_by_file")
    wrong = [("deepspeed_config", key) for key in keys if key in owned]
    if not wrong:
        return
    shown = ", ".join(path[-1] for path in wrong)
    yield Found(
        what=f"{shown} beside deepspeed_config_file: Accelerate refuses both together",
        where=document.where(wrong[0]), do=f"remove {shown}: the DeepSpeed file says them",
        edits=main_edits(*(remove(*path) for path in wrong)),
    )  # fmt: skip


@config_rule(
    "accelerate_precision_against_file",
    "illegal",
    "accelerate 1.15, utils/dataclasses.py: set_mixed_precision, ValueError",
    deepspeed=False,
)
def accelerate_precision_against_file(s: Setup) -> Iterable[Found]:
    """mixed_precision against the precision that the DeepSpeed file enables."""
    if (
        not is_of(s, "accelerate")
        or s.meaning.section is None
        or s.meaning.section.document is None
    ):
        return
    mixed = s.meaning.documents[MAIN].get("mixed_precision")
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        if mixed == name and str(s.written(other, "enabled")).lower() == "true":
            yield Found(
                what=f"mixed_precision is {name}, the DeepSpeed file enables {other}: Accelerate refuses it",
                where=here(s, "mixed_precision"), do=f"write {other}",
                edits=main_edits(set_to("mixed_precision", value=other)),
            )  # fmt: skip


@config_rule(
    "zero_section_missing",
    "illegal",
    "accelerate 1.15, utils/dataclasses.py:1276: ValueError; zjunlp/KnowLM#87",
)
def zero_section_missing(s: Setup) -> Iterable[Found]:
    """A DeepSpeed file without zero_optimization under accelerate or the Trainer."""
    section = s.meaning.section
    if not s.meaning.trainer or section is None or section.document is None:
        return
    if any(near(key, ("zero_optimization",)) for key in s.raw):
        return
    yield Found(
        what="there is no zero_optimization: accelerate, and the Trainer through it, refuses the file",
        where=s.where(), do='write "zero_optimization": {"stage": 0} or the stage that you mean',
        edits=tuple(s.meaning.set_deepspeed(("zero_optimization",), {"stage": 0})),
    )  # fmt: skip


@config_rule(
    "deepspeed_is_not_used",
    "ignored",
    "accelerate 1.15, commands/launch.py:1228: distributed_type decides",
    deepspeed=False,
)
def deepspeed_is_not_used(s: Setup) -> Iterable[Found]:
    """A deepspeed_config while distributed_type is something else."""
    if (
        not is_of(s, "accelerate")
        or s.meaning.flags.get("uses_deepspeed")
        or not s.meaning.flags.get("deepspeed_keys")
    ):
        return
    kind = s.meaning.documents[MAIN].get("distributed_type", default="not set")
    yield Found(
        what=f"deepspeed_config has no effect: distributed_type is {kind}", where=here(s, "distributed_type"),
        do="write DEEPSPEED", edits=main_edits(set_to("distributed_type", value="DEEPSPEED")),
    )  # fmt: skip


@config_rule(
    "zero3_init_below_stage_3",
    "changed",
    "accelerate 1.15, utils/dataclasses.py: sets it to False with a warning",
    deepspeed=False,
)
def zero3_init_below_stage_3(s: Setup) -> Iterable[Found]:
    """zero3_init_flag at another stage than 3."""
    if (
        is_of(s, "accelerate")
        and s.uses_deepspeed
        and s.stage != 3
        and s.meaning.flags["deepspeed_keys"].get("zero3_init_flag") is True
    ):
        yield Found(
            what=f"zero3_init_flag has no effect at ZeRO-{s.stage}: Accelerate sets it to false",
            where=here(s, "deepspeed_config", "zero3_init_flag"), do="write false",
            edits=main_edits(set_to("deepspeed_config", "zero3_init_flag", value=False)),
        )  # fmt: skip

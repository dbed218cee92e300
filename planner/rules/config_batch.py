"""Rules about batch, accumulation and who fills `auto`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from outlay.planner.read.deepspeed import AUTO, BATCH, block, whole
from outlay.planner.read.document import KeyPath
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.setup import Setup, batch_of

_BATCH_KEYS = tuple(BATCH.values())


def _numbers(s: Setup) -> dict[str, Any]:
    return {name: s.ds.get(key) for name, key in BATCH.items()}


def unquoted(text: Any) -> float | int | None:
    """The number that a text in quotes means."""
    if not isinstance(text, str):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


@config_rule(
    "number_in_quotes",
    "illegal",
    "runtime/config.py:602-650 and the optimizer calculate with it as it stands",
)
def number_in_quotes(s: Setup) -> Iterable[Found]:
    """A number written as a text where DeepSpeed calculates with it."""
    paths: list[KeyPath] = [(k,) for k in (*_BATCH_KEYS, "gradient_clipping", "steps_per_print")]
    for part in ("optimizer", "scheduler"):
        params = s.written(part, "params")
        paths += [(part, "params", k) for k in params] if isinstance(params, dict) else []
    for path in paths:
        value = s.written(*path)  # type: ignore[arg-type]
        if not isinstance(value, str) or value == AUTO:
            continue
        if value.lower() == AUTO:
            yield Found(
                what=f"{'.'.join(map(str, path))} is {value!r}: only auto in small letters is filled",
                where=s.where(*path), do="write auto", edits=tuple(s.meaning.set_deepspeed(path, AUTO)),  # type: ignore[arg-type]
            )  # fmt: skip
            continue
        number = unquoted(value)
        if number is None and "$" not in value and path[0] in ("optimizer", "scheduler"):
            continue
        better = number if number is not None else AUTO if s.meaning.trainer else None
        yield Found(
            what=f"{'.'.join(map(str, path))} is the text {value!r}, not a number",
            where=s.where(*path),  # type: ignore[arg-type]
            do="write the number" if better is None else f"write {better}",
            edits=tuple(s.meaning.set_deepspeed(path, better)) if better is not None else (),
        )


@config_rule(
    "batch_not_positive", "illegal", "runtime/config.py:596-600: each must be greater than 0"
)
def batch_not_positive(s: Setup) -> Iterable[Found]:
    """A batch key that is no whole number above zero."""
    for key in _BATCH_KEYS:
        value = s.written(key)
        if value is None or isinstance(value, str) or whole(value) is not None:
            continue
        yield Found(
            what=f"{key} is {value!r}: it must be a whole number, at least 1", where=s.where(key),
            do="write 1, or what you mean", edits=tuple(s.meaning.set_deepspeed((key,), 1)),
        )  # fmt: skip


@config_rule(
    "batch_missing",
    "illegal",
    "runtime/config.py:655: either train_batch_size or train_micro_batch_size_per_gpu",
)
def batch_missing(s: Setup) -> Iterable[Found]:
    """Neither the batch nor the micro-batch is given."""
    if s.meaning.trainer and s.meaning.framework in ("deepspeed", "accelerate"):
        return
    if s.meaning.framework in ("axolotl", "llamafactory", "trainer") or (
        s.meaning.framework == "launch" and s.meaning.trainer
    ):
        return
    if s.raw.get(BATCH["micro_batch"]) is None and s.raw.get(BATCH["global_batch"]) is None:
        yield Found(
            what="neither train_batch_size nor train_micro_batch_size_per_gpu is there: DeepSpeed does not start",
            where=s.where(), do="add train_micro_batch_size_per_gpu",
            edits=tuple(s.meaning.set_deepspeed((BATCH["micro_batch"],), 1)),
        )  # fmt: skip


@config_rule(
    "ranks_not_divided",
    "illegal",
    "runtime/config.py:602-650: world / (TP·PP·SP) data-parallel ranks",
)
def ranks_not_divided(s: Setup) -> Iterable[Found]:
    """tensor · pipeline · sequence parallel that does not divide the ranks."""
    if s.world is None or s.world % s.model_parallel == 0:
        return
    said = s.meaning.said
    yield Found(
        what=f"tp {said('tp') or 1} · pp {said('pp') or 1} · sp {said('sp') or 1} = {s.model_parallel} does not "
        f"divide {s.world} ranks",
        where=s.where(), do="start a multiple of that many processes",
    )  # fmt: skip


@config_rule(
    "batch_closes",
    "illegal",
    "runtime/config.py:602-650: train_batch = micro · accumulation · data-parallel ranks",
)
def batch_closes(s: Setup) -> Iterable[Found]:
    """Batch arithmetic that does not close over the ranks."""
    n, dp = _numbers(s), s.dp
    if dp is None or any(v is not None and whole(v) is None for v in n.values()):
        return
    micro, accum, total = n["micro_batch"], n["grad_accum"], n["global_batch"]
    if total is None or s.written(BATCH["global_batch"]) == AUTO:
        return  # where `auto` is filled, the arguments' product is what is written
    if micro is not None and accum is not None:
        product = micro * accum * dp
        closes = product == total
    elif micro is not None:
        accum = total // micro // dp
        product, closes = micro * max(accum, 1) * dp, accum > 0 and micro * accum * dp == total
    else:
        micro = total // dp // (accum or 1)
        product, closes = (
            max(micro, 1) * (accum or 1) * dp,
            micro > 0 and micro * (accum or 1) * dp == total,
        )
    if closes:
        return
    micro = max(micro, 1)
    shown = f"{micro} · {accum or 1} · {dp} = {micro * (accum or 1) * dp}"
    yield Found(
        what=f"train_batch_size is {total}, but micro-batch · accumulation · data-parallel ranks is {shown}",
        where=s.where(BATCH["global_batch"]),
        do=f"write train_batch_size {product}"
        + (f" (for {s.world} processes)" if s.world else "")
        + (", or change micro-batch or accumulation"),
        edits=tuple(s.meaning.set_deepspeed((BATCH["global_batch"],), product)),
    )  # fmt: skip


def _nested_auto(value: dict[str, Any], path: KeyPath) -> Iterable[KeyPath]:
    """Where `auto` stands below a block."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _nested_auto(inner, (*path, key))
        elif isinstance(inner, str) and inner == AUTO:
            yield (*path, key)


@config_rule(
    "auto_without_trainer",
    "illegal",
    "tried: `auto` is compared as a text (TypeError); only transformers and accelerate fill it",
)
def auto_without_trainer(s: Setup) -> Iterable[Found]:
    """`auto` in a file that DeepSpeed reads itself."""
    if s.meaning.trainer:
        return
    micro = s.meaning.said("micro_batch") or 1
    values = {BATCH["micro_batch"]: micro, BATCH["grad_accum"]: s.meaning.said("grad_accum") or 1,
              "gradient_clipping": 1.0}  # fmt: skip
    for key in (*_BATCH_KEYS, "gradient_clipping"):
        if s.written(key) != AUTO:
            continue
        value = values.get(key)
        edits = (
            s.meaning.set_deepspeed((key,), value)
            if value is not None
            else s.meaning.remove_deepspeed((key,))
        )
        yield Found(
            what=f"{key} is auto, and this command hands the file to DeepSpeed itself, which fills nothing",
            where=s.where(key),
            do=f"write {value}" if value is not None else "remove it: it follows from the other two",
            edits=tuple(edits),
        )  # fmt: skip
    for path in _nested_auto(block(s.raw, "zero_optimization"), ("zero_optimization",)):
        yield Found(
            what=f"{'.'.join(map(str, path))} is auto, and no Trainer fills it: DeepSpeed takes its default",
            where=s.where(*path), do="write the value, or remove it", level="changed",  # type: ignore[arg-type]
            edits=tuple(s.meaning.remove_deepspeed(path)),
        )  # fmt: skip
    for part in ("optimizer", "scheduler"):
        params = s.written(part, "params")
        for key, value in params.items() if isinstance(params, dict) else ():
            if value == AUTO:
                yield Found(
                    what=f"{part}.params.{key} is auto: DeepSpeed hands the text to the {part}",
                    where=s.where(part, "params", key), do="write the number, or remove it",
                    edits=tuple(s.meaning.remove_deepspeed((part, "params", key))),
                )  # fmt: skip


def _compared(s: Setup) -> list[tuple[KeyPath, str, Any]]:
    """(DeepSpeed's path, the argument, its value) of what the Trainer compares."""
    arguments = s.meaning.flags.get("arguments", {})
    batch = batch_of(s)
    said = s.meaning.said
    rows: list[tuple[KeyPath, str, Any]] = [
        ((BATCH["micro_batch"],), "per_device_train_batch_size", said("micro_batch")),
        ((BATCH["grad_accum"],), "gradient_accumulation_steps", said("grad_accum")),
        ((BATCH["global_batch"],), "the batch", batch.whole),
        (("gradient_clipping",), "max_grad_norm", said("clipping")),
        (("optimizer", "params", "lr"), "learning_rate", arguments.get("learning_rate", 5e-5)),
        (("optimizer", "params", "eps"), "adam_epsilon", arguments.get("adam_epsilon", 1e-8)),
        (("optimizer", "params", "weight_decay"), "weight_decay", arguments.get("weight_decay", 0.0)),
        (("optimizer", "params", "betas"), "adam_beta1, adam_beta2",
         [arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999)]),
        (("scheduler", "params", "warmup_max_lr"), "learning_rate", arguments.get("learning_rate", 5e-5)),
        (("scheduler", "params", "warmup_num_steps"), "warmup_steps",
         max(1, arguments["warmup_steps"]) if whole(arguments.get("warmup_steps")) else None),
        (("scheduler", "params", "total_num_steps"), "the number of steps", said("steps")),
        (("fp16", "enabled"), "fp16", arguments.get("fp16") is True),
        (("bf16", "enabled"), "bf16", arguments.get("bf16") in (True, "auto", "full")),
    ]  # fmt: skip
    return rows


@config_rule(
    "trainer_mismatch",
    "illegal",
    "transformers 5.23, integrations/deepspeed.py, trainer_config_finalize: ValueError",
)
def trainer_mismatch(s: Setup) -> Iterable[Found]:
    """A number in the DeepSpeed file that the Trainer's arguments contradict."""
    if s.meaning.framework == "deepspeed" or not s.meaning.trainer:
        return
    if not any(
        k in s.meaning.flags.get("arguments", {})
        for k in ("output_dir", "per_device_train_batch_size", "base_model", "micro_batch_size")
    ):
        return
    for path, argument, value in _compared(s):
        given = s.written(*path)  # type: ignore[arg-type]
        if (
            given is None
            or given == AUTO
            or value is None
            or (isinstance(given, str) and unquoted(given) is not None)
        ):
            continue
        if (
            s.meaning.framework == "axolotl"
            and path[-1] == "enabled"
            and s.meaning.said("precision") == path[0]
            and given is True
        ):
            continue
        if given == value and type(given) is not str:
            continue
        yield Found(
            what=f"{'.'.join(map(str, path))} is {given!r} for DeepSpeed, {argument} is {value!r} among the arguments: "
            "the Trainer refuses that",
            where=s.where(*path),  # type: ignore[arg-type]
            do=f"write auto: {argument} decides",
            edits=tuple(s.meaning.set_deepspeed(path, AUTO)),
        )  # fmt: skip

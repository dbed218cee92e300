"""Rules about precision: fp16, bf16, what gradients are added up in, and what optimizer that makes."""

from __future__ import annotations

from collections.abc import Iterable

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.read.deepspeed import AUTO, block
from outlay.planner.read.edits import set_to
from outlay.planner.read.meaning import DocEdit
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.places import arguments, at, is_of, main_edits
from outlay.planner.rules.setup import Setup
from outlay.profiles.units import format_bytes

_SAME = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32", "fp16": "fp16", "float16": "fp16",
    "half": "fp16", "torch.float16": "fp16", "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16",
}  # fmt: skip
"""Spellings of DtypeEnum (runtime/config.py:145)."""


def model_dtype(s: Setup) -> str:
    """What the weights are computed in."""
    return "bf16" if s.bf16 else "fp16" if s.enabled("fp16") else "fp32"


def accumulation_dtype(s: Setup) -> str:
    """What gradients are added up in; the model's unless data_types says otherwise."""
    asked = block(s.ds, "data_types").get("grad_accum_dtype")
    return _SAME.get(str(asked).lower(), str(asked)) if asked is not None else model_dtype(s)


def switched(s: Setup, off: str, on: str | None) -> tuple[DocEdit, ...]:
    """Edits that put one precision in the place of another, in whichever of the files say it."""
    if arguments(s).get(off) not in (None, False):
        edits = [*main_edits(set_to(*at(s, off), value=False))]
        edits += main_edits(set_to(*at(s, on), value=True)) if on else ()
        for name in ("bf16", "fp16"):
            if isinstance(s.written(name), dict):
                edits += s.meaning.set_deepspeed((name, "enabled"), AUTO)
        return tuple(edits)
    if (
        is_of(s, "accelerate")
        and s.meaning.section is not None
        and s.meaning.section.document is None
    ):
        return main_edits(set_to("mixed_precision", value=on or "no"))
    edits = s.meaning.set_deepspeed((off, "enabled"), False)
    return tuple(edits + (s.meaning.set_deepspeed((on, "enabled"), True) if on else []))


@config_rule(
    "one_precision",
    "illegal",
    "runtime/config.py:511: bfloat16 and fp16 modes cannot be simultaneously enabled",
)
def one_precision(s: Setup) -> Iterable[Found]:
    """fp16 and bf16 both enabled."""
    if not (s.enabled("fp16") and s.bf16):
        return
    has_bf16 = s.cluster is None or "bf16" in s.cluster.accelerator.flops or not s.on_gpu
    off = "fp16" if has_bf16 else "bf16"
    yield Found(
        what="fp16 and bf16 are both enabled: DeepSpeed takes one", where=s.where(off, "enabled"),
        do=f"disable {off}", edits=tuple(s.meaning.set_deepspeed((off, "enabled"), False)),
    )  # fmt: skip


@config_rule(
    "precision_block_without_enabled",
    "ignored",
    "runtime/precision_config.py: enabled is false where it is missing",
)
def precision_block_without_enabled(s: Setup) -> Iterable[Found]:
    """An fp16 or bf16 block that says how but not that: it has no effect."""
    for name in ("fp16", "bf16"):
        written = s.written(name)
        if not isinstance(written, dict) or "enabled" in written or not written:
            continue
        other = "bf16" if name == "fp16" else "fp16"
        if s.enabled(other):
            yield Found(
                what=f"the {name} block has no effect: {other} is on, and {name} is not enabled",
                where=s.where(name), do=f"remove the {name} block",
                edits=tuple(s.meaning.remove_deepspeed((name,))),
            )  # fmt: skip
        else:
            yield Found(
                what=f"the {name} block does not say enabled: training is in fp32", where=s.where(name),
                do='write "enabled": true in it',
                edits=tuple(s.meaning.set_deepspeed((name, "enabled"), True)),
            )  # fmt: skip


@config_rule(
    "precision_not_on_hardware",
    "illegal",
    "runtime/engine.py:2003: Type fp16/bf16 is not supported on your device",
)
def precision_not_on_hardware(s: Setup) -> Iterable[Found]:
    """A precision that the hardware does not have."""
    if s.cluster is None:
        return
    if s.on_gpu is False and s.enabled("fp16"):
        yield Found(
            what="fp16 does not run on CPU", where=s.where("fp16", "enabled"), do="use bf16 or fp32",
            edits=switched(s, "fp16", None),
        )  # fmt: skip
    flops = s.cluster.accelerator.flops
    if s.on_gpu and s.bf16 and flops and "bf16" not in flops:
        yield Found(
            what=f"{s.cluster.accelerator.title} has no bf16: the Trainer refuses it, torch alone emulates it slowly",
            where=s.where("bf16", "enabled"), do="use fp16",
            edits=switched(s, "bf16", "fp16"),
        )  # fmt: skip


@config_rule(
    "gradients_at_stage_0",
    "illegal",
    "runtime/engine.py:2313-2323: unsupported mix of dtypes (tried)",
)
def gradients_at_stage_0(s: Setup) -> Iterable[Found]:
    """Without ZeRO, gradients are added up in the model's own type."""
    model, added = model_dtype(s), accumulation_dtype(s)
    if s.stage == 0 and model != added:
        yield Found(
            what=f"data_types.grad_accum_dtype is {added} for a {model} model without ZeRO: DeepSpeed refuses the mix",
            where=s.where("data_types", "grad_accum_dtype"), do="remove it, or use ZeRO stage 1 to 3",
            edits=tuple(s.meaning.remove_deepspeed(("data_types", "grad_accum_dtype"))),
        )  # fmt: skip


@config_rule(
    "bf16_optimizer_instead", "changed", "runtime/engine.py:2305, bf16_optimizer.py:191 (tried)"
)
def bf16_optimizer_instead(s: Setup) -> Iterable[Found]:
    """bf16 at stage 1 with fp32 accumulation becomes BF16_Optimizer: all gradients in fp32, not partitioned."""
    if (
        s.stage != 1
        or not s.bf16
        or accumulation_dtype(s) != "fp32"
        or s.offload("optimizer") == "cpu"
    ):
        return
    size = ""
    if s.spec is not None:
        share = parameter_counts(s.spec).total / max(
            (s.meaning.said("tp") or 1) * (s.meaning.said("pp") or 1), 1
        )
        size = f": {format_bytes(4.0 * share)} more on every rank"
    yield Found(
        what="DeepSpeed uses BF16_Optimizer in place of ZeRO-1's: a whole fp32 gradient buffer, 4 bytes a parameter, "
        f"not partitioned{size}",
        where=s.where("data_types", "grad_accum_dtype"),
        do="use stage 2, which partitions it, or remove grad_accum_dtype",
        edits=tuple(s.meaning.set_deepspeed(("zero_optimization", "stage"), 2)),
    )  # fmt: skip


@config_rule(
    "param_dtype_conflicts",
    "illegal",
    "runtime/engine.py:1827: data_types.param_dtype conflicts with the enabled precision",
)
def param_dtype_conflicts(s: Setup) -> Iterable[Found]:
    """data_types.param_dtype that is not the enabled precision."""
    asked = block(s.ds, "data_types").get("param_dtype")
    if asked is None or _SAME.get(str(asked).lower()) == model_dtype(s):
        return
    yield Found(
        what=f"data_types.param_dtype is {asked}, the enabled precision is {model_dtype(s)}",
        where=s.where("data_types", "param_dtype"), do="remove it",
        edits=tuple(s.meaning.remove_deepspeed(("data_types", "param_dtype"))),
    )  # fmt: skip


@config_rule(
    "low_precision_master_weights", "illegal",
    "runtime/config.py:702; stage_1_and_2.py:331, stage3.py:299: ZeRO 1-3; states need the master weights",
    versions=">=0.18.9,<0.20",
)  # fmt: skip
def low_precision_master_weights(s: Setup) -> Iterable[Found]:
    """16-bit master weights or states without what they need."""
    for name in ("fp16", "bf16"):
        key = f"{name}_master_weights_and_grads"
        if block(s.ds, name).get(key) is True and s.stage == 0:
            yield Found(
                what=f"{name}.{key} needs ZeRO 1, 2 or 3; the stage is 0", where=s.where(name, key),
                do="use a ZeRO stage, or remove it",
                edits=tuple(s.meaning.remove_deepspeed((name, key))),
            )  # fmt: skip
    bf16 = block(s.ds, "bf16")
    if (
        bf16.get("bf16_optimizer_states") is True
        and bf16.get("bf16_master_weights_and_grads") is not True
    ):
        yield Found(
            what="bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads",
            where=s.where("bf16", "bf16_optimizer_states"), do="enable both, or neither",
            edits=tuple(s.meaning.remove_deepspeed(("bf16", "bf16_optimizer_states"))),
        )  # fmt: skip


@config_rule(
    "loss_scale_makes_no_sense",
    "illegal",
    "runtime/precision_config.py: _validate_loss_scale, _validate_dynamic_loss_scale_params",
    versions=">=0.19.4,<0.20",
)
def loss_scale_makes_no_sense(s: Setup) -> Iterable[Found]:
    """Dynamic loss scaling with a window or a floor of zero."""
    fp16 = block(s.ds, "fp16")
    if not s.enabled("fp16") or fp16.get("loss_scale", 0) != 0:
        return
    for key, usual in (("loss_scale_window", 1000), ("min_loss_scale", 1)):
        value = fp16.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value < 1:
            yield Found(
                what=f"fp16.{key} is {value:g}: with dynamic scaling it must be at least 1",
                where=s.where("fp16", key), do=f"write {usual}",
                edits=tuple(s.meaning.set_deepspeed(("fp16", key), usual)),
            )  # fmt: skip


@config_rule(
    "communication_dtype_unknown",
    "illegal",
    "runtime/config.py:226: Invalid communication_data_type",
)
def communication_dtype_unknown(s: Setup) -> Iterable[Found]:
    """A communication_data_type that DeepSpeed does not know."""
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        value = s.written(key)
        if value is None or (isinstance(value, str) and value.lower() in ("fp32", "fp16", "bf16")):
            continue
        better = _SAME.get(str(value).lower())
        yield Found(
            what=f"{key} is {value!r}: it is fp32, fp16 or bf16", where=s.where(key),
            do=f"write {better}" if better else "remove it",
            edits=tuple(s.meaning.set_deepspeed((key,), better) if better else s.meaning.remove_deepspeed((key,))),
        )  # fmt: skip

"""Rules about offload to the host and to NVMe, SuperOffload and ZenFlow."""

from __future__ import annotations

from collections.abc import Iterable

from outlay.planner.read.deepspeed import block, whole
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.setup import Setup

_Z = "zero_optimization"
_OPTIMIZER, _PARAM = (_Z, "offload_optimizer"), (_Z, "offload_param")


@config_rule(
    "offload_param_below_stage_3",
    "ignored",
    "runtime/engine.py:2655-2711: stages 1 and 2 are not given it; accepted (tried); deepspeedai/DeepSpeed#1403",
)
def offload_param_below_stage_3(s: Setup) -> Iterable[Found]:
    """offload_param at another stage than 3: accepted and without effect."""
    if s.stage == 3 or s.offload("param") == "none":
        return
    yield Found(
        what=f"offload_param {s.offload('param')} has no effect at ZeRO-{s.stage}: weights stay on the accelerator",
        where=s.where(*_PARAM), do="remove it, or use stage 3",
        edits=tuple(s.meaning.remove_deepspeed((*_PARAM, "device"))
                    if s.meaning.section and s.meaning.section.document is None
                    else s.meaning.remove_deepspeed(_PARAM)),
    )  # fmt: skip


@config_rule(
    "offload_needs_zero",
    "changed",
    "ops/adam/cpu_adam.py: the step asserts that weights are on the CPU; without ZeRO they are not",
)
def offload_needs_zero(s: Setup) -> Iterable[Found]:
    """offload_optimizer without ZeRO: DeepSpeedCPUAdam gets weights that are on the accelerator."""
    if s.stage == 0 and s.offload("optimizer") != "none" and s.on_gpu is not False:
        yield Found(
            what="offload_optimizer without ZeRO: it initializes (tried on CPU); on a GPU the CPU optimizer then "
            "asserts at the first step that its weights are on the CPU",
            where=s.where(*_OPTIMIZER), do="use stage 2",
            edits=tuple(s.meaning.set_deepspeed((_Z, "stage"), 2)),
        )  # fmt: skip


@config_rule(
    "nvme_needs_stage_3",
    "changed",
    "runtime/zero/stage_1_and_2.py:221: any device but none is cpu_offload there",
)
def nvme_needs_stage_3(s: Setup) -> Iterable[Found]:
    """Offload to NVMe below stage 3: the states stay in host memory."""
    if s.offload("optimizer") == "nvme" and s.stage in (1, 2):
        yield Found(
            what=f"offload_optimizer nvme at ZeRO-{s.stage}: DeepSpeed keeps the states in host memory, not on NVMe",
            where=s.where(*_OPTIMIZER, "device"), do="write cpu, or use stage 3",
            edits=tuple(s.meaning.set_deepspeed((*_OPTIMIZER, "device"), "cpu")),
        )  # fmt: skip


@config_rule(
    "nvme_needs_a_path", "illegal", "runtime/swap_tensor: the swap folder is made below nvme_path"
)
def nvme_needs_a_path(s: Setup) -> Iterable[Found]:
    """Offload to NVMe without nvme_path."""
    for part in ("optimizer", "param"):
        offload = block(s.zero, f"offload_{part}")
        if (
            offload.get("device") != "nvme"
            or s.stage != 3
            or offload.get("nvme_path") not in (None, "", "none")
        ):
            continue
        yield Found(
            what=f"offload_{part} nvme without nvme_path", where=s.where(_Z, f"offload_{part}", "device"),
            do="add nvme_path, a folder on the drive of every node (the mend writes /local_nvme)",
            edits=tuple(s.meaning.set_deepspeed((_Z, f"offload_{part}", "nvme_path"), "/local_nvme")),
        )  # fmt: skip


@config_rule(
    "partial_offload",
    "illegal",
    "runtime/zero/config.py: offload_ratio_check; stage3.py:316 (DeepSpeedCPUAdam); deepspeedai/DeepSpeed#4872",
    versions=">=0.14.4,<0.20",
)
def partial_offload(s: Setup) -> Iterable[Found]:
    """offload_optimizer.ratio below 1 at another stage than 3, or to NVMe."""
    ratio = block(s.zero, "offload_optimizer").get("ratio", 1.0)
    if not isinstance(ratio, int | float) or ratio >= 1:
        return
    if s.stage != 3:
        yield Found(
            what=f"offload_optimizer.ratio {ratio:g} at ZeRO-{s.stage}: partial offload is stage 3 only",
            where=s.where(*_OPTIMIZER, "ratio"), do="remove it, or use stage 3",
            edits=tuple(s.meaning.remove_deepspeed((*_OPTIMIZER, "ratio"))),
        )  # fmt: skip
    elif s.offload("optimizer") == "nvme":
        yield Found(
            what=f"offload_optimizer.ratio {ratio:g} with device nvme: a part of the states can go to the host only",
            where=s.where(*_OPTIMIZER, "ratio"), do="write device cpu",
            edits=tuple(s.meaning.set_deepspeed((*_OPTIMIZER, "device"), "cpu")
                        + s.meaning.remove_deepspeed((*_OPTIMIZER, "nvme_path"))),
        )  # fmt: skip


@config_rule(
    "old_offload_key",
    "changed",
    "runtime/zero/config.py: cpu_offload, deprecated; set beside its new name it is refused",
)
def old_offload_key(s: Setup) -> Iterable[Found]:
    """cpu_offload and its kin under their old names."""
    zero = block(s.raw, _Z)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old not in zero:
            continue
        edits = s.meaning.remove_deepspeed((_Z, old))
        if new in zero:
            yield Found(
                what=f"{old} and {new} together are refused", where=s.where(_Z, old), do=f"remove {old}",
                edits=tuple(edits), level="illegal",
            )  # fmt: skip
        elif zero[old] is True:
            yield Found(
                what=f"{old} is the old name: DeepSpeed takes it as {new} to the host, with its defaults",
                where=s.where(_Z, old), do=f'write "{new}": {{"device": "cpu"}}', level="advice",
                edits=tuple(edits + s.meaning.set_deepspeed((_Z, new), {"device": "cpu"})),
            )  # fmt: skip
    if "cpu_offload_use_pin_memory" in zero:
        yield Found(
            what="cpu_offload_use_pin_memory has no effect: pin_memory belongs into the offload blocks",
            where=s.where(_Z, "cpu_offload_use_pin_memory"), do="remove it", level="ignored",
            edits=tuple(s.meaning.remove_deepspeed((_Z, "cpu_offload_use_pin_memory"))),
        )  # fmt: skip


@config_rule(
    "super_offload",
    "illegal",
    "runtime/superoffload/superoffload_stage3.py:23 (CUDA); engine.py:2731 (stage 3 alone reads it)",
    versions=">=0.18.9,<0.20",
)
def super_offload(s: Setup) -> Iterable[Found]:
    """SuperOffload off CUDA, or at another stage than 3."""
    if block(s.zero, "offload_optimizer").get("super_offload") is not True:
        return
    edits = tuple(s.meaning.remove_deepspeed((*_OPTIMIZER, "super_offload")))
    where = s.where(*_OPTIMIZER, "super_offload")
    if s.stage != 3:
        yield Found(
            what=f"super_offload has no effect at ZeRO-{s.stage}: it is stage 3 only", where=where,
            do="remove it, or use stage 3", edits=edits, level="ignored",
        )  # fmt: skip
    elif s.cluster is not None and s.cluster.accelerator.vendor.lower() != "nvidia":
        yield Found(
            what=f"super_offload runs on CUDA only, not on {s.cluster.accelerator.title}", where=where,
            do="remove it", edits=edits,
        )  # fmt: skip


@config_rule(
    "zenflow",
    "illegal",
    "runtime/zenflow/zenflow_stage_1_and_2.py:76-145, engine.py:39-63",
    versions=">=0.17.6,<0.20",
)
def zenflow(s: Setup) -> Iterable[Found]:
    """ZenFlow without offload to the host, or with intervals that do not fit."""
    flow = s.zero.get("zenflow")
    if not isinstance(flow, dict):
        return
    if s.offload("optimizer") != "cpu" and s.stage in (1, 2):
        yield Found(
            what="zenflow needs offload_optimizer to the host", where=s.where(_Z, "zenflow"),
            do='add "offload_optimizer": {"device": "cpu"}',
            edits=tuple(s.meaning.set_deepspeed(_OPTIMIZER, {"device": "cpu"})),
        )  # fmt: skip
    chosen, updated = whole(flow.get("select_interval")), whole(flow.get("update_interval"))
    strategy = flow.get("select_strategy", "auto")
    if strategy == "auto" and chosen is not None:
        yield Found(
            what="zenflow.select_interval is a number while select_strategy is auto: DeepSpeed refuses it",
            where=s.where(_Z, "zenflow", "select_interval"), do="remove it",
            edits=tuple(s.meaning.remove_deepspeed((_Z, "zenflow", "select_interval"))),
        )  # fmt: skip
    elif strategy == "step" and chosen is not None and updated is not None and chosen < updated:
        yield Found(
            what=f"zenflow.select_interval {chosen} is below update_interval {updated}",
            where=s.where(_Z, "zenflow", "select_interval"), do=f"write {updated}",
            edits=tuple(s.meaning.set_deepspeed((_Z, "zenflow", "select_interval"), updated)),
        )  # fmt: skip


@config_rule(
    "own_optimizer_with_offload",
    "advice",
    "runtime/engine.py:2346: ZeRORuntimeException; deepspeedai/DeepSpeed#7524",
)
def own_optimizer_with_offload(s: Setup) -> Iterable[Found]:
    """Offload without an optimizer in the file: one that the script passes must be DeepSpeed's CPU one."""
    if s.meaning.trainer or s.offload("optimizer") == "none" or s.stage == 0:
        return
    if (
        s.raw.get("optimizer") is None
        and s.raw.get("zero_force_ds_cpu_optimizer", True) is not False
    ):
        yield Found(
            what="there is no optimizer in the file: one that the script passes must be DeepSpeedCPUAdam, or "
            "DeepSpeed refuses it", where=s.where(),
            do="add an optimizer block, or zero_force_ds_cpu_optimizer false",
        )  # fmt: skip

"""A configuration as DeepSpeed gets it: `auto` filled, batch closed, with model and hardware beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from outlay.planner.read.deepspeed import AUTO, BATCH, block, has_auto, whole
from outlay.planner.read.document import KeyPath
from outlay.planner.read.known import Version
from outlay.planner.read.meaning import Meaning, Said
from outlay.planner.rules.value_kinds import stage_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.model import ModelSpec

DEFAULT_BUCKET = 500_000_000
"""Elements: DeepSpeed's reduce and all-gather bucket where nobody sets them (runtime/zero/config.py)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a rule over configurations looks at."""

    meaning: Meaning
    version: Version
    spec: ModelSpec | None = None
    cluster: Cluster | None = None
    world: int | None = None
    """Processes that will run; null where neither the file nor --hardware says."""
    raw: dict[str, Any] = field(default_factory=dict)
    """The DeepSpeed configuration as it is written."""
    ds: dict[str, Any] = field(default_factory=dict)
    """The same with `auto` filled where the value is known."""

    @property
    def uses_deepspeed(self) -> bool:
        return self.meaning.section is not None

    @property
    def zero(self) -> dict[str, Any]:
        """The zero_optimization block; `true` is stage 1 in DeepSpeed's old format."""
        found = self.ds.get("zero_optimization")
        return (
            {"stage": 1 if found else 0}
            if isinstance(found, bool)
            else block(self.ds, "zero_optimization")
        )

    @property
    def stage(self) -> int:
        """ZeRO stage as pydantic reads it; 0 where it is missing or no stage."""
        return stage_of(self.zero.get("stage", 0)) or 0

    def offload(self, part: str) -> str:
        """none | cpu | nvme, of `optimizer` or `param`."""
        device = block(self.zero, f"offload_{part}").get("device", "none")
        if (
            device == "none"
            and self.zero.get("cpu_offload" + ("_param" if part == "param" else "")) is True
        ):
            return "cpu"
        return str(device)

    def enabled(self, name: str) -> bool:
        """Whether a block such as fp16 is on."""
        return str(block(self.ds, name).get("enabled", False)).lower() == "true"

    @property
    def bf16(self) -> bool:
        return self.enabled("bf16") or self.enabled("bfloat16")

    @property
    def on_gpu(self) -> bool | None:
        """Null where no hardware is named."""
        return None if self.cluster is None else self.cluster.kind != "cpu"

    @property
    def model_parallel(self) -> int:
        said = self.meaning.said
        return (said("tp") or 1) * (said("pp") or 1) * (said("sp") or 1)

    @property
    def dp(self) -> int | None:
        """Data-parallel ranks; null where the world is unknown or is not divided."""
        if self.world is None or self.world % self.model_parallel:
            return None
        return self.world // self.model_parallel

    def where(self, *path: str) -> str:
        return self.meaning.where(path)

    def written(self, *path: str) -> Any:
        """A value as it stands in the configuration."""
        value: Any = self.raw
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def _fill(config: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set a key that says auto; leave it where the value is unknown."""
    inner: Any = config
    for key in path[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if isinstance(inner, dict) and inner.get(path[-1]) == AUTO and value is not None:
        inner[path[-1]] = value


_Z = "zero_optimization"
PLUGIN_DEFAULTS: dict[KeyPath, Any] = {
    (_Z, "stage"): 2, (_Z, "offload_optimizer", "device"): "none", (_Z, "offload_param", "device"): "none",
    (_Z, "offload_optimizer", "nvme_path"): "none", (_Z, "offload_param", "nvme_path"): "none",
    (_Z, "stage3_gather_16bit_weights_on_model_save"): False,
}  # fmt: skip
"""What accelerate fills further where a DeepSpeed file says auto (accelerate 1.15, utils/dataclasses.py:1280)."""


def _without_auto(value: Any) -> Any:
    """A block as DeepSpeed takes it: a key that still says auto is left out, so its default holds
    (runtime/config_utils.py:56)."""
    if not isinstance(value, dict):
        return value
    return {k: _without_auto(v) for k, v in value.items() if not isinstance(v, str) or v != AUTO}


def filled(meaning: Meaning, spec: ModelSpec | None, dp: int | None) -> dict[str, Any]:
    """The configuration as DeepSpeed gets it: `auto` filled, and left out where nobody fills it."""
    assert meaning.section is not None
    config: dict[str, Any] = copy.deepcopy(meaning.section.config)
    if not has_auto(config):
        return config
    if meaning.trainer:
        _fill_in(config, meaning, spec, dp)
    optimizers = ("optimizer", "scheduler")  # their `auto` is a text that the optimizer gets
    return {k: v if k in optimizers else _without_auto(v) for k, v in config.items()}


def _fill_in(
    config: dict[str, Any], meaning: Meaning, spec: ModelSpec | None, dp: int | None
) -> None:
    """transformers' and accelerate's filling (transformers 5.23, integrations/deepspeed.py)."""
    said = meaning.said
    micro, accum = said("micro_batch"), said("grad_accum")
    _fill(config, (BATCH["micro_batch"],), micro)
    _fill(config, (BATCH["grad_accum"],), accum)
    whole_batch = micro * accum * dp if None not in (micro, accum, dp) else None
    _fill(config, (BATCH["global_batch"],), whole_batch)
    _fill(config, ("gradient_clipping",), said("clipping"))
    precision = said("precision")
    for name in ("bf16", "fp16"):
        _fill(config, (name, "enabled"), None if precision is None else precision == name)
    for path, value in PLUGIN_DEFAULTS.items():
        _fill(config, path, value)
    hidden = None if spec is None else spec.hidden
    if hidden is not None:
        _fill(config, ("zero_optimization", "reduce_bucket_size"), hidden * hidden)
        _fill(
            config, ("zero_optimization", "stage3_prefetch_bucket_size"), int(0.9 * hidden * hidden)
        )
        _fill(config, ("zero_optimization", "stage3_param_persistence_threshold"), 10 * hidden)
    if precision in ("bf16", "fp16") and not any(k in config for k in ("bf16", "fp16", "bfloat16")):
        config[precision] = {"enabled": True}


def _with_stages(meaning: Meaning, world: int | None) -> Meaning:
    """A pipeline block rarely says its stages: then they follow from the batch, where that closes."""
    section, said = meaning.section, meaning.said
    if section is None or "pipeline" not in section.config or said("pp") or world is None:
        return meaning
    micro, accum, total = (whole(section.config.get(key)) for key in BATCH.values())
    if micro is None or accum is None or total is None or total % (micro * accum):
        return meaning
    ranks = total // (micro * accum) * (said("tp") or 1) * (said("sp") or 1)
    if world % ranks or world == ranks:
        return meaning
    stages = Said(
        value=world // ranks,
        where=meaning.where(("pipeline",)),
        default="from the batch over the ranks",
    )
    return replace(meaning, values=meaning.values | {"pp": stages})


def setup_of(
    meaning: Meaning, version: Version, *, spec: ModelSpec | None = None, cluster: Cluster | None = None,
) -> Setup:  # fmt: skip
    """A configuration ready for the rules."""
    world = meaning.said("world") or (cluster.ranks if cluster is not None else None)
    meaning = _with_stages(meaning, world)
    setup = Setup(meaning=meaning, version=version, spec=spec, cluster=cluster, world=world)
    if meaning.section is None:
        return setup
    ds = filled(meaning, spec, setup.dp)
    return Setup(
        meaning=meaning, version=version, spec=spec, cluster=cluster, world=world,
        raw=meaning.section.config, ds=ds,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences: a micro-batch, how many of them a step, and all ranks' together; null = not known."""

    micro: int | None
    accum: int | None
    whole: int | None


def batch_of(s: Setup) -> Batch:
    """What DeepSpeed makes of the three batch keys (runtime/config.py:602-650), or the Trainer's arguments."""
    said = s.meaning.said
    micro, accum, total = (
        whole(s.ds.get(BATCH[k])) for k in ("micro_batch", "grad_accum", "global_batch")
    )
    if s.meaning.framework != "deepspeed":
        micro, accum = said("micro_batch") or micro, said("grad_accum") or accum
        total = total or said("global_batch")
    dp = s.dp
    if micro is None and total is not None and dp is not None:
        micro = total // dp // (accum or 1) or None
    if accum is None and micro is not None:
        accum = total // micro // dp if total is not None and dp is not None else 1
    if None not in (micro, accum, dp):
        total = micro * accum * dp  # type: ignore[operator]
    return Batch(micro=micro, accum=accum or None, whole=total)

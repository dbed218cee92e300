"""A setup → the strategy, job and cluster that the estimator takes; or why it cannot be estimated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.jobs import JobFile, resolve_job
from outlay.planner.options import OPTIMIZERS
from outlay.planner.read.deepspeed import MOST_WHOLE, whole
from outlay.planner.read.meaning import Meaning
from outlay.planner.rules.config_precision import accumulation_dtype
from outlay.planner.rules.setup import DEFAULT_BUCKET, Setup, batch_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Finetune, Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import OutlayError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags of `outlay check` say beside the file."""

    seq_len: int | None = None
    micro_batch: int | None = None
    grad_accum: int | None = None
    activation_checkpointing: str | None = None
    steps: int | None = None
    tokens: str | None = None
    data: str | None = None
    optimizer: str | None = None
    finetune: str | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that an estimate needs."""

    spec: ModelSpec
    job: Job
    cluster: Cluster
    strategy: Strategy
    assumptions: list[dict[str, Any]]

    def estimate(self) -> dict[str, Any]:
        """As `outlay estimate --format json` prints it."""
        e = evaluate(self.spec, self.job, self.cluster, Candidates.of([self.strategy]))
        found = estimate_dict(self.spec, self.job, self.cluster, e, 0)
        found["assumptions"] = self.assumptions + found["assumptions"]
        return found


class Unknown(Exception):
    """Why there is no estimate."""


def cluster_for(cluster: Cluster, world: int) -> Cluster:
    """The part of a cluster that so many processes use."""
    if world == cluster.ranks:
        return cluster
    per_node = min(world, cluster.ranks_per_node)
    if world > cluster.ranks or world % per_node:
        raise Unknown(
            f"{world} processes do not fill {cluster.ranks} accelerators of this hardware"
        )
    nodes = world // per_node
    return replace(
        cluster, nodes=nodes, ranks_per_node=per_node, inter=cluster.inter if nodes > 1 else None
    )


def _elements(value: Any) -> int | None:
    """A bucket: DeepSpeed takes one larger than any model, and it is then the model's size."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return whole(min(value, MOST_WHOLE)) if number else None


def strategy_of(
    s: Setup, *, micro: int, accum: int, dp: int, checkpointing: str, loss: str
) -> Strategy:
    """The file's way of spreading the work, in the estimator's words."""
    zero, said = s.zero, s.meaning.said
    stage = s.stage
    gather_key = "stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"
    gather = zero.get(gather_key, 50_000_000 if stage == 3 else DEFAULT_BUCKET)
    offload_param = s.offload("param") if stage == 3 else "none"
    offload_optimizer = s.offload("optimizer") if stage >= 1 else "none"
    if offload_optimizer == "nvme" and stage < 3:
        offload_optimizer = "cpu"  # what DeepSpeed does: rule nvme_needs_stage_3
    return Strategy(
        zero=stage, dp=dp, tp=said("tp") or 1, pp=said("pp") or 1, sp=said("sp") or 1, ep=said("ep") or 1,
        micro_batch=micro, grad_accum=accum, activation_checkpointing=checkpointing,  # type: ignore[arg-type]
        offload_optimizer=offload_optimizer, offload_param=offload_param,  # type: ignore[arg-type]
        reduce_bucket_size=_elements(zero.get("reduce_bucket_size", DEFAULT_BUCKET)) if stage else None,
        allgather_bucket_size=_elements(gather) if stage else None,
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)) if stage else False,
        loss=loss,  # type: ignore[arg-type]
    )  # fmt: skip


def _note(what: str, value: Any, source: str) -> dict[str, Any]:
    return {"what": what, "value": value, "source": source}


def _finetune(meaning: Meaning, asked: Asked) -> Finetune | str | None:
    if asked.finetune is not None:
        return asked.finetune
    said = meaning.said("finetune")
    if not isinstance(said, dict):
        return None
    return Finetune(method=said["method"], rank=said["rank"], quant=said["quant"])


def _adapted_besides(s: Setup) -> str:
    """What the file says of LoRA's targets beyond q and v, which alone are estimated; empty where nothing."""
    given = s.meaning.flags.get("arguments", {})
    if given.get("lora_target_linear") is True:
        return "lora_target_linear: true"
    for key in ("lora_target_modules", "lora_target"):
        value = given.get(key)
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list):
            more = {str(name).strip() for name in names} - {"q_proj", "v_proj"}
            return f"{key}: {', '.join(sorted(more))}" if more else ""
    return "lora_target: all, by default" if s.meaning.framework == "llamafactory" else ""


def _batch(s: Setup, asked: Asked, notes: list[dict[str, Any]]) -> tuple[int, int]:
    """(micro-batch, accumulation): the flag's, the file's, or 1 with a note."""
    batch, values = batch_of(s), s.meaning.values
    found = []
    for name, value in (("micro_batch", batch.micro), ("grad_accum", batch.accum)):
        flag = getattr(asked, name)
        if flag is None and value is None:
            said = f"default: the file does not say it; --{name.replace('_', '-')} does"
            notes.append(_note(name, 1, said))
        elif flag is None and name in values and values[name].default:
            notes.append(_note(name, value, f"default: {values[name].default}"))
        found.append(flag or value or 1)
    return found[0], found[1]


def _checkpointing(s: Setup, asked: Asked, notes: list[dict[str, Any]]) -> str:
    if asked.activation_checkpointing is not None:
        return asked.activation_checkpointing
    said = s.meaning.values.get("checkpointing")
    value = "none" if said is None else str(said.value)
    why = "the file does not say it; the script may" if said is None else said.default
    if why:
        notes.append(_note("activation_checkpointing", value, f"default: {why}"))
    return value


def _optimizer(s: Setup, asked: Asked, notes: list[dict[str, Any]]) -> str:
    found = asked.optimizer or s.meaning.said("optimizer")
    if found is None:
        found = "adamw"
        notes.append(_note("optimizer", "adamw", "default: the file names none"))
    if found not in OPTIMIZERS:
        raise Unknown(
            f"the states of optimizer {found} are not known; --optimizer names one that is"
        )
    return str(found)


_OF_THE_SHELL = {
    "per_device_train_batch_size": "micro_batch", "gradient_accumulation_steps": "grad_accum",
}  # fmt: skip
"""What a command may leave to the shell, and the flag of ours that says it instead."""


def _require_plain(s: Setup, asked: Asked) -> None:
    """Raise Unknown where a command's batch is worked out by the shell."""
    if s.meaning.framework != "launch":
        return
    for key, flag in _OF_THE_SHELL.items():
        value = s.meaning.flags["arguments"].get(key)
        if isinstance(value, str) and "$" in value and getattr(asked, flag) is None:
            raise Unknown(
                f"{key} is worked out by the shell ({value}): pass --{flag.replace('_', '-')}"
            )


def _known(s: Setup, model_note: str) -> tuple[ModelSpec, Cluster, int]:
    """(model, the ranks' part of the hardware, data-parallel ranks). Raises Unknown."""
    if s.spec is None:
        raise Unknown(f"the model is not known: {model_note}; pass --model")
    if s.meaning.missing_file is not None:
        raise Unknown(
            f"sharding and offload are said in {s.meaning.missing_file}, which is not here"
        )
    if s.cluster is None:
        raise Unknown("no hardware is named: pass --hardware")
    if s.meaning.flags.get("arguments", {}).get("fsdp") and not s.uses_deepspeed:
        raise Unknown("it trains with FSDP, and this check knows DeepSpeed's way to divide only")
    if s.meaning.flags.get("megatron"):
        raise Unknown(
            "it trains with Megatron, and this check knows DeepSpeed's way to divide only"
        )
    if s.meaning.framework == "launch" and not s.uses_deepspeed and not s.meaning.trainer:
        raise Unknown(
            "the command says nothing of batch and sharding: check the file that its script reads"
        )
    if s.dp is None:
        raise Unknown(f"{s.world} ranks are not divided by tensor · pipeline · sequence parallel")
    return s.spec, cluster_for(s.cluster, s.world or s.cluster.ranks), s.dp


def question_of(s: Setup, asked: Asked, model_note: str) -> Question:
    """Raises Unknown where something that the figures depend on is not known."""
    spec, cluster, dp = _known(s, model_note)
    _require_plain(s, asked)
    said = s.meaning.said
    notes: list[dict[str, Any]] = []
    if "by its name" in model_note:
        notes.append(_note("model", spec.name, model_note))
    micro, accum = _batch(s, asked, notes)
    strategy = strategy_of(
        s, micro=micro, accum=accum, dp=dp, checkpointing=_checkpointing(s, asked, notes),
        loss=str(said("loss") or "plain"),
    )  # fmt: skip
    if not s.uses_deepspeed:
        notes.append(
            _note(
                "software", "deepspeed", "default: no DeepSpeed is used; estimated as its stage 0"
            )
        )
    if s.uses_deepspeed and accumulation_dtype(s) == "fp32" and s.bf16:
        fp32 = "gradients are estimated in bf16: fp32 takes twice that"
        notes.append(_note("grad_accum_dtype", "fp32", fp32))
    finetune = _finetune(s.meaning, asked)
    if finetune is not None and (more := _adapted_besides(s)):
        notes.append(
            _note(
                "adapters",
                "on q and v",
                f"default: only these are estimated; the file adapts more ({more}), which takes more",
            )
        )
    file = JobFile(
        model=spec.name, seq_len=asked.seq_len or said("seq_len"), global_batch=strategy.global_batch,
        steps=asked.steps or (None if asked.tokens or asked.data else said("steps")), tokens=asked.tokens,
        data=asked.data, epochs=said("epochs") if asked.data else None, precision=said("precision"),
        optimizer=_optimizer(s, asked, notes), finetune=finetune,
        attention=said("attention") if said("attention") in ("eager", "sdpa", "flash") else None,
    )  # fmt: skip
    try:
        resolved = resolve_job(file, spec, cluster)
    except OutlayError as error:
        raise Unknown(error.what) from error
    return Question(
        spec=spec, job=resolved.job, cluster=cluster, strategy=strategy,
        assumptions=notes + resolved.assumptions,
    )  # fmt: skip

"""Rules about optimizer, scheduler, clipping, experts and recomputation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from outlay.planner.read.deepspeed import block, whole
from outlay.planner.read.known import known, names
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_keys import near
from outlay.planner.rules.setup import Setup

_TYPE = ("optimizer", "type")


def _type(s: Setup) -> str | None:
    kind = block(s.ds, "optimizer").get("type")
    return kind if isinstance(kind, str) else None


def _params(s: Setup, part: str) -> dict[str, Any]:
    return block(block(s.ds, part), "params")


@config_rule(
    "clipping_in_the_optimizer",
    "illegal",
    "runtime/engine.py:2482 (tried); deepspeedai/DeepSpeed#656",
)
def clipping_in_the_optimizer(s: Setup) -> Iterable[Found]:
    """max_grad_norm among the optimizer's parameters: clipping is gradient_clipping."""
    value = _params(s, "optimizer").get("max_grad_norm")
    if value is None:
        return
    edits = s.meaning.remove_deepspeed(("optimizer", "params", "max_grad_norm"))
    if s.raw.get("gradient_clipping") is None:
        edits += s.meaning.set_deepspeed(("gradient_clipping",), value)
    yield Found(
        what=f"optimizer.params.max_grad_norm {value!r}: DeepSpeed refuses it there",
        where=s.where("optimizer", "params", "max_grad_norm"), do=f"write gradient_clipping {value}",
        edits=tuple(edits),
    )  # fmt: skip


@config_rule(
    "optimizer_unknown",
    "illegal",
    "runtime/engine.py:1985: a native name or a class of torch.optim",
)
def optimizer_unknown(s: Setup) -> Iterable[Found]:
    """An optimizer that DeepSpeed does not have."""
    kind = _type(s)
    lists = known("deepspeed")["optimizers"]
    if (
        kind is None
        or kind.lower() in names("deepspeed", "optimizers", "native")
        or kind in lists["torch"].split()
    ):
        return
    gone = kind.lower() in lists["removed"].split()
    if gone and s.version < (0, 19, 7):
        return
    meant = near(kind, lists["torch"].split()) or "AdamW"
    yield Found(
        what=f"optimizer {kind} " + ("was removed from DeepSpeed" if gone else "is none of DeepSpeed's nor of torch's"),
        where=s.where(*_TYPE), do=f"write {meant}", edits=tuple(s.meaning.set_deepspeed(_TYPE, meant)),
    )  # fmt: skip


@config_rule(
    "optimizer_untested_with_zero",
    "illegal",
    "runtime/engine.py:2298, zero/utils.py:45; deepspeedai/DeepSpeed#161",
)
def optimizer_untested_with_zero(s: Setup) -> Iterable[Found]:
    """ZeRO with an optimizer that DeepSpeed has not tested with it, and without the key that allows it."""
    kind = _type(s)
    if (
        kind is None
        or s.stage == 0
        or s.ds.get("zero_allow_untested_optimizer")  # any text is taken as true
        or s.meaning.trainer
    ):
        return
    native = kind.lower() in names("deepspeed", "optimizers", "native")
    listed = names("deepspeed", "optimizers", "zero_supported")
    if (kind.lower() if native else kind) in listed:
        return
    if not native and kind not in known("deepspeed")["optimizers"]["torch"].split():
        return
    yield Found(
        what=f"optimizer {kind} with ZeRO-{s.stage}: DeepSpeed wants zero_allow_untested_optimizer for it",
        where=s.where(*_TYPE), do="write zero_allow_untested_optimizer true",
        edits=tuple(s.meaning.set_deepspeed(("zero_allow_untested_optimizer",), True)),
    )  # fmt: skip


@config_rule(
    "adam_is_adamw",
    "changed",
    "runtime/engine.py:2488: Adam forces AdamW logic unless adam_w_mode is false",
)
def adam_is_adamw(s: Setup) -> Iterable[Found]:
    """Adam with weight decay is run as AdamW."""
    params = _params(s, "optimizer")
    if (_type(s) or "").lower() != "adam" or "adam_w_mode" in params:
        return
    decay = params.get("weight_decay", 0)
    if decay in (0, 0.0, None):
        return
    yield Found(
        what=f"optimizer Adam with weight_decay {decay}: DeepSpeed runs AdamW, whose decay is not in the gradient",
        where=s.where(*_TYPE), do="write AdamW if that is meant, or adam_w_mode false", level="advice",
        edits=tuple(s.meaning.set_deepspeed(_TYPE, "AdamW")),
    )  # fmt: skip


@config_rule(
    "lamb_needs_dynamic_scaling",
    "illegal",
    "runtime/engine.py:2022: Lamb requires dynamic loss scaling",
)
def lamb_needs_dynamic_scaling(s: Setup) -> Iterable[Found]:
    """Lamb with a fixed loss scale."""
    scale = block(s.ds, "fp16").get("loss_scale", 0)
    if (_type(s) or "").lower() == "lamb" and isinstance(scale, int | float) and scale != 0:
        yield Found(
            what=f"optimizer Lamb with fp16.loss_scale {scale:g}: it needs dynamic scaling",
            where=s.where("fp16", "loss_scale"), do="write 0",
            edits=tuple(s.meaning.set_deepspeed(("fp16", "loss_scale"), 0)),
        )  # fmt: skip


@config_rule(
    "scheduler_unknown",
    "illegal",
    "runtime/engine.py:1929: one of DeepSpeed's or of torch.optim.lr_scheduler",
)
def scheduler_unknown(s: Setup) -> Iterable[Found]:
    """A scheduler that DeepSpeed does not have."""
    kind = block(s.ds, "scheduler").get("type")
    native, torch_ones = names("deepspeed", "schedulers"), names("deepspeed", "torch_schedulers")
    if not isinstance(kind, str) or kind in native or kind in torch_ones:
        return
    meant = near(kind, native | torch_ones) or "WarmupLR"
    yield Found(
        what=f"scheduler {kind} is none of DeepSpeed's nor of torch's", where=s.where("scheduler", "type"),
        do=f"write {meant}", edits=tuple(s.meaning.set_deepspeed(("scheduler", "type"), meant)),
    )  # fmt: skip


@config_rule(
    "warmup_is_positive",
    "illegal",
    "runtime/lr_schedules.py:734, 875: warmup_num_steps must be a positive integer",
    versions=">=0.19.4,<0.20",
)
def warmup_is_positive(s: Setup) -> Iterable[Found]:
    """A warm-up of zero steps; before 0.19.4 it was taken as 2."""
    kind, params = block(s.ds, "scheduler").get("type"), _params(s, "scheduler")
    steps = params.get("warmup_num_steps")
    if (
        kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
        and isinstance(steps, int | float)
        and steps < 1
    ):
        yield Found(
            what=f"scheduler.params.warmup_num_steps is {steps:g}: it must be at least 1",
            where=s.where("scheduler", "params", "warmup_num_steps"), do="write 1",
            edits=tuple(s.meaning.set_deepspeed(("scheduler", "params", "warmup_num_steps"), 1)),
        )  # fmt: skip


@config_rule(
    "decay_needs_an_end",
    "illegal",
    "runtime/lr_schedules.py:814, 865: total_num_steps has no default",
)
def decay_needs_an_end(s: Setup) -> Iterable[Found]:
    """A decaying scheduler without total_num_steps."""
    kind, params = block(s.ds, "scheduler").get("type"), _params(s, "scheduler")
    if kind in ("WarmupDecayLR", "WarmupCosineLR") and params.get("total_num_steps") is None:
        steps = s.meaning.said("steps")
        value = "auto" if s.meaning.trainer else steps
        yield Found(
            what=f"scheduler {kind} without total_num_steps: it cannot know when to end",
            where=s.where("scheduler", "params"),
            do=f"write total_num_steps {value}" if value else "write total_num_steps, the optimizer steps of the run",
            edits=tuple(s.meaning.set_deepspeed(("scheduler", "params", "total_num_steps"), value) if value else ()),
        )  # fmt: skip


@config_rule(
    "clipping_is_off",
    "ignored",
    "transformers 5.23, integrations/deepspeed.py: fill_match fills a key that is there; axolotl-ai-cloud/axolotl#1381",
)
def clipping_is_off(s: Setup) -> Iterable[Found]:
    """max_grad_norm without gradient_clipping in the DeepSpeed file: nothing is clipped."""
    if (
        not s.meaning.trainer
        or s.raw.get("gradient_clipping") is not None
        or s.meaning.framework in ("deepspeed", "accelerate")
    ):
        return
    if s.meaning.section is not None and s.meaning.section.document is None:
        return
    value = s.meaning.said("clipping")
    given = s.meaning.explicit("clipping")
    if not isinstance(value, int | float) or value <= 0:
        return
    yield Found(
        what=f"max_grad_norm {value:g} has no effect: the DeepSpeed file has no gradient_clipping"
        if given else "gradients are not clipped: the DeepSpeed file has no gradient_clipping for the Trainer to fill",
        where=s.meaning.values["clipping"].where or s.where(),
        do='write "gradient_clipping": "auto" in the DeepSpeed file',
        edits=tuple(s.meaning.set_deepspeed(("gradient_clipping",), "auto")), level="ignored" if given else "advice",
    )  # fmt: skip


@config_rule(
    "recomputation_block_alone",
    "ignored",
    "activation_checkpointing/config.py configures deepspeed.checkpointing, which transformers' models do not call",
)
def recomputation_block_alone(s: Setup) -> Iterable[Found]:
    """An activation_checkpointing block: it recomputes nothing by itself."""
    written = s.raw.get("activation_checkpointing")
    if not isinstance(written, dict) or not any(
        v not in (False, None, 0) for v in written.values()
    ):
        return
    trainer = s.meaning.trainer
    if trainer and s.meaning.said("checkpointing") == "full" and s.meaning.framework != "deepspeed":
        return
    said = s.meaning.values.get("checkpointing")
    edits = s.meaning.remove_deepspeed(("activation_checkpointing",))
    if trainer and said is not None and said.place is not None:
        edits += s.meaning.set_value("checkpointing", s.meaning.framework != "llamafactory")
    yield Found(
        what="activation_checkpointing recomputes nothing by itself: it only configures deepspeed.checkpointing, which "
        + ("transformers' models do not call" if trainer else "the model has to call"),
        where=s.where("activation_checkpointing"),
        do="set gradient_checkpointing in the training arguments" if trainer
        else "call deepspeed.checkpointing.checkpoint in the model, or torch.utils.checkpoint",
        level="ignored" if trainer else "advice", edits=tuple(edits) if trainer else (),
    )  # fmt: skip


@config_rule(
    "contiguous_checkpoints_need_partitions",
    "illegal",
    "runtime/activation_checkpointing/checkpointing.py:1229-1231",
)
def contiguous_checkpoints_need_partitions(s: Setup) -> Iterable[Found]:
    """contiguous_memory_optimization without what it asserts, in a pipeline that calls it."""
    written = block(s.ds, "activation_checkpointing")
    if written.get("contiguous_memory_optimization") is not True or s.meaning.trainer:
        return
    missing = [k for k in ("partition_activations", "number_checkpoints") if not written.get(k)]
    if missing:
        yield Found(
            what=f"activation_checkpointing.contiguous_memory_optimization needs {' and '.join(missing)}",
            where=s.where("activation_checkpointing", "contiguous_memory_optimization"), do="write false",
            edits=tuple(s.meaning.set_deepspeed(("activation_checkpointing", "contiguous_memory_optimization"), False)),
        )  # fmt: skip


@config_rule(
    "experts_at_stage_3",
    "illegal",
    "runtime/engine.py:2215-2231: AutoEP with ZeRO Stage 3",
    versions=">=0.19.4,<0.20",
)
def experts_at_stage_3(s: Setup) -> Iterable[Found]:
    """Expert parallel at stage 3 with what it does not support there."""
    experts = block(s.ds, "expert_parallel")
    if s.stage != 3 or not experts or experts.get("enabled") is False:
        return
    zero = s.zero
    for bad, path, what, value in (
        ((s.meaning.said("sp") or 1) > 1, ("sequence_parallel_size",), "sequence parallelism", 1),
        (zero.get("zero_quantized_gradients") is True, ("zero_optimization", "zero_quantized_gradients"),
         "zero_quantized_gradients", False),
        ((whole(zero.get("zero_hpz_partition_size")) or 1) > 1, ("zero_optimization", "zero_hpz_partition_size"),
         "zero_hpz_partition_size", 1),
        ((whole(experts.get("expert_tensor_parallel_size")) or 1) > 1,
         ("expert_parallel", "expert_tensor_parallel_size"), "expert_tensor_parallel_size", 1),
    ):  # fmt: skip
        if bad:
            yield Found(
                what=f"expert_parallel at ZeRO-3 does not go with {what}", where=s.where(*path), do=f"write {value}",
                edits=tuple(s.meaning.set_deepspeed(path, value)),
            )  # fmt: skip


@config_rule(
    "experts_at_stage_2",
    "illegal",
    "runtime/zero/stage_1_and_2.py:865-870",
    versions=">=0.19.4,<0.20",
)
def experts_at_stage_2(s: Setup) -> Iterable[Found]:
    """Expert parallel at stage 2 needs contiguous gradients and reduce_scatter."""
    experts = block(s.ds, "expert_parallel")
    if s.stage not in (1, 2) or not experts or experts.get("enabled") is False:
        return
    for key in ("contiguous_gradients", "reduce_scatter"):
        if s.zero.get(key) is False:
            yield Found(
                what=f"expert_parallel at ZeRO-{s.stage} needs {key}", where=s.where("zero_optimization", key),
                do="write true", edits=tuple(s.meaning.set_deepspeed(("zero_optimization", key), True)),
            )  # fmt: skip


@config_rule(
    "unmanaged_accumulation", "illegal", "runtime/engine.py:2030-2036", versions=">=0.19.4,<0.20"
)
def unmanaged_accumulation(s: Setup) -> Iterable[Found]:
    """managed_gradient_accumulation: false with what it does not support."""
    if s.ds.get("managed_gradient_accumulation") is not False:
        return
    overlap = s.zero.get("overlap_comm", s.stage == 3) is True
    against = [
        what for what, there in (
            ("overlap_comm at another stage than 2", overlap and s.stage < 2),
            ("a pipeline", (s.meaning.said("pp") or 1) > 1),
            ("DeepCompile", block(s.ds, "compile").get("deepcompile") is True),
        ) if there
    ]  # fmt: skip
    if against:
        yield Found(
            what=f"managed_gradient_accumulation false does not go with {' and '.join(against)}",
            where=s.where("managed_gradient_accumulation"), do="remove it",
            edits=tuple(s.meaning.remove_deepspeed(("managed_gradient_accumulation",))),
        )  # fmt: skip


@config_rule(
    "ulysses_does_not_divide",
    "illegal",
    "runtime/sequence_parallel/ulysses_sp.py:146-152: ValueError",
    versions=">=0.17.6,<0.20",
)
def ulysses_does_not_divide(s: Setup) -> Iterable[Found]:
    """sequence_parallel_size that divides neither the heads, the key-value heads nor the context."""
    size = s.meaning.said("sp") or 1
    if size <= 1:
        return
    heads, kv_heads = _heads(s)
    context = s.meaning.said("seq_len")
    wrong = [f"{h} attention heads" for h in heads if h % size]
    wrong += [f"{k} key-value heads" for k in kv_heads if k % size and size % k]
    if isinstance(context, int) and context % size:
        wrong.append(f"context of {context}")
    if wrong:
        path = ("sequence_parallel_size",)
        yield Found(
            what=f"sequence parallel {size} does not divide the {' nor the '.join(wrong)}",
            where=s.meaning.values["sp"].where or s.where(*path),
            do="use a size that divides them", edits=tuple(s.meaning.set_deepspeed(path, 1)),
        )  # fmt: skip


def _heads(s: Setup) -> tuple[list[int], list[int]]:
    """(attention heads, key-value heads) of the model's blocks; empty where it is not known."""
    blocks = s.spec.blocks if s.spec is not None else ()
    return sorted({b.attention.heads for b in blocks}), sorted(
        {b.attention.kv_heads for b in blocks}
    )


@config_rule(
    "heads_not_divided",
    "advice",
    "module_inject/tp_shard.py:91: whole key-value heads are shared out (tried: 3 heads over 2 ranks start and step)",
)
def heads_not_divided(s: Setup) -> Iterable[Found]:
    """A tensor parallel size that does not divide the model's heads: the shares are unequal."""
    size, path = s.meaning.said("tp") or 1, ("tensor_parallel", "autotp_size")
    heads, kv_heads = _heads(s)
    uneven = [f"{h} attention" for h in heads if h % size]
    uneven += [f"{k} key-value" for k in kv_heads if k % size]
    if uneven and s.spec is not None:
        yield Found(
            what=f"tensor parallel {size} does not divide the {' and '.join(uneven)} heads of {s.spec.name}: ranks get "
            "unequal shares, and the largest decides memory and time",
            where=s.meaning.values["tp"].where or s.where(*path), do="use a size that divides them",
        )  # fmt: skip

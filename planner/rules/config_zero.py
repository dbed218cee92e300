"""Rules about ZeRO: stages, buckets, what goes with a pipeline, and what a stage does not look at."""

from __future__ import annotations

from collections.abc import Iterable

from outlay.planner.read.deepspeed import block, whole
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.setup import DEFAULT_BUCKET, Setup
from outlay.profiles.units import format_bytes

_Z = "zero_optimization"


@config_rule("pipeline_without_zero_2", "illegal", "runtime/pipe/engine.py:76 (tried)")
def pipeline_without_zero_2(s: Setup) -> Iterable[Found]:
    """A pipeline with ZeRO-2 or 3."""
    stages = s.meaning.said("pp") or 1
    if stages > 1 and s.stage >= 2:
        yield Found(
            what=f"ZeRO-{s.stage} with a pipeline of {stages} stages: DeepSpeed's pipeline engine takes ZeRO 0 or 1",
            where=s.where(_Z, "stage"), do="write stage 1, or give up the pipeline",
            edits=tuple(s.meaning.set_deepspeed((_Z, "stage"), 1)),
        )  # fmt: skip


@config_rule(
    "pipeline_turns_overlap_off",
    "changed",
    "runtime/engine.py:2664: overlapped communication will be disabled",
)
def pipeline_turns_overlap_off(s: Setup) -> Iterable[Found]:
    """overlap_comm with a pipeline is switched off."""
    if (s.meaning.said("pp") or 1) > 1 and s.stage == 1 and s.zero.get("overlap_comm") is True:
        yield Found(
            what="overlap_comm has no effect in a pipeline: DeepSpeed switches it off",
            where=s.where(_Z, "overlap_comm"), do="write false",
            edits=tuple(s.meaning.set_deepspeed((_Z, "overlap_comm"), False)),
        )  # fmt: skip


@config_rule(
    "gradient_scaling_with_reduce_scatter",
    "illegal",
    "runtime/zero/stage_1_and_2.py:346-351, stage3.py:392-396",
)
def gradient_scaling_with_reduce_scatter(s: Setup) -> Iterable[Found]:
    """Predivided or prescaled gradients with reduce_scatter at stages 2 and 3."""
    if s.stage not in (2, 3) or s.zero.get("reduce_scatter", True) is False:
        return
    if s.stage == 2 and s.ds.get("gradient_allreduce_op") == "sum":
        return
    factor = s.ds.get("gradient_predivide_factor", 1.0)
    if isinstance(factor, int | float) and factor != 1.0:
        yield Found(
            what=f"gradient_predivide_factor {factor:g} with reduce_scatter at ZeRO-{s.stage} is not supported",
            where=s.where("gradient_predivide_factor"), do="remove it, or write reduce_scatter false",
            edits=tuple(s.meaning.remove_deepspeed(("gradient_predivide_factor",))),
        )  # fmt: skip
    if s.ds.get("prescale_gradients") is True:
        yield Found(
            what=f"prescale_gradients with reduce_scatter at ZeRO-{s.stage} is not supported",
            where=s.where("prescale_gradients"), do="remove it, or write reduce_scatter false",
            edits=tuple(s.meaning.remove_deepspeed(("prescale_gradients",))),
        )  # fmt: skip


@config_rule("allreduce_sum", "illegal", "runtime/config.py:694-699", versions=">=0.19.6,<0.20")
def allreduce_sum(s: Setup) -> Iterable[Found]:
    """gradient_allreduce_op: sum where it is not supported, or another word than mean and sum."""
    op = s.ds.get("gradient_allreduce_op")
    if op is None:
        return
    edits = tuple(s.meaning.remove_deepspeed(("gradient_allreduce_op",)))
    where = s.where("gradient_allreduce_op")
    if str(op).lower() not in ("mean", "sum"):
        yield Found(
            what=f"gradient_allreduce_op is {op!r}: it is mean or sum",
            where=where,
            do="write mean",
            edits=edits,
        )
        return
    against = [
        name for name, there in (
            ("ZeRO-3", s.stage == 3), ("ZenFlow", s.zero.get("zenflow") is not None),
            ("DeepCompile", block(s.ds, "compile").get("deepcompile") is True),
        ) if there
    ]  # fmt: skip
    if str(op).lower() == "sum" and against:
        yield Found(
            what=f"gradient_allreduce_op sum is not supported with {' and '.join(against)}", where=where,
            do="remove it: mean is the default", edits=edits,
        )  # fmt: skip


@config_rule(
    "allgather_bucket_is_even",
    "illegal",
    "runtime/zero/stage_1_and_2.py:389: a multiple of nccl_start_alignment_factor, 2",
)
def allgather_bucket_is_even(s: Setup) -> Iterable[Found]:
    """An odd allgather_bucket_size at stages 1 and 2."""
    size = whole(s.zero.get("allgather_bucket_size"))
    if s.stage in (1, 2) and size is not None and size % 2:
        yield Found(
            what=f"allgather_bucket_size {size:,} is odd: it must be a multiple of 2",
            where=s.where(_Z, "allgather_bucket_size"), do=f"write {size + 1}",
            edits=tuple(s.meaning.set_deepspeed((_Z, "allgather_bucket_size"), size + 1)),
        )  # fmt: skip


@config_rule(
    "gradient_norm_is_needed",
    "illegal",
    "runtime/zero/config.py: compute_grad_norm_valid; stage_1_and_2.py:212-218; engine.py:2307",
    versions=">=0.19.7,<0.20",
)
def gradient_norm_is_needed(s: Setup) -> Iterable[Found]:
    """compute_grad_norm: false where something needs the norm."""
    if s.zero.get("compute_grad_norm") is not False:
        return
    from outlay.planner.rules.config_precision import accumulation_dtype

    clipping = s.ds.get("gradient_clipping", 0)
    why = None
    if s.stage not in (1, 2):
        why = f"is for ZeRO 1 and 2; the stage is {s.stage}"
    elif isinstance(clipping, int | float) and clipping > 0:
        why = f"cannot go with gradient_clipping {clipping:g}"
    elif s.offload("optimizer") != "none" or s.zero.get("zenflow") is not None:
        why = "cannot go with optimizer offload or ZenFlow"
    elif s.stage == 1 and s.bf16 and accumulation_dtype(s) == "fp32":
        why = "cannot go with BF16_Optimizer (stage 1, fp32 accumulation)"
    if why:
        yield Found(
            what=f"compute_grad_norm false {why}", where=s.where(_Z, "compute_grad_norm"), do="remove it",
            edits=tuple(s.meaning.remove_deepspeed((_Z, "compute_grad_norm"))),
        )  # fmt: skip


@config_rule(
    "old_stage_1",
    "illegal",
    "runtime/engine.py:2650: the deprecated version of ZeRO Stage 1 is not supported",
)
def old_stage_1(s: Setup) -> Iterable[Found]:
    """legacy_stage1 is refused."""
    if s.zero.get("legacy_stage1") is True and s.stage in (1, 2, 3):
        yield Found(
            what="legacy_stage1 is not supported any more", where=s.where(_Z, "legacy_stage1"), do="remove it",
            edits=tuple(s.meaning.remove_deepspeed((_Z, "legacy_stage1"))),
        )  # fmt: skip


@config_rule(
    "old_zero_format",
    "changed",
    "runtime/zero/config.py:60: read_zero_config_deprecated; true is stage 1",
)
def old_zero_format(s: Setup) -> Iterable[Found]:
    """zero_optimization: true means stage 1."""
    written = s.raw.get(_Z)
    if isinstance(written, bool):
        yield Found(
            what=f"zero_optimization is {str(written).lower()}: DeepSpeed takes that as stage {int(written)}",
            where=s.where(_Z), do=f'write {{"stage": {int(written)}}}',
            edits=tuple(s.meaning.set_deepspeed((_Z,), {"stage": int(written)})),
        )  # fmt: skip


_STAGE_3_ONLY = (
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
)  # fmt: skip


@config_rule(
    "keys_of_stage_3_below_it",
    "advice",
    "runtime/engine.py:2655-2711: stages 1 and 2 are not given them",
)
def keys_of_stage_3_below_it(s: Setup) -> Iterable[Found]:
    """stage3_ keys at another stage: leftovers without effect."""
    left = [key for key in _STAGE_3_ONLY if key in block(s.raw, _Z)]
    if s.stage == 3 or not left:
        return
    yield Found(
        what=f"{', '.join(left)}: without effect at ZeRO-{s.stage}", where=s.where(_Z, left[0]),
        do="remove them, or use stage 3", edits=tuple(e for key in left for e in s.meaning.remove_deepspeed((_Z, key))),
    )  # fmt: skip


@config_rule(
    "zero_plus_plus_below_stage_3",
    "ignored",
    "runtime/engine.py:2712-2790: only stage 3 is given them",
)
def zero_plus_plus_below_stage_3(s: Setup) -> Iterable[Found]:
    """ZeRO++ keys at another stage than 3."""
    if s.stage == 3:
        return
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
                "zero_quantized_nontrainable_weights"):  # fmt: skip
        value = block(s.raw, _Z).get(key)
        if not value or isinstance(value, str) or (value == 1 and value is not True):
            continue
        yield Found(
            what=f"{key} has no effect at ZeRO-{s.stage}: ZeRO++ is stage 3", where=s.where(_Z, key),
            do="remove it, or use stage 3", edits=tuple(s.meaning.remove_deepspeed((_Z, key))),
        )  # fmt: skip


@config_rule(
    "secondary_partition_divides",
    "illegal",
    "utils/groups.py: _create_zero_param_parallel_group asserts that it divides the world",
)
def secondary_partition_divides(s: Setup) -> Iterable[Found]:
    """zero_hpz_partition_size that does not divide the ranks."""
    size = whole(s.zero.get("zero_hpz_partition_size"))
    if s.stage == 3 and size is not None and size > 1 and s.world is not None and s.world % size:
        per_node = s.cluster.ranks_per_node if s.cluster else None
        better = per_node if per_node and s.world % per_node == 0 else 1
        yield Found(
            what=f"zero_hpz_partition_size {size} does not divide {s.world} ranks",
            where=s.where(_Z, "zero_hpz_partition_size"), do=f"write {better}: the ranks of a node",
            edits=tuple(s.meaning.set_deepspeed((_Z, "zero_hpz_partition_size"), better)),
        )  # fmt: skip


@config_rule("quantized_gradients_need_reduce_scatter", "illegal", "runtime/zero/stage3.py:390")
def quantized_gradients_need_reduce_scatter(s: Setup) -> Iterable[Found]:
    """zero_quantized_gradients without reduce_scatter."""
    if (
        s.stage == 3
        and s.zero.get("zero_quantized_gradients") is True
        and s.zero.get("reduce_scatter") is False
    ):
        yield Found(
            what="zero_quantized_gradients needs reduce_scatter", where=s.where(_Z, "reduce_scatter"), do="write true",
            edits=tuple(s.meaning.set_deepspeed((_Z, "reduce_scatter"), True)),
        )  # fmt: skip


@config_rule(
    "elastic_checkpoint_at_stage_3",
    "ignored",
    "runtime/zero/config.py: elastic_checkpoint_deprecated",
)
def elastic_checkpoint_at_stage_3(s: Setup) -> Iterable[Found]:
    """elastic_checkpoint at stage 3 does nothing."""
    if s.stage == 3 and s.zero.get("elastic_checkpoint") is True:
        yield Found(
            what="elastic_checkpoint has no effect at ZeRO-3: resuming with another number of ranks needs a universal "
            "checkpoint", where=s.where(_Z, "elastic_checkpoint"), do="remove it; convert with ds_to_universal.py",
            edits=tuple(s.meaning.remove_deepspeed((_Z, "elastic_checkpoint"))),
        )  # fmt: skip


@config_rule(
    "weights_are_not_gathered_to_save",
    "changed",
    "transformers 5.23, trainer.py: save_model at ZeRO-3 without it saves no weights; huggingface/transformers#20082",
)
def weights_are_not_gathered_to_save(s: Setup) -> Iterable[Found]:
    """A Trainer at stage 3 whose saved model has no weights."""
    if not s.meaning.trainer or s.stage != 3 or s.meaning.said("finetune"):
        return
    keys = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save")  # fmt: skip
    if any(s.zero.get(key) is True for key in keys):
        return
    yield Found(
        what="at ZeRO-3 the saved model will have no weights, only shards that zero_to_fp32.py must join",
        where=s.where(_Z, keys[0]), do=f"write {keys[0]} true",
        edits=tuple(s.meaning.set_deepspeed((_Z, keys[0]), True)),
    )  # fmt: skip


@config_rule(
    "one_rank_does_not_share",
    "ignored",
    "ZeRO divides among data-parallel ranks; with one there is nothing to divide",
)
def one_rank_does_not_share(s: Setup) -> Iterable[Found]:
    """ZeRO over a single rank, without offload: no memory is saved."""
    if (
        s.dp == 1
        and s.stage >= 1
        and s.offload("optimizer") == "none"
        and s.offload("param") == "none"
    ):
        yield Found(
            what=f"ZeRO-{s.stage} on one data-parallel rank saves nothing, and its buffers cost memory",
            where=s.where(_Z, "stage"), do="use more ranks, offload, or stage 0",
            level="advice", edits=(),
        )  # fmt: skip


@config_rule(
    "buckets_are_the_defaults",
    "advice",
    "runtime/zero/config.py: 5e8 elements each; stage_1_and_2.py:3256: twice with overlap_comm",
)
def buckets_are_the_defaults(s: Setup) -> Iterable[Found]:
    """DeepSpeed's buckets of 5e8 elements, which are for large GPUs."""
    if s.stage not in (1, 2, 3):
        return
    size = whole(s.zero.get("reduce_bucket_size", DEFAULT_BUCKET)) or 0
    from outlay.planner.rules.config_precision import model_dtype

    width = 4 if model_dtype(s) == "fp32" else 2
    twice = s.zero.get("overlap_comm", s.stage == 3) is True
    taken = size * width * (2 if twice else 1)
    if size < DEFAULT_BUCKET or s.spec is None:
        return
    from outlay.planner.estimate.buckets import bucket_sizes

    better, _ = bucket_sizes(s.spec, s.meaning.said("tp") or 1, s.meaning.said("pp") or 1)
    if better >= size:
        return
    key = "reduce_bucket_size"
    said = "is" if key in block(s.raw, _Z) else "is by default"
    edits = s.meaning.set_deepspeed((_Z, key), better)
    if s.stage in (1, 2) and edits:
        edits += s.meaning.set_deepspeed((_Z, "allgather_bucket_size"), better + better % 2)
    yield Found(
        what=f"{key} {said} {size:,} elements: {format_bytes(taken)} a rank"
        + (" with overlap_comm" if twice else "") + f"; {better:,} would take {format_bytes(taken * better / size)}",
        where=s.where(_Z, key), edits=tuple(edits),
        do=f"write {better}" + ("" if edits else ", in a DeepSpeed JSON that is named here"),
    )  # fmt: skip

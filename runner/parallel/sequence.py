"""Sequence parallel (Ulysses): each rank of a group holds a piece of every sequence.

DeepSpeed's `UlyssesSPAttentionHF` takes the place of transformers' attention function: before it the
pieces of the sequence change places with groups of heads, after it back. Everything else works on
the piece. Ranks of a group are neighbours (rank // sp is the data-parallel rank), are given the same
batches and take their piece of them; the positions say where it lies. The loss of a rank is its share
of the sequence's mean, so the shares add up, and DeepSpeed adds gradients within a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from outlay.planner.rules.runner_parallel import SEQUENCE_PARALLEL_FAMILIES
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.engine import Engine
from outlay.runner.model import IGNORED, next_tokens

_replaced: dict[str, Any] = {}
"""Attention functions of transformers that are replaced for now, by name."""


class SequenceParallelEngine(Engine):
    """ZeRO 0–3 over all ranks, which hold pieces of the sequences of their group."""

    def __init__(self, plan: Plan, engine: Any) -> None:
        super().__init__(plan, engine)
        self.piece = self.rank % plan.strategy.sp

    @staticmethod
    def _initialize(plan: Plan) -> Any:
        family = str(plan.model.config.get("model_type", ""))
        if family not in SEQUENCE_PARALLEL_FAMILIES:
            raise UsageError(
                f"sequence parallel of {family!r} is not known",
                where=plan.model.source,
                do="plan with sp: 1; sequence parallel runs "
                + ", ".join(SEQUENCE_PARALLEL_FAMILIES),
            )
        return Engine._initialize(plan, _groups_of)

    @staticmethod
    def _undo() -> None:
        from deepspeed.sequence import layer
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for name, function in _replaced.items():
            ALL_ATTENTION_FUNCTIONS[name] = function
        _replaced.clear()
        layer._all_to_all_groups.clear()

    def _data_parallel(self) -> tuple[int, int]:
        sp = self.plan.strategy.sp
        return self.rank // sp, self.world // sp

    @property
    def _loss_weight(self) -> float:
        """Stage 3 divides gradients by all ranks (`stage3.py`, `__avg_scatter_grads`), where the other
        stages divide by the data-parallel ones."""
        return float(self.plan.strategy.sp if self.plan.strategy.zero == 3 else 1)

    @property
    def _losses(self) -> int:
        """The ranks of a group have shares of one mean."""
        return self.dp_size

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """This rank's share of the mean over the whole sequences: shares add up."""
        labels = next_tokens(ids)
        length = ids.shape[1] // self.plan.strategy.sp
        mine = slice(self.piece * length, (self.piece + 1) * length)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[:, mine]
        logits = self.deepspeed(
            input_ids=ids[:, mine].contiguous(), position_ids=positions.contiguous()
        ).logits
        summed = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            labels[:, mine].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return summed / (labels != IGNORED).sum()


def _groups_of(plan: Plan, model: Any) -> Any:
    """Replace the attention function; DeepSpeed's groups of ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    _replaced[name] = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(model.config, "num_key_value_heads"):
        model.config.num_key_value_heads = model.config.num_attention_heads
    made = UlyssesSPAttentionHF.register_with_transformers(
        model,
        name,
        plan.strategy.sp,
        plan.strategy.micro_batch,
        seq_length=plan.job.seq_len,
        seq_length_is_variable=False,
    )
    exchange, heads = ALL_ATTENTION_FUNCTIONS[name], model.config.num_attention_heads

    def with_heads(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """[b, s, heads, head width], as transformers' own functions return it (GPT-2 relies on it)."""
        mixed, weights = exchange(*args, **kwargs)
        return mixed.unflatten(-1, (heads, -1)), weights

    ALL_ATTENTION_FUNCTIONS[name] = with_heads
    return made

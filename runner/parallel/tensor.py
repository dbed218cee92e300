"""Tensor parallel: each rank of a group holds a slice of every matrix, of the embedding and of the head.

The layers are DeepSpeed's (`module_inject/layers.py`, AutoTP training); which matrix is cut along
its outputs and which along its inputs is transformers' `tp_plan`, and for GPT-2, which has none, the
table below. Embedding and head are cut along the vocabulary, so the loss is computed from slices of
the logits. Each part is cut as soon as it is filled: no rank ever holds the whole model. Ranks of a
group are neighbours (rank // tp is the data-parallel rank) and are given the same batches.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from outlay.planner.rules.runner_parallel import TENSOR_PARALLEL_FAMILIES
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.compress.training import prepare
from outlay.runner.engine import Engine, current_device, initialize
from outlay.runner.export import host_copies
from outlay.runner.loading import gathered, quiet, refusals
from outlay.runner.model import Filler, blocks_of, next_tokens, parts_of, recompute, skeleton
from outlay.runner.optimizers import own_optimizer

_OWN_PLANS = {
    "gpt2": {
        "transformer.h.*.attn.c_attn": "fused_colwise",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
    }
}
"""By model_type, where transformers has no plan. `fused_colwise`: q, k and v one below the other."""
_SUMMED = "replicated_with_grad_allreduce"
_HEAD = ("colwise_rep", "colwise_gather_output")
_STYLES = {"colwise", "rowwise", "fused_colwise", _SUMMED, "embedding_rowwise", *_HEAD}
_QKV = 3


class Cutter:
    """Cuts the parts of one model, in any order, each once it is filled."""

    def __init__(self, model: nn.Module, plan: Plan, group: Any = None) -> None:
        """`group`: the ranks that share a matrix; null = those that DeepSpeed's AutoTP has made."""
        from deepspeed.utils import groups

        family = str(plan.model.config.get("model_type", ""))
        if family not in TENSOR_PARALLEL_FAMILIES:
            raise UsageError(
                f"tensor parallel of {family!r} is not known",
                where=plan.model.source,
                do=f"plan with tp: 1; tensor parallel runs {', '.join(TENSOR_PARALLEL_FAMILIES)}",
            )
        self.model: Any = model
        self.tp = plan.strategy.tp
        self.group = groups.get_tensor_model_parallel_group() if group is None else group
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        self.tied = self._embedding.weight is self._head.weight
        names = {id(module): name for name, module in model.named_modules()}
        self.embedding, self.head = names[id(self._embedding)], names[id(self._head)]
        given = _OWN_PLANS.get(family) or dict(self.model.tp_plan)
        unknown = sorted(set(given.values()) - _STYLES)
        if unknown:
            raise UsageError(
                f"transformers cuts {family} in a way that is not known: {', '.join(unknown)}",
                where=plan.model.source,
                do="plan with tp: 1",
            )
        self._styles = [(_pattern(name), style) for name, style in given.items()]

    def cut(self, part: str) -> None:
        """Replace what of this part is cut by layers that hold this rank's slice."""
        module: nn.Module = self.model.get_submodule(part)
        # Children first: a replaced module's children need not be looked at again.
        for name, inner in reversed(list(module.named_modules())):
            self._cut_one(f"{part}.{name}" if name else part, inner)
        for inner in module.modules():
            if hasattr(inner, "split_size"):
                inner.split_size = inner.split_size // self.tp  # GPT-2 splits q, k, v by it

    def _cut_one(self, name: str, module: Any) -> None:
        from deepspeed.module_inject.layers import VocabParallelEmbedding, VocabParallelLinear

        if name == self.embedding:
            head = None
            if self.tied:
                head = VocabParallelLinear(self.model.get_submodule(self.head), self.group)
                self._put(self.head, head)
            self._put(
                name,
                VocabParallelEmbedding(module, self.group, tied_vocab_parallel_linear=head),
            )
        elif name == self.head:
            if not self.tied:
                self._put(name, VocabParallelLinear(module, self.group))
        else:
            style = self._style(name)
            if style == _SUMMED:
                self._sum_gradients(module)
            elif style is not None:
                self._put(name, self._layer(module, style))

    def _style(self, name: str) -> str | None:
        for pattern, style in self._styles:
            if pattern.fullmatch(name):
                return style
        return None

    def _layer(self, module: Any, style: str) -> nn.Module:
        from deepspeed.module_inject.layers import (
            LinearAllreduce,
            LinearLayer,
            SubParamLinearLayer,
        )

        turned = not isinstance(module, nn.Linear)
        if turned:
            module = _as_linear(module)
        if style == "rowwise":
            made: nn.Module = LinearAllreduce(module, self.group)
        elif style == "fused_colwise":
            made = SubParamLinearLayer(module, self.group, shape=(_QKV, -1), partition_dim=0)
        else:
            made = LinearLayer(module, self.group)
        made.turned = turned
        return made

    def _sum_gradients(self, module: nn.Module) -> None:
        """A norm over this rank's heads: its weight is whole, its gradient a part of the sum."""

        def add_up(gradient: torch.Tensor) -> torch.Tensor:
            whole = gradient.contiguous()
            torch.distributed.all_reduce(whole, group=self.group)
            return whole

        for weight in module.parameters():
            weight.register_hook(add_up)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"\d+"))


def _as_linear(module: Any) -> nn.Linear:
    """GPT-2's Conv1D keeps its weight [in, out]; the layers that are cut take [out, in]."""
    made = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
    turned = module.weight.detach().t().contiguous()
    made.weight = nn.Parameter(turned, module.weight.requires_grad)
    made.bias = module.bias
    return made


class TensorParallelEngine(Engine):
    """ZeRO 0–3 over the data-parallel ranks, each of them `tp` processes."""

    @staticmethod
    def _initialize(plan: Plan) -> Any:
        import deepspeed
        from deepspeed.module_inject import set_autotp_mode
        from deepspeed.utils import groups

        config = copy.deepcopy(plan.deepspeed)
        model = skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
        prepare(model, plan)
        set_autotp_mode(training=True)
        with quiet():
            groups._init_tp_mesh_device(tensor_model_parallel_size=plan.strategy.tp)
        cutter = Cutter(model, plan)
        filler = Filler(model, plan.model, seed=plan.job.seed, device=current_device())
        parts = parts_of(model)
        if cutter.tied:
            parts.remove(cutter.head)  # filled and cut with the embedding
        with quiet(), refusals():
            for part in parts:
                filler.fill(part)
                if cutter.tied and part == cutter.embedding:
                    filler.fill(cutter.head)
                cutter.cut(part)
                if plan.strategy.zero == 3:
                    deepspeed.zero.Init(
                        module=model.get_submodule(part),
                        data_parallel_group=groups.get_data_parallel_group(),
                        config_dict_or_path=config,
                        mpu=groups,
                    )
        if plan.strategy.activation_checkpointing == "full":
            recompute(list(blocks_of(model)), plan.strategy.recompute_layers)
        model.ds_autotp_parsed = True  # type: ignore[assignment]
        return initialize(model, config, groups, build=own_optimizer(plan, model))

    @staticmethod
    def _undo() -> None:
        from deepspeed.module_inject import set_autotp_mode

        set_autotp_mode(training=False)

    def _data_parallel(self) -> tuple[int, int]:
        tp = self.plan.strategy.tp
        return self.rank // tp, self.world // tp

    def _seed_of_rank(self) -> int:
        return self.dp_rank

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        head = self.deepspeed.module.get_output_embeddings()
        return sliced_loss(head, self.deepspeed(input_ids=ids).logits, ids)

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """On rank 0 all weights by transformers' names, on the CPU, ties kept; null on the others."""
        module: nn.Module = self.deepspeed.module
        values: dict[int, torch.Tensor] = {}
        with self._at_rest():
            for part in parts_of(module):
                whole = module.get_submodule(part)
                with gathered(list(whole.parameters()), self.plan.strategy.zero):
                    for layer in whole.modules():
                        copy_whole(layer, values, keep=self.rank == 0)
        if self.rank != 0:
            return None
        state = module.state_dict(keep_vars=True)
        host_copies([t for t in state.values() if id(t) not in values], values)
        return {name: values[id(tensor)] for name, tensor in state.items()}


def sliced_loss(head: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of a micro-batch [b, s] from this rank's slice of the logits, [b, s, v / tp]."""
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy

    loss: torch.Tensor = vocab_parallel_cross_entropy(
        logits,
        next_tokens(ids),
        tp_group=head.mp_group,
        vocab_start_index=head.vocab_start_index,
        vocab_end_index=head.vocab_end_index,
        global_vocab_size=head.vocab_size,
    )
    return loss


def copy_whole(layer: nn.Module, values: dict[int, torch.Tensor], *, keep: bool) -> None:
    """Copy the weights of one module, put together from the slices of its group, on the ranks that
    `keep` them; all ranks of the group call it."""
    weights = list(layer.parameters(recurse=False))
    with _put_together(layer, weights):
        if not keep:
            return
        host_copies(weights, values)
        if getattr(layer, "turned", False):
            weight = weights[0]
            values[id(weight)] = values[id(weight)].t().contiguous()


@contextlib.contextmanager
def _put_together(layer: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """The whole weights for a while. DeepSpeed's own way back would cut them loose from ZeRO's buffers."""
    from deepspeed.module_inject.layers import TensorParallel_Layer

    if not isinstance(layer, TensorParallel_Layer):
        yield
        return
    slices = [weight.data for weight in weights]
    try:
        layer.gather_params(weights)
        yield
    finally:
        for weight, slice_ in zip(weights, slices, strict=True):
            weight.data = slice_

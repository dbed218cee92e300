"""A transformers decoder as a DeepSpeed pipeline: embedding, blocks, norm with head become layers.

Each stage fills only its own parts of the model. Positions and masks do not travel between stages:
every stage computes them again (once, they are the same for each micro-batch of a shape). Tied
embeddings stay one weight: DeepSpeed adds up the gradients of its two copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from outlay.planner.estimate.stages import partition
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner import repairs
from outlay.runner.engine import Engine, current_device, initialize, quiet
from outlay.runner.export import host_copies
from outlay.runner.model import Filler, causal_lm_loss, recompute, skeleton

_TIE = "embedding"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a decoder's parts in its transformers module."""

    embedding: str
    blocks: str
    norm: str
    head: str = "lm_head"
    rotary: str | None = None
    positions: str | None = None
    """Table of learned positions."""
    dropout: str | None = None
    """Between embedding and first block."""


_LLAMA = Layout(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    rotary="model.rotary_emb",
)
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Layout(
        embedding="transformer.wte",
        positions="transformer.wpe",
        dropout="transformer.drop",
        blocks="transformer.h",
        norm="transformer.ln_f",
    ),
    "gpt_neox": Layout(
        embedding="gpt_neox.embed_in",
        dropout="gpt_neox.emb_dropout",
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
    ),
}
"""By transformers' model_type."""


class Stage:
    """What the layers of one stage share: the filled parts and the positions and masks by shape."""

    def __init__(self, plan: Plan) -> None:
        family = plan.model.config.get("model_type", "")
        if family not in LAYOUTS:
            raise UsageError(
                f"a pipeline of {family!r} is not known",
                where=plan.model.source,
                do=f"plan with pp: 1; a pipeline runs {', '.join(sorted(LAYOUTS))}",
            )
        job = plan.job
        self.layout = LAYOUTS[family]
        self.model = skeleton(plan.model, precision=job.precision, attention=job.attention)
        self.config: Any = self.model.config
        device = current_device()
        self._filler = Filler(self.model, plan.model, seed=job.seed, device=device)
        self._rotary: nn.Module | None = None
        self._seen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def take(self, name: str) -> nn.Module:
        """The part of that name, filled."""
        return self._filler.fill(name)

    def arguments(self, hidden: torch.Tensor, index: int) -> dict[str, Any]:
        """Keyword arguments of block `index` beside the hidden states [b, s, h]."""
        kind = self._attention_kind(index)
        key = (kind, hidden.shape[0], hidden.shape[1], hidden.dtype, hidden.device)
        if key not in self._seen:
            self._seen[key] = self._positions_and_mask(hidden.detach(), kind)
        return self._seen[key]

    def _attention_kind(self, index: int) -> str:
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return str(kinds[index])
        window = getattr(self.config, "sliding_window", None)
        return "full_attention" if window is None else "sliding_attention"

    @torch.no_grad()
    def _positions_and_mask(self, hidden: torch.Tensor, kind: str) -> dict[str, Any]:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        make = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        if kind not in make:
            raise UsageError(f"attention of the kind {kind} is not run in a pipeline yet")
        ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        made: dict[str, Any] = {
            "position_ids": ids,
            "attention_mask": make[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                position_ids=ids,
            ),
        }
        if self.layout.rotary is not None:
            if self._rotary is None:
                self._rotary = self.take(self.layout.rotary)
            made["position_embeddings"] = self._rotary(hidden, ids)
        return made


class Part(nn.Module):
    """One layer: a module of transformers, and the name that it has there."""

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__()
        self.name = name
        self.inner: Any = stage.take(name)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inner module as it is."""
        result: torch.Tensor = self.inner(inputs)
        return result


class Embedding(Part):
    """Token ids [b, s] → [b, s, h]. Where the weight is tied, the last stage has a copy of it."""

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.inner.weight
        return weight


class Positions(nn.Module):
    """[b, s, h] → the same with learned positions and dropout, where the decoder has them."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        layout = stage.layout
        self.table = Part(stage, layout.positions) if layout.positions else None
        self.dropout = stage.take(layout.dropout) if layout.dropout else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Add the rows of the positions 0 … s-1."""
        if self.table is not None:
            hidden = hidden + self.table(torch.arange(hidden.shape[1], device=hidden.device))
        dropped: torch.Tensor = self.dropout(hidden)
        return dropped


class DecoderBlock(Part):
    """One block, [b, s, h] → [b, s, h]."""

    def __init__(self, stage: Stage, name: str, index: int) -> None:
        super().__init__(stage, name)
        self._arguments = partial(stage.arguments, index=index)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """With the positions and the mask of this shape."""
        result = self.inner(hidden, **self._arguments(hidden))
        states: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return states


def _tied_head(embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, embedding.weight)


class _Module(PipelineModule):  # type: ignore[misc]
    """PipelineModule whose stage boundaries are given."""

    def __init__(self, layers: list[LayerSpec], bounds: Sequence[int], **kwargs: Any) -> None:
        # nn.Module refuses attributes before its own __init__, which the base class calls.
        self.__dict__["bounds"] = list(bounds)
        super().__init__(layers, **kwargs)

    def _partition_layers(self, method: str = "uniform") -> None:
        del method
        self.parts = self.__dict__["bounds"]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()


def layers_of(stage: Stage, plan: Plan) -> tuple[list[LayerSpec], list[int]]:
    """The layers in order, and where each stage begins and the last ends.

    The boundaries are the planner's: the same function that estimated the stages.
    """
    layout = stage.layout
    count = len(list(stage.model.get_submodule(layout.blocks).children()))
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=plan.model.source)
    tied = bool(getattr(stage.config, "tie_word_embeddings", False))
    if tied:
        first = [
            TiedLayerSpec(_TIE, Embedding, stage, layout.embedding, tied_weight_attr="inner.weight")
        ]
    else:
        first = [LayerSpec(Embedding, stage, layout.embedding)]
    if layout.positions or layout.dropout:
        first.append(LayerSpec(Positions, stage))
    blocks = [LayerSpec(DecoderBlock, stage, f"{layout.blocks}.{i}", i) for i in range(count)]
    last = [LayerSpec(Part, stage, layout.norm)]
    if tied:
        last.append(
            TiedLayerSpec(
                _TIE,
                Embedding,
                stage,
                layout.embedding,
                forward_fn=_tied_head,
                tied_weight_attr="inner.weight",
            )
        )
    else:
        last.append(LayerSpec(Part, stage, layout.head))
    # The planner counts embedding, each block, norm with head.
    starts = [0, *range(len(first), len(first) + count), len(first) + count]
    ends = [*starts, len(first) + count + len(last)]
    if plan.strategy.pp > count:
        raise UsageError(
            f"a pipeline of {plan.strategy.pp} stages needs as many blocks, {plan.model.name} has {count}",
            do=f"plan with pp of at most {count}",
        )
    edges = partition(spec, plan.job.seq_len, plan.strategy.pp)
    return [*first, *blocks, *last], [ends[edge] for edge in edges]


class PipelineEngine(Engine):
    """Stages over the ranks; each stage with its data-parallel group, ZeRO 0 or 1."""

    pipeline = True

    def __init__(self, plan: Plan, engine: Any) -> None:
        super().__init__(plan, engine)
        self.is_loss_rank = bool(engine.is_last_stage())

    @staticmethod
    def _initialize(plan: Plan) -> Any:
        config = copy.deepcopy(plan.deepspeed)
        # Recomputation is per block (below): DeepSpeed's would include the head.
        config.setdefault("pipeline", {})["activation_checkpoint_interval"] = 0
        stage = Stage(plan)
        layers, bounds = layers_of(stage, plan)
        with quiet():
            module = _Module(
                layers,
                bounds,
                num_stages=plan.strategy.pp,
                loss_fn=causal_lm_loss,
                base_seed=plan.job.seed,
            )
        repairs.count_all_stages(module)
        if plan.strategy.activation_checkpointing == "full":
            local = [part.inner for part in module.modules() if isinstance(part, DecoderBlock)]
            recompute(local, plan.strategy.recompute_layers)
        return initialize(module, config)

    def _data_parallel(self) -> tuple[int, int]:
        return self.deepspeed.grid.data_parallel_id, self.deepspeed.grid.data_parallel_size

    def train_step(self, micro_batches: Sequence[torch.Tensor]) -> float:
        """One optimizer step; mean loss of the global batch, the same number on all ranks."""
        self._check_batches(micro_batches)
        return float(self.deepspeed.train_batch(_pairs(micro_batches)))

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        """Mean loss over the batches of all data-parallel ranks, no step."""
        given = list(batches)
        if not given:
            raise UsageError("there is not one batch to evaluate on")
        # The receive buffers are kept from step to step and have the shape of the first.
        self.deepspeed.reset_activation_shape()
        loss = self.deepspeed.eval_batch(_pairs(given), num_micro_batches=len(given))
        self.deepspeed.reset_activation_shape()
        self.deepspeed.module.train()
        return float(loss)

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """On rank 0 all weights by transformers' names, on the CPU, ties kept; null on the others."""
        module = self.deepspeed.module
        mine: dict[str, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        if self.dp_rank == 0:
            for part in (m for m in module.modules() if isinstance(m, Part)):
                for key, tensor in part.inner.state_dict(keep_vars=True).items():
                    host_copies([tensor], values)
                    mine[f"{part.name}.{key}"] = values[id(tensor)]
        whole = self._to_rank_0(mine)
        if self.rank != 0:
            return None
        return _in_model_order(whole, self.plan)

    def _to_rank_0(self, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collect the stages' weights, one tensor at a time; the first stage's copy of a tie wins."""
        whole = dict(mine)
        for sender in range(1, self.world):
            named = [(name, t.shape, t.dtype) for name, t in mine.items()]
            announced = [named if self.rank == sender else None]
            torch.distributed.broadcast_object_list(announced, src=sender)
            for name, shape, dtype in announced[0] or []:
                if self.rank == sender:
                    torch.distributed.send(mine[name].to(self.device), dst=0)
                elif self.rank == 0:
                    arrived = torch.empty(shape, dtype=dtype, device=self.device)
                    torch.distributed.recv(arrived, src=sender)
                    whole.setdefault(name, arrived.cpu())
        return whole


def _pairs(batches: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs of the first stage, labels of the last): the loss shifts them itself."""
    return ((batch, batch) for batch in batches)


def _in_model_order(whole: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    model = skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
    names = model.state_dict(keep_vars=True)
    by_weight = {id(tensor): whole[name] for name, tensor in names.items() if name in whole}
    return {name: by_weight[id(tensor)] for name, tensor in names.items()}

"""The layers of a pipeline: a transformers decoder cut into parts, each filled where it is needed.

Positions and masks do not travel between stages: every stage computes them again (once, they are the
same for each micro-batch of a shape).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from outlay.planner.estimate.stages import partition
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.compress.training import prepare
from outlay.runner.engine import current_device
from outlay.runner.layouts import LAYOUTS
from outlay.runner.loss import Finish, finish_of
from outlay.runner.model import Filler, skeleton

_TIE = "embedding"


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
        prepare(self.model, plan)
        self.config: Any = self.model.config
        self.tied = bool(getattr(self.config, "tie_word_embeddings", False))
        self.finish: Finish = finish_of(self.config)
        self.whole_logits = plan.strategy.loss != "chunked"
        """Whether the last layer makes logits; else the loss does, a chunk at a time."""
        self.head: Embedding | Head | None = None
        """The layer whose weight makes logits, on the stage that has it."""
        self._refuse_unequal(plan)
        self._filler = Filler(self.model, plan.model, seed=job.seed, device=current_device())
        self._rotary: Any = None
        self._seen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def _refuse_unequal(self, plan: Plan) -> None:
        """What would silently train another model than without stages."""
        if getattr(self.config, "layerdrop", 0.0):
            raise UsageError(
                f"layerdrop {self.config.layerdrop} is not run in a pipeline",
                where=plan.model.source,
                do="set layerdrop to 0, or plan with pp: 1",
            )
        if (
            self.tied
            and getattr(self.model.get_submodule(self.layout.head), "bias", None) is not None
        ):
            raise UsageError(
                "a head with a bias whose weight is tied is not run in a pipeline",
                where=plan.model.source,
                do="plan with pp: 1",
            )

    def has(self, name: str | None) -> bool:
        """Whether the decoder has a part of that name; some leave theirs out by their config."""
        if name is None:
            return False
        parent, _, child = name.rpartition(".")
        return getattr(self.model.get_submodule(parent), child, None) is not None

    def take(self, name: str) -> nn.Module:
        """The part of that name, filled."""
        return self._filler.fill(name)

    def product(self, embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
        """What a head does whose weight is the embedding's: [b, s, h] → [b, s, v]."""
        return nn.functional.linear(hidden, embedding.weight)

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
            made["position_embeddings"] = self._rotate(hidden, ids, kind)
        return made

    def _rotate(self, hidden: torch.Tensor, ids: torch.Tensor, kind: str) -> Any:
        if self._rotary is None:
            assert self.layout.rotary is not None
            self._rotary = self.take(self.layout.rotary)
        if "layer_type" in inspect.signature(self._rotary.forward).parameters:
            return self._rotary(hidden, ids, kind)
        return self._rotary(hidden, ids)


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

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__(stage, name)
        if stage.tied:
            stage.head = self

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.inner.weight
        return weight


class Entry(nn.Module):
    """[b, s, e] → [b, s, h]: what a decoder does between its embedding and its first block."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        layout = stage.layout
        project, table, dropout = layout.project_in, layout.positions, layout.dropout
        self.project = Part(stage, project) if project and stage.has(project) else None
        self.table = Part(stage, table) if table else None
        self.dropout: nn.Module = nn.Identity()
        if dropout:
            self.dropout = stage.take(dropout)
        elif layout.dropout_key:
            self.dropout = nn.Dropout(getattr(stage.config, layout.dropout_key))
        key = layout.multiplier_key
        self.factor = getattr(stage.config, key) if key else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Projected, scaled, with the rows of the positions 0 … s-1, dropped out."""
        if self.project is not None:
            hidden = self.project(hidden)
        if self.factor is not None:
            hidden = hidden * self.factor
        if self.table is not None:
            ids = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden + _rows(self.table.inner, ids)
        dropped: torch.Tensor = self.dropout(hidden)
        return dropped


def _rows(table: Any, ids: torch.Tensor) -> torch.Tensor:
    """Learned positions; OPT's table takes a mask first and shifts its rows itself."""
    shifts = "position_ids" in inspect.signature(table.forward).parameters
    rows: torch.Tensor = table(None, position_ids=ids) if shifts else table(ids)
    return rows


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


class Head(Part):
    """[b, s, h] → logits [b, s, v]; unchanged where the loss makes the logits itself."""

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__(stage, name)
        self._finish = stage.finish if stage.whole_logits else None
        stage.head = self

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.inner.weight
        return weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if self._finish is None else self._finish.apply(self.inner(inputs))


def _tied_head(stage: Stage, embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
    if not stage.whole_logits:
        return hidden
    return stage.finish.apply(stage.product(embedding, hidden))


def _first(stage: Stage) -> list[LayerSpec]:
    layout = stage.layout
    if stage.tied:
        found = [
            TiedLayerSpec(_TIE, Embedding, stage, layout.embedding, tied_weight_attr="inner.weight")
        ]
    else:
        found = [LayerSpec(Embedding, stage, layout.embedding)]
    between = (layout.positions, layout.dropout, layout.dropout_key, layout.multiplier_key)
    if any(between) or stage.has(layout.project_in):
        found.append(LayerSpec(Entry, stage))
    return found


def _last(stage: Stage) -> list[LayerSpec]:
    layout = stage.layout
    names = [n for n in (layout.norm, layout.project_out) if n is not None and stage.has(n)]
    found = [LayerSpec(Part, stage, name) for name in names]
    if not stage.tied:
        return [*found, LayerSpec(Head, stage, layout.head)]
    tied = TiedLayerSpec(
        _TIE,
        Embedding,
        stage,
        layout.embedding,
        forward_fn=partial(_tied_head, stage),
        tied_weight_attr="inner.weight",
    )
    return [*found, tied]


def layers_of(stage: Stage, plan: Plan) -> tuple[list[LayerSpec], list[int]]:
    """The layers in order, and where each stage begins and the last ends.

    The boundaries are the planner's: the same function that estimated the stages.
    """
    count = len(list(stage.model.get_submodule(stage.layout.blocks).children()))
    if plan.strategy.pp > count:
        raise UsageError(
            f"a pipeline of {plan.strategy.pp} stages needs as many blocks, {plan.model.name} has {count}",
            do=f"plan with pp of at most {count}",
        )
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=plan.model.source)
    first, last = _first(stage), _last(stage)
    names = [f"{stage.layout.blocks}.{i}" for i in range(count)]
    blocks = [LayerSpec(DecoderBlock, stage, name, i) for i, name in enumerate(names)]
    # The planner counts embedding, each block, norm with head.
    ends = [0, *range(len(first), len(first) + count + 1), len(first) + count + len(last)]
    edges = partition(spec, plan.job.seq_len, plan.strategy.pp)
    return [*first, *blocks, *last], [ends[edge] for edge in edges]

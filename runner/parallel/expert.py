"""Expert parallel: each rank of a group holds some experts of every layer, and tokens travel to them.

The router, the experts' own arithmetic and all else are transformers' own; in place of a layer's experts
stands `ExpertSlice`: it sends every (token, choice) pair to the rank that holds the expert, lets the
experts there work, sends the results back and adds them up under the router's weights. No pair is
dropped unless the job sets `expert_capacity`, so the mathematics is that of one process. A block is cut
as soon as it is filled: no rank ever holds all experts.

Ranks of a group are neighbours (rank % ep says which experts a rank holds) and are given different
batches: they are data parallel in all but the experts. DeepSpeed's groups and its optimizers' ways with
experts (`utils/groups.py`, `moe/utils.py`) do the rest: an expert's gradient has arrived from the whole group
by the exchange, is added up over the ranks that hold the same experts and divided by all data-parallel
ranks; ZeRO splits its states among those ranks. To DeepSpeed a rank's experts of one layer are one
expert (`deepspeed_moe.experts.deepspeed_experts.0`), which its checkpoints write and read.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import nn

from outlay.planner.rules.runner_expert import EXPERT_PARALLEL_FAMILIES
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import UsageError
from outlay.runner.compress import training as compression
from outlay.runner.engine import Engine, current_device, initialize
from outlay.runner.export import host_copies
from outlay.runner.loading import quiet
from outlay.runner.loss import attach
from outlay.runner.model import Filler, blocks_of, parts_of, recompute, skeleton
from outlay.runner.optimizers import own_optimizer
from outlay.runner.parallel.expert_load import in_backward

_WITHIN = "deepspeed_moe.experts.deepspeed_experts.0."
"""Where DeepSpeed's checkpoints look for the first expert of a rank."""


class _Exchange(torch.autograd.Function):
    """Rows [n, h] to the ranks of a group, `sends[i]` to rank i; the gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sends: list[int], gets: list[int], group: Any
    ) -> torch.Tensor:
        ctx.sends, ctx.gets, ctx.group = sends, gets, group
        return _exchange(rows, sends, gets, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(gradient, ctx.gets, ctx.sends, ctx.group), None, None, None


def _exchange(rows: torch.Tensor, sends: list[int], gets: list[int], group: Any) -> torch.Tensor:
    found = rows.new_empty((sum(gets), *rows.shape[1:]))
    torch.distributed.all_to_all_single(
        found,
        rows.contiguous(),
        output_split_sizes=gets,
        input_split_sizes=sends,
        group=group,
    )
    return found


class ExpertSlice(MoE):  # type: ignore[misc]
    """This rank's experts of one layer, in the place of transformers' module that holds all of them."""

    def __init__(
        self, whole: Any, ep: int, group: Any, name: str, capacity: float | None = None
    ) -> None:
        nn.Module.__init__(self)  # not MoE's own, which makes a router and experts
        count, self.ep, self.group = int(whole.num_experts), ep, group
        self.capacity, self.dropped = capacity, 0
        self.local = count // ep
        # As DeepSpeed counts: each rank's experts are one.
        self.num_experts, self.num_local_experts, self.expert_group_name = ep, 1, name
        rank = torch.distributed.get_rank(group)
        whole.num_experts = self.local
        for key, weight in list(whole.named_parameters(recurse=False)):
            mine = weight.detach()[rank * self.local : (rank + 1) * self.local].clone()
            made: Any = nn.Parameter(mine, weight.requires_grad)
            made.allreduce, made.group_name = False, name
            setattr(whole, key, made)
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList([whole])

    @property
    def held(self) -> Any:
        """transformers' module, with this rank's experts alone."""
        return self.deepspeed_moe.experts.deepspeed_experts[0]  # type: ignore[union-attr, index]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are made before the model."""

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [t, h], their experts [t, k] and how much each counts [t, k] → [t, h]."""
        pairs, k = chosen.flatten(), chosen.shape[1]
        order = torch.argsort(pairs, stable=True)
        if self.capacity is not None and self.training:
            limit = math.ceil(self.capacity * len(pairs) / (self.local * self.ep))
            order = within_capacity(pairs, weights.detach().flatten(), limit)
            if not in_backward():
                self.dropped += len(pairs) - len(order)
        counts = torch.bincount(pairs[order], minlength=self.local * self.ep)
        arriving = _exchange(counts, [self.local] * self.ep, [self.local] * self.ep, self.group)
        splits = torch.stack([counts, arriving]).view(2, self.ep, self.local).sum(2).tolist()
        sends, gets = splits
        rows = _Exchange.apply(hidden[order // k], sends, gets, self.group)
        done = self._work(rows, arriving)
        back = _Exchange.apply(done, gets, sends, self.group)
        # Each row to its pair; a dropped one stays zero.
        back = back.new_zeros(len(pairs), back.shape[1]).index_copy(0, order, back)
        summed = (back.unflatten(0, (-1, k)) * weights.unsqueeze(-1)).sum(1)
        return summed.to(hidden.dtype)

    def _work(self, rows: torch.Tensor, arriving: torch.Tensor) -> torch.Tensor:
        """Rows [n, h] through the local expert that each is for; `arriving`: rows by sender and expert."""
        count = len(rows)
        experts = torch.arange(self.local, device=rows.device).repeat(self.ep)
        experts = experts.repeat_interleave(arriving, output_size=count)
        if count == 0:
            # A row of nothing: every weight gets a gradient, in the order of every other rank, without
            # which ZeRO's reductions would wait or, worse, mix different weights.
            rows, experts = (
                torch.cat([rows, rows.new_zeros(1, rows.shape[1])]),
                experts.new_zeros(1),
            )
        ones = rows.new_ones(len(rows), 1)
        return self.held(rows, experts.unsqueeze(1), ones)[:count]  # type: ignore[no-any-return]

    def whole(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Collective: the weights of all experts on the group's first rank, null on the others."""
        ranks = torch.distributed.get_process_group_ranks(self.group)
        first = torch.distributed.get_rank() == ranks[0]
        parts = [torch.empty_like(weight) for _ in ranks] if first else None
        torch.distributed.gather(weight.detach(), parts, dst=ranks[0], group=self.group)
        return None if parts is None else torch.cat(parts).cpu()


class ExpertParallelEngine(Engine):
    """ZeRO 0–2 over all ranks; experts are spread over groups of `ep` of them."""

    def __init__(self, plan: Plan, engine: Any) -> None:
        super().__init__(plan, engine)
        if plan.strategy.zero == 0:
            engine.clip_fp32_gradients = self._clip

    @staticmethod
    def _initialize(plan: Plan, groups_of: Any = None) -> Any:
        from deepspeed.utils import groups

        model = skeleton(plan.model, precision=plan.job.precision, attention=plan.job.attention)
        compression.prepare(model, plan)
        filler = Filler(model, plan.model, seed=plan.job.seed, device=current_device())
        ep = plan.strategy.ep
        with quiet():
            groups._create_expert_and_data_parallel(ep)
        name = f"ep_size_{ep}"
        group = groups._get_expert_parallel_group(name)
        for part in parts_of(model):
            _spread(filler.fill(part), ep, group, name, plan.job.expert_capacity)
        if not any(isinstance(module, ExpertSlice) for module in model.modules()):
            raise UsageError(
                f"{plan.model.name} has no experts where {', '.join(EXPERT_PARALLEL_FAMILIES)} have theirs",
                where=plan.model.source,
                do="plan with ep: 1",
            )
        attach(model, plan.strategy.loss)
        if plan.strategy.activation_checkpointing == "full":
            recompute(list(blocks_of(model)), plan.strategy.recompute_layers)
        return initialize(
            model,
            copy.deepcopy(plan.deepspeed),
            build=own_optimizer(plan, model),
            weights=_groups_of(model, name),
        )

    def _clip(self) -> None:
        """By the 2-norm of the whole gradient, which fp32 without ZeRO does not know.

        DeepSpeed's own takes the mean over the ranks of what each holds (`runtime/utils.py`,
        `clip_grad_norm_`): the experts of the others never count.
        """
        from deepspeed.moe.utils import is_moe_param
        from deepspeed.utils import groups

        squares = torch.zeros(2, device=self.device)
        weights = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
        for weight in weights:
            squares[int(is_moe_param(weight))] += weight.grad.float().square().sum()
        group = groups._get_expert_parallel_group(f"ep_size_{self.plan.strategy.ep}")
        torch.distributed.all_reduce(squares[1], group=group)
        norm = squares.sum().sqrt()
        self.deepspeed._global_grad_norm = norm
        share = (self.deepspeed.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
        for weight in weights:
            weight.grad.mul_(share)

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """On rank 0 all weights by transformers' names, on the CPU, ties kept; null on the others."""
        module: nn.Module = self.deepspeed.module
        slices = [(n, m) for n, m in module.named_modules() if isinstance(m, ExpertSlice)]
        wholes = {
            f"{name}.{_WITHIN}{key}": slice_.whole(weight)
            for name, slice_ in slices
            for key, weight in slice_.held.named_parameters()
        }
        if self.rank != 0:
            return None
        state = module.state_dict(keep_vars=True)
        values: dict[int, torch.Tensor] = {}
        host_copies([t for name, t in state.items() if name not in wholes], values)
        found = {}
        for name, tensor in state.items():
            whole = wholes.get(name)
            found[name.replace(_WITHIN, "")] = values[id(tensor)] if whole is None else whole
        return found


def within_capacity(pairs: torch.Tensor, weights: torch.Tensor, limit: int) -> torch.Tensor:
    """Indices of the pairs that are kept, by expert: of each expert's those with the most weight."""
    order = torch.argsort(weights, descending=True, stable=True)
    order = order[torch.argsort(pairs[order], stable=True)]
    counts = torch.bincount(pairs)
    place = (
        torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[pairs[order]]
    )
    return order[place < limit]


def _spread(part: nn.Module, ep: int, group: Any, name: str, capacity: float | None) -> None:
    """Leave of every layer's experts in a filled part those of this rank."""
    for parent in list(part.modules()):
        experts: Any = getattr(parent, "experts", None)
        if hasattr(parent, "gate") and hasattr(experts, "num_experts"):
            parent.experts = ExpertSlice(experts, ep, group, name, capacity)


def _groups_of(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """Experts apart from the other weights, as ZeRO asks.

    DeepSpeed's own division (`moe/utils.py`, `split_params_into_different_moe_groups_for_optimizer`) makes
    a group of nothing before an expert weight of more than 178,956,971 elements.
    """
    from deepspeed.moe.utils import split_params_into_shared_and_expert_params

    trained = [p for p in model.parameters() if p.requires_grad]
    shared, experts = split_params_into_shared_and_expert_params(trained)
    return [
        {"params": shared, "name": "dense-params"},
        {"params": experts, "name": name, "moe": True},
    ]

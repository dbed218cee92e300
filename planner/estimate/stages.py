"""Which layers a pipeline stage holds, and how much that is.

The items of a decoder in order: embedding, each block, final norm with head. `partition` balances
the forward cost of the stages; the runner's PipelineModule uses the same boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from outlay.planner.estimate.candidates import Array
from outlay.planner.estimate.compute import (
    attention_flops_per_token,
    block_matmul_flops_per_token,
    head_flops_per_token,
)
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.model import Block, ModelSpec

FIRST, MIDDLE, LAST = 0, 1, 2
"""The stage axis: the first stage, the heaviest between, the last. With pp = 1 all three are the whole."""


@dataclass(frozen=True)
class StageLoads:
    """Sums over the items of a stage; arrays [3, n] for n candidates."""

    dense_parameters: Array
    """Weights that every data-parallel rank shares (all but routed experts)."""
    expert_parameters: Array
    """Routed experts, all of them."""
    block_counts: Array
    """[3, groups, n]: blocks of each group."""
    has_embedding: Array
    has_head: Array
    exists: Array
    """False for the middle of a pipeline of two stages, and for first and last of pp = 1 but one."""


def item_costs(spec: ModelSpec, seq_len: int) -> list[float]:
    """Forward FLOPs a token of each item: embedding, blocks, norm + head."""
    costs = [0.0]
    for block in spec.blocks:
        flops = block_matmul_flops_per_token(spec, block) + attention_flops_per_token(
            block, seq_len
        )
        costs += [flops] * block.count
    return [*costs, head_flops_per_token(spec)]


@lru_cache(maxsize=4096)
def partition(spec: ModelSpec, seq_len: int, pp: int, *, uniform: bool = False) -> tuple[int, ...]:
    """Boundaries of the stages in the item list: stage s holds items [b[s], b[s+1]).

    Balanced: the least possible maximum of the stages' forward cost (binary search over the limit,
    greedy fill), every stage with at least one block. Uniform: the same number of blocks each
    (Megatron), embedding with the first and head with the last; where only layers + 2 divides by
    pp, embedding and head each take the place of a block.
    """
    layers = spec.layers
    if pp == 1:
        return (0, layers + 2)
    if uniform and layers % pp and (layers + 2) % pp == 0:
        return tuple(range(0, layers + 3, (layers + 2) // pp))
    if uniform or pp >= layers:
        edges = [1 + round(s * layers / pp) for s in range(pp + 1)]
        return (0, *edges[1:-1], layers + 2)
    costs = item_costs(spec, seq_len)
    low, high = max(sum(costs) / pp, max(costs)), sum(costs)
    for _ in range(50):
        limit = (low + high) / 2
        if _fill(costs, limit, pp) is None:
            low = limit
        else:
            high = limit
    edges_found = _fill(costs, high, pp)
    assert edges_found is not None
    return edges_found


def _fill(costs: list[float], limit: float, pp: int) -> tuple[int, ...] | None:
    """Greedy fill up to `limit`, leaving at least one block for each later stage."""
    items = len(costs)
    edges, start = [0], 0
    for stage in range(pp - 1):
        end, total, blocks = start, 0.0, 0
        while end < items - 1 and (blocks == 0 or total + costs[end] <= limit * (1 + 1e-9)):
            if items - 1 - end <= pp - 1 - stage:
                break
            total += costs[end]
            blocks += end > 0
            end += 1
        edges.append(end)
        start = end
    if sum(costs[start:]) > limit * (1 + 1e-9):
        return None
    return (*edges, items)


@dataclass(frozen=True)
class _Stage:
    dense: float
    expert: float
    blocks: tuple[int, ...]
    embedding: bool
    head: bool


@lru_cache(maxsize=4096)
def _stage_list(spec: ModelSpec, seq_len: int, pp: int, uniform: bool) -> tuple[_Stage, ...]:
    counts = parameter_counts(spec)
    group_of = [g for g, block in enumerate(spec.blocks) for _ in range(block.count)]
    edges = partition(spec, seq_len, pp, uniform=uniform)
    stages = []
    for s in range(pp):
        items = range(edges[s], edges[s + 1])
        groups = [group_of[i - 1] for i in items if 1 <= i <= spec.layers]
        embedding, head = 0 in items, spec.layers + 1 in items
        dense = sum(counts.blocks[g].total - counts.blocks[g].experts for g in groups)
        dense += counts.embedding * embedding + (counts.final + counts.head) * head
        if head and not embedding and spec.tie_embeddings:
            dense += spec.vocab * spec.hidden
        stages.append(
            _Stage(
                float(dense),
                float(sum(counts.blocks[g].experts for g in groups)),
                tuple(groups.count(g) for g in range(len(spec.blocks))),
                embedding,
                head,
            )
        )
    return tuple(stages)


def _weight(spec: ModelSpec, stage: _Stage, seq_len: int) -> float:
    return sum(
        n * block_matmul_flops_per_token(spec, b)
        for n, b in zip(stage.blocks, spec.blocks, strict=True)
    )


@lru_cache(maxsize=4096)
def _three(
    spec: ModelSpec, seq_len: int, pp: int, uniform: bool
) -> tuple[_Stage, _Stage | None, _Stage]:
    """The first, the heaviest between, the last; remembered, since a search asks for the same pp often."""
    stages = _stage_list(spec, seq_len, pp, uniform)
    middle = max(stages[1:-1], key=lambda s: _weight(spec, s, seq_len), default=None)
    return stages[0], middle, stages[-1]


def stage_loads(spec: ModelSpec, seq_len: int, pp: Array, *, uniform: bool = False) -> StageLoads:
    """Loads of {first, middle, last} for each candidate, from a table over the unique pp."""
    alike = len(pp) and (pp == pp[0]).all()
    unique, inverse = (
        (pp[:1], np.zeros(len(pp), np.int64)) if alike else np.unique(pp, return_inverse=True)
    )
    groups = len(spec.blocks)
    table = np.zeros((3, 5 + groups, len(unique)))
    for j, p in enumerate(unique):
        first, middle, last = _three(spec, seq_len, int(p), uniform)
        for position, stage in ((FIRST, first), (MIDDLE, middle), (LAST, last)):
            if stage is None:
                continue
            table[position, :5, j] = (stage.dense, stage.expert, stage.embedding, stage.head, 1.0)
            table[position, 5:, j] = stage.blocks
    # Row by row: three times as fast as one gather over both outer axes.
    full = np.empty((*table.shape[:2], len(pp)))
    for row, into in zip(table.reshape(-1, len(unique)), full.reshape(-1, len(pp)), strict=True):
        np.take(row, inverse.reshape(-1), out=into, mode="clip")
    return StageLoads(
        dense_parameters=full[:, 0],
        expert_parameters=full[:, 1],
        has_embedding=full[:, 2],
        has_head=full[:, 3],
        exists=full[:, 4] > 0,
        block_counts=full[:, 5:],
    )


def heaviest_block(spec: ModelSpec) -> Block:
    """The block with the most parameters: what stage 3 gathers and what recomputation holds."""
    counts = parameter_counts(spec)
    index = max(range(len(spec.blocks)), key=lambda g: counts.blocks[g].total)
    return spec.blocks[index]

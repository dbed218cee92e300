"""The strategies that a search looks at: every combination that closes, under the rules of a target.

Two stages, so that the space is never larger than it must be: first how ranks and states are spread,
under the rules; then micro-batch, checkpointing and loss for what is left, under the rules again. A rule
that forbids a spread forbids it for every micro-batch, so nothing legal is lost (a test compares with
the plain product).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outlay.planner.estimate.buckets import reduce_buckets, smaller_buckets
from outlay.planner.estimate.candidates import CHECKPOINTING, OFFLOAD, Array, Candidates
from outlay.planner.estimate.communication import link_domain
from outlay.planner.estimate.estimator import software_for
from outlay.planner.estimate.software import MEGATRON_CORE, Software
from outlay.planner.rules import Context, allowed
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec

_NULL = -1
_MOST_CONTEXT = 32
_AS_FIXED = (
    "activation_checkpointing", "recompute_layers", "loss", "sequence_parallel", "reduce_bucket_size",
    "allgather_bucket_size",
)  # fmt: skip
"""What a person may fix that no axis of the spread varies."""
_LEAST_TOKENS_A_RANK = 1024
"""Ring attention over shorter pieces waits for its messages; not searched."""
_MOST_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class Target:
    """Whose trainer the plan is for: what it can execute, and whose conventions the estimate follows."""

    name: str
    says: str
    kinds: tuple[str, ...]
    """Kinds of rules that hold (planner/rules/)."""
    software: Software | None
    """Null = DeepSpeed's on this hardware."""
    zero: tuple[int, ...]
    fixed: Mapping[str, int] = field(default_factory=dict)
    """What it cannot vary, as the integers of the candidate arrays; a person's own flags come before."""

    def software_on(self, cluster: Cluster) -> Software:
        return self.software or software_for(cluster)


TARGETS = {
    "runner": Target(
        name="runner", says="what `outlay run` executes", kinds=("arithmetic", "deepspeed", "runner"),
        software=None, zero=(0, 1, 2, 3),
    ),
    "deepspeed": Target(
        name="deepspeed", says="what DeepSpeed executes; `outlay run` may not",
        kinds=("arithmetic", "deepspeed", "json"), software=None, zero=(0, 1, 2, 3),
    ),
    "trainer": Target(
        name="trainer", says="what transformers' Trainer and Accelerate execute: `outlay emit` writes it for them",
        kinds=("arithmetic", "deepspeed", "json", "trainer"), software=None, zero=(0, 1, 2, 3),
        fixed={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "sp": 1, "ep": 1, "loss": 0, "recompute_layers": _NULL},
    ),
    "megatron": Target(
        name="megatron", says="Megatron-Core's conventions: estimated only, neither DeepSpeed nor `outlay run`",
        kinds=("arithmetic",), software=MEGATRON_CORE, zero=(0, 1),
    ),
}  # fmt: skip
"""`--for`, the first one the default."""


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def candidates_for(
    spec: ModelSpec,
    job: Job,
    cluster: Cluster,
    fixed: dict[str, int] | None = None,
    *,
    target: Target = TARGETS["runner"],
) -> tuple[Candidates, int]:
    """(what the rules of the target leave, how many were looked at); dp and grad_accum follow."""
    fixed = {**target.fixed, **(fixed or {})}
    x = Context(spec=spec, job=job, cluster=cluster)
    spread = _spread(spec, job, cluster, fixed, target)
    legal = spread.take(allowed(spread, x, kinds=target.kinds)) if len(spread) else spread
    if not len(legal):
        return legal, len(spread)
    whole = _micro_batches(spec, job, legal, fixed, target)
    looked = len(spread) - len(legal) + len(whole)
    return (whole.take(allowed(whole, x, kinds=target.kinds)) if len(whole) else whole), looked


def with_small_buckets(
    spec: ModelSpec, c: Candidates, fixed: Mapping[str, int], target: Target
) -> tuple[Candidates, Array]:
    """(the same, and behind them those that have buckets once more with small ones; of each the one whose
    buckets are the usual ones). Where buckets are given or the trainer has none of these, as they are."""
    usual = np.arange(len(c))
    if target.name == "megatron" or {"reduce_bucket_size", "allgather_bucket_size"} & set(fixed):
        return c, usual
    sized, small = reduce_buckets(spec, c), smaller_buckets(spec, c)
    again = np.flatnonzero((c.zero >= 1) & (2 * small <= sized))
    other = dataclasses.replace(
        c.take(again), reduce_bucket_size=small[again], allgather_bucket_size=small[again]
    )
    return c.joined(other), np.concatenate([usual, again])


def spread_of(
    spec: ModelSpec, job: Job, cluster: Cluster, fixed: dict[str, int], target: Target
) -> Candidates:
    """The first stage before any rule: what a refusal is explained with."""
    return _spread(spec, job, cluster, {**target.fixed, **fixed}, target)


def _parallel(
    spec: ModelSpec, job: Job, cluster: Cluster, fixed: dict[str, int], target: Target
) -> Iterator[tuple[int, ...]]:
    """(tp, pp, vpp, cp, sp, ep, dp) that close over the ranks; fixed ones as they are."""
    ranks, domain = cluster.ranks, link_domain(cluster)
    heads = math.gcd(*(b.attention.heads for b in spec.blocks))
    shared = math.gcd(heads, *(b.attention.kv_heads for b in spec.blocks))
    experts = math.gcd(*(b.mlp.experts for b in spec.blocks if b.mlp.experts)) if any(
        b.mlp.experts for b in spec.blocks
    ) else 1  # fmt: skip
    megatron = target.name == "megatron"

    def axis(name: str, values: list[int]) -> list[int]:
        return [fixed[name]] if name in fixed else values

    tps = axis("tp", [t for t in divisors(shared) if t <= domain and ranks % t == 0])
    sps = [1] if megatron else [s for s in divisors(heads) if s <= domain and job.seq_len % s == 0]
    cps = [1]
    if megatron:
        cps += [c for c in (2, 4, 8, 16, _MOST_CONTEXT) if job.seq_len // c >= _LEAST_TOKENS_A_RANK]
    for tp, cp, sp in itertools.product(tps, axis("cp", cps), axis("sp", sps)):
        if ranks % (tp * cp * sp):
            continue
        rest = ranks // (tp * cp * sp)
        for pp in axis("pp", [p for p in divisors(rest) if p <= spec.layers]):
            if rest % pp:
                continue
            dp = rest // pp
            if job.global_batch % dp or fixed.get("dp", dp) != dp:
                continue
            chunks = [1]
            if megatron and pp > 1:
                # Where only layers + 2 divides, embedding and head take a layer's place each.
                whole = spec.layers if spec.layers % pp == 0 else spec.layers + 2
                if whole % pp == 0:
                    chunks = [v for v in divisors(whole // pp) if v <= _MOST_CHUNKS]
            eps = [e for e in divisors(experts) if dp % e == 0]
            for vpp, ep in itertools.product(axis("vpp", chunks), axis("ep", eps)):
                yield tp, pp, vpp, cp, sp, ep, dp


def _states(fixed: dict[str, int], target: Target, cluster: Cluster) -> list[tuple[int, int, int]]:
    """(zero, offload_optimizer, offload_param). NVMe only where it is asked for; on a CPU the host too,
    for nothing would move."""
    zeros = [fixed["zero"]] if "zero" in fixed else list(target.zero)
    elsewhere = target.name != "megatron" and cluster.kind != "cpu"
    host = (0, OFFLOAD.index("cpu")) if elsewhere else (0,)
    optimizers = (fixed["offload_optimizer"],) if "offload_optimizer" in fixed else host
    weights = (fixed["offload_param"],) if "offload_param" in fixed else host
    return list(itertools.product(zeros, optimizers, weights))


def _spread(
    spec: ModelSpec, job: Job, cluster: Cluster, fixed: dict[str, int], target: Target
) -> Candidates:
    parallel = list(_parallel(spec, job, cluster, fixed, target))
    states = _states(fixed, target, cluster)
    names = ("tp", "pp", "vpp", "cp", "sp", "ep", "dp")
    p = np.array(parallel, np.int64).reshape(-1, len(names))
    s = np.array(states, np.int64).reshape(-1, 3)
    p, s = np.repeat(p, len(s), axis=0), np.tile(s, (len(p), 1))
    columns: dict[str, Any] = {name: p[:, i] for i, name in enumerate(names)}
    columns |= {"zero": s[:, 0], "offload_optimizer": s[:, 1], "offload_param": s[:, 2]}
    micro = fixed.get("micro_batch", 1)
    columns["micro_batch"] = np.full(len(p), micro)
    columns["grad_accum"] = job.global_batch // (columns["dp"] * micro)
    for name in _AS_FIXED:
        if name in fixed:
            columns[name] = np.full(len(p), fixed[name])
    if target.name == "megatron" and "sequence_parallel" not in fixed:
        # The same bytes sent as without it, and less memory: never worse.
        columns["sequence_parallel"] = (columns["tp"] > 1).astype(np.int64)
    c = _filled(columns, len(p))
    sharers = c.dp * c.cp * c.sp
    keep = (c.zero == 0) | (sharers > 1) | ("zero" in fixed) | (c.offload_optimizer > 0)
    keep &= c.micro_batch * c.grad_accum * c.dp == job.global_batch
    if "grad_accum" in fixed:
        keep &= job.global_batch % (c.dp * fixed["grad_accum"]) == 0
    return c.take(keep)


def _filled(columns: dict[str, Any], size: int) -> Candidates:
    """Candidates with Strategy's defaults where no column is given."""
    base = Candidates.grid()
    default = {
        f.name: np.full(size, int(getattr(base, f.name)[0]), np.int64)
        for f in dataclasses.fields(Candidates)
    }
    return Candidates(**(default | columns))


def _recomputed(spec: ModelSpec, fixed: dict[str, int], target: Target) -> list[tuple[int, int]]:
    """(activation_checkpointing, recompute_layers): none, selective, all, and quarters of the layers."""
    none, selective, full = range(len(CHECKPOINTING))
    modes: tuple[int, ...] = (none, full) if target.name == "trainer" else (none, selective, full)
    modes = (fixed["activation_checkpointing"],) if "activation_checkpointing" in fixed else modes
    if "recompute_layers" in fixed:
        return [(m, fixed["recompute_layers"]) for m in modes]
    parts = {round(spec.layers * quarter / 4) for quarter in (1, 2, 3)} - {0, spec.layers}
    some = [(full, n) for n in sorted(parts)] if full in modes else []
    return [(m, _NULL) for m in modes] + some


def _micro_batches(
    spec: ModelSpec, job: Job, spread: Candidates, fixed: dict[str, int], target: Target
) -> Candidates:
    """Each spread with every micro-batch that divides its share, recomputation and loss."""
    micro = [fixed["micro_batch"]] if "micro_batch" in fixed else divisors(job.global_batch)
    losses = [fixed["loss"]] if "loss" in fixed else ([0] if target.name == "megatron" else [0, 2])
    again = _recomputed(spec, fixed, target)
    inner = np.array(
        [(m, a, r, loss) for m in micro for a, r in again for loss in losses], np.int64
    )
    n, k = len(spread), len(inner)
    share = job.global_batch // spread.dp
    keep = (share[:, None] % inner[None, :, 0] == 0).reshape(-1)
    accum = share[:, None] // inner[None, :, 0]
    if "grad_accum" in fixed:
        keep &= (accum == fixed["grad_accum"]).reshape(-1)
    # Megatron's interleaved schedule takes whole rounds of micro-batches.
    keep &= ((spread.vpp[:, None] == 1) | (accum % spread.pp[:, None] == 0)).reshape(-1)
    index = np.flatnonzero(keep)
    outer, which = index // k, index % k
    assert index.size == 0 or int(outer[-1]) < n
    return dataclasses.replace(
        spread.take(outer),
        micro_batch=inner[which, 0],
        grad_accum=accum.reshape(-1)[index],
        activation_checkpointing=inner[which, 1],
        recompute_layers=inner[which, 2],
        loss=inner[which, 3],
    )

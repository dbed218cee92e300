"""A job file and flags → what `outlay size` looks for. What nobody said is filled by a stated default."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outlay.planner.amount import money_of
from outlay.planner.assumed import parse_assumed, with_set
from outlay.planner.cost import carbon_of
from outlay.planner.estimate.compute import model_flops_per_token
from outlay.planner.jobs import (
    DEFAULT_SEQ_LEN,
    JobFile,
    _positive_count,
    merge,
    read_job_file,
    resolve_job,
)
from outlay.planner.options import show_money
from outlay.planner.ownership import with_region
from outlay.planner.scaling import (
    BESIROGLU,
    Optimum,
    optimum_for_loss,
    optimum_for_parameters,
)
from outlay.planner.size.budget import batch_of, largest
from outlay.planner.size.choose import Limits
from outlay.planner.size.engine import Ask
from outlay.planner.size.models import llama_of
from outlay.planner.size.offers import (
    MOST_RANKS,
    Offer,
    bought_offers,
    cluster_of_offer,
    offers_of,
)
from outlay.planner.space import TARGETS
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Budget
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import MOST
from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_count, parse_count

YEAR_S = 365 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The flags of `outlay size` beside those of a job."""

    hardware: tuple[str, ...] = ()
    buy: bool = False
    purchase_usd: tuple[str, ...] = ()
    inter_node_gbps: float | None = None
    price_usd_per_h: float | None = None
    target: str = "runner"
    deadline: str | None = None
    deadline_s: float | None = None
    objective: str | None = None
    most: str = str(MOST_RANKS)
    parameters: str | None = None
    wanted_loss: float | None = None
    overtrain: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The question, complete."""

    ask: Ask
    offers: Sequence[Offer]
    limits: Limits
    objective: str
    references: tuple[str, ...]
    reference: str
    config: dict[str, Any] | None
    """Of a model that was sized, not named."""
    weights: str | None
    assumptions: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)


def _most(text: str) -> int:
    most = parse_count(text, where="--most")
    if not 1 <= most <= 1_000_000:
        raise UsageError(f"{text} accelerators make no sense", where="--most", do="1 to 1,000,000")
    return most


def limits_of(budgets: Sequence[Budget], deadline_s: float | None) -> Limits:
    """The smallest of each kind; hours of a budget and the deadline are the same thing."""
    least: dict[str, float] = {}
    for b in budgets:
        least[b.kind] = min(least.get(b.kind, b.amount), b.amount)
    hours = [h for h in (least.get("hours"), deadline_s and deadline_s / 3600) if h]
    return Limits(
        hours=min(hours, default=None), usd=least.get("money"), gpu_hours=least.get("gpu_hours"),
        energy_kwh=least.get("energy"), co2e_kg=least.get("carbon"),
    )  # fmt: skip


def _objective(s: Sizing, limits: Limits) -> str:
    if s.objective:
        return s.objective
    return "balanced" if limits.hours is None else "cheapest"


def _first_cluster(offers: Sequence[Offer]) -> Cluster:
    """Any of the hardware, for defaults that depend on its kind; a GPU with bf16 where there is one."""
    clusters = (cluster_of_offer(o, o.most_nodes or 1) for o in offers)
    real = [c for c in clusters if isinstance(c, Cluster)]
    if not real:
        raise UsageError("no hardware of these can be described")
    return next((c for c in real if "bf16" in c.accelerator.flops), real[0])


def asked(job_file: str | None, flags: dict[str, Any], fixed: dict[str, int], s: Sizing) -> Asked:
    """Resolve everything. Raises UsageError."""
    file = merge(read_job_file(job_file) if job_file else JobFile(), flags)
    carbon_of(file.region)
    references = s.hardware or ((file.hardware,) if file.hardware else ())
    price = s.price_usd_per_h if s.price_usd_per_h is not None else file.price_usd_per_h
    offers = offers_of(
        references, gbps=s.inter_node_gbps or file.inter_node_gbps, price_usd_per_h=price
    )
    if not offers:
        raise UsageError(
            "nothing of that is for rent at a known price", where="--hardware",
            do="give a count and a price: --hardware h100-sxm:8 --price-usd-per-h 24",
        )  # fmt: skip
    offers = [*offers, *_bought(file, s, offers, references)]
    budget, currency = money_of(file.budget, file.rate, file.currency)
    show_money(currency)
    limits = limits_of(budget, s.deadline_s)
    objective, notes = _objective(s, limits), _of_network(s, file, offers)
    if limits.hours is None:
        limits = dataclasses.replace(limits, hours=YEAR_S / 3600)
        notes.append({"what": "deadline", "value": "365 d",
                      "source": "default: nothing longer is shown (--deadline)"})  # fmt: skip
    if file.model:
        return _named(file, fixed, s, references, offers, limits, objective, notes)
    return _unnamed(file, fixed, s, references, offers, limits, objective, notes)


def _of_network(s: Sizing, file: JobFile, offers: Sequence[Offer]) -> list[dict[str, Any]]:
    """A network that was stated where every machine asked for is one node: it changes nothing."""
    gbps = s.inter_node_gbps or file.inter_node_gbps
    if gbps is None or not all(o.cluster is not None and o.cluster.nodes == 1 for o in offers):
        return []
    source = "changes nothing: one node, nothing crosses its network"
    return [{"what": "inter_node_gbps", "value": gbps, "source": source}]


def _bought(
    file: JobFile, s: Sizing, offers: Sequence[Offer], references: Sequence[str]
) -> list[Offer]:
    """With --buy: the same accelerators, or all of the catalog, bought."""
    if not s.buy:
        if s.purchase_usd:
            raise UsageError("what for?", where="--purchase-usd", do="give --buy too")
        return []
    taken = with_region(with_set(parse_assumed(file.assume)), file.region)
    return bought_offers(
        offers, s.purchase_usd, taken, gbps=s.inter_node_gbps or file.inter_node_gbps,
        everything=not references,
    )  # fmt: skip


def _named(
    file: JobFile, fixed: dict[str, int], s: Sizing, references: Sequence[str], offers: Sequence[Offer],
    limits: Limits, objective: str, notes: list[dict[str, Any]],
) -> Asked:  # fmt: skip
    from outlay.planner.commands.question import _weights
    from outlay.planner.spec.families import resolve_model

    assert file.model is not None
    spec, _ = resolve_model(file.model)
    ask, more = _ask(file, spec, fixed, s, offers)
    return Asked(
        ask=ask, offers=offers, limits=limits, objective=objective, references=tuple(references),
        reference=file.model, config=None, weights=_weights(file.model), assumptions=notes + more,
    )  # fmt: skip


def _fewest_sequences(file: JobFile, spec: ModelSpec) -> int:
    """A step, so that the tokens are no more steps than a job may have: 1, but for trillions of tokens."""
    if file.tokens is None:
        return 1
    seq_len = file.seq_len or min(DEFAULT_SEQ_LEN, spec.max_positions or DEFAULT_SEQ_LEN)
    return 1 + _positive_count(file.tokens) // (max(1, seq_len) * MOST)


def _ask(
    file: JobFile, spec: ModelSpec, fixed: dict[str, int], s: Sizing, offers: Sequence[Offer]
) -> tuple[Ask, list[dict[str, Any]]]:
    """The job on any hardware: the batch follows from compute, not from how many ranks there are."""
    cluster, notes = _first_cluster(offers), []
    if file.global_batch is None:
        one = dataclasses.replace(file, global_batch=_fewest_sequences(file, spec))
        probe = resolve_job(one, spec, cluster).job
        flops = model_flops_per_token(spec, probe.seq_len) * probe.tokens
        batch = batch_of(flops, probe.seq_len)
        file = dataclasses.replace(file, global_batch=batch)
        source = (
            "default: 0.292·C^0.3271 tokens a step for C FLOPs (DeepSeek LLM, arXiv 2401.02954)"
        )
        notes.append({"what": "global_batch", "value": batch, "source": source})
    resolved = resolve_job(file, spec, cluster)
    ask = Ask(
        spec=spec, job=resolved.job, target=TARGETS[s.target], fixed=fixed, most_ranks=_most(s.most),
        precision_given=file.precision is not None,
    )  # fmt: skip
    return ask, notes + resolved.assumptions


def _unnamed(
    file: JobFile, fixed: dict[str, int], s: Sizing, references: Sequence[str], offers: Sequence[Offer],
    limits: Limits, objective: str, notes: list[dict[str, Any]],
) -> Asked:  # fmt: skip
    """No model: its size from a wanted size or loss, or as large as the limits allow."""
    _pretraining_only(file)
    seq_len = file.seq_len or DEFAULT_SEQ_LEN
    if file.seq_len is None:
        notes.append({"what": "seq_len", "value": seq_len, "source": "default"})
    wanted = _stated_size(s)
    if wanted is None:
        wanted, file = _largest_size(file, s, references, offers, limits, seq_len, notes)
        objective = s.objective or "cheapest"
    spec, config = llama_of(wanted.parameters, seq_len=seq_len)
    file = dataclasses.replace(file, seq_len=seq_len, model=spec.name)
    if file.steps is None and file.tokens is None:
        file = dataclasses.replace(file, tokens=f"{round(wanted.tokens)}")
    ask, more = _ask(file, spec, fixed, s, offers)
    return Asked(
        ask=ask, offers=offers, limits=limits, objective=objective, references=tuple(references),
        reference=spec.name, config=config, weights=None, assumptions=notes + more,
        extra={"scaling": _scaling(wanted, ask.job.tokens, s.overtrain)},
    )  # fmt: skip


def _pretraining_only(file: JobFile) -> None:
    """Raises UsageError for what needs a model that is there."""
    pretrained = [
        k for k in ("finetune", "data", "attempts", "pilot") if getattr(file, k) is not None
    ]
    if pretrained:
        raise UsageError(
            f"no model, but {', '.join('--' + k for k in pretrained)}",
            why="a model is sized for one pretraining run of its own length",
            do="name one with --model",
        )


def _stated_size(s: Sizing) -> Optimum | None:
    """By a number of parameters or a loss; null where neither is stated."""
    if s.parameters and s.wanted_loss:
        raise UsageError("give --parameters or --reach-loss, not both")
    if s.parameters:
        stated = float(parse_count(s.parameters, where="--parameters"))
        return optimum_for_parameters(stated, overtrain=s.overtrain)
    if s.wanted_loss is not None:
        return optimum_for_loss(s.wanted_loss, overtrain=s.overtrain)
    return None


def _largest_size(
    file: JobFile, s: Sizing, references: Sequence[str], offers: Sequence[Offer], limits: Limits,
    seq_len: int, notes: list[dict[str, Any]],
) -> tuple[Optimum, JobFile]:  # fmt: skip
    """(as large as the limits allow, the very job that was priced: what fills the budget may not exceed it)."""
    by_deadline = s.deadline_s is not None and references
    if limits.usd is None and limits.gpu_hours is None and not by_deadline:
        raise UsageError(
            "no model, and nothing to size one by",
            do="pass --model, or --budget 5000usd (and --deadline 14d), or --parameters 7B, or --reach-loss 2.2",
        )
    best = largest(
        offers, limits, target=TARGETS[s.target], seq_len=seq_len, most_ranks=_most(s.most),
        overtrain=s.overtrain,
    )  # fmt: skip
    file = dataclasses.replace(
        file, global_batch=best.job.global_batch, steps=best.job.steps, tokens=None
    )
    source = "0.292·C^0.3271 tokens a step for C FLOPs (DeepSeek LLM, arXiv 2401.02954)"
    notes.append({"what": "global_batch", "value": best.job.global_batch,
                  "source": f"default: {source}"})  # fmt: skip
    return Optimum(parameters=best.parameters, tokens=best.tokens, loss=best.loss), file


def _scaling(wanted: Optimum, tokens: int, overtrain: float) -> dict[str, Any]:
    """What the law says of the model that was sized, in words and figures."""
    says = (
        f"Compute-optimal{'' if overtrain == 1 else f', over-trained {overtrain:g} times'}: "
        f"{format_count(wanted.parameters)} parameters on {format_count(tokens)} tokens "
        f"({tokens / wanted.parameters:.0f} a parameter), expected loss {wanted.loss:.3f} nats a token "
        f"on MassiveText ({BESIROGLU.source})."
    )
    if not 1e8 <= wanted.parameters <= 2e10:
        says += " Outside 0.1B-20B parameters, which the law was fitted on."
    return {
        "parameters": wanted.parameters, "tokens": tokens, "loss": wanted.loss,
        "overtrain": overtrain, "source": BESIROGLU.source, "says": says,
    }  # fmt: skip

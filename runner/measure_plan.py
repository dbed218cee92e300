"""`outlay plan --measure N`: the N best strategies of a plan take real steps here, and the fastest is planned."""

from __future__ import annotations

import contextlib
import dataclasses
from datetime import UTC, datetime

import click

from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import evaluate, software_for
from outlay.planner.estimate.printed import estimate_dict
from outlay.planner.own_runs import append
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.plan import Alternative, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import OutlayError, UsageError
from outlay.profiles.units import format_seconds
from outlay.runner.host import AcceleratorKind, build_ops, ops_needed, prepare_environment
from outlay.runner.measure import TimedStrategy, time_strategies, with_strategy
from outlay.runner.pool import RankPool

STEPS = 5
REPEATS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """One strategy: what was predicted, and what it took or why it failed."""

    row: Alternative
    timing: TimedStrategy | OutlayError

    @property
    def strategy(self) -> Strategy:
        return self.row.strategy

    @property
    def step_s(self) -> float | None:
        return self.timing.step_s if isinstance(self.timing, TimedStrategy) else None

    def says(self, fastest_s: float) -> str:
        """Why it is not the one, in the words of the plan's table."""
        if isinstance(self.timing, OutlayError):
            return f"failed when it was run: {self.timing.what}"
        slower = self.timing.step_s / fastest_s - 1
        return f"measured {format_seconds(self.timing.step_s)}, {slower:.1%} slower"


def verified(plan: Plan, most: int, *, keep: bool, pool: RankPool | None = None) -> Plan:
    """The plan of the fastest of its `most` best strategies, each really run on this machine.

    `keep`: the runs are appended to this user's own measurements, which correct later estimates.
    `pool`: living ranks to run in; started here where null.
    """
    from outlay.planner.probe import probe
    from outlay.runner.fit import check_machine, check_software

    if plan.target != "runner":
        raise UsageError(
            f"--measure runs what `outlay run` executes; the plan is for {plan.target}",
            where="--measure",
            do="plan without --for",
        )
    check_software()
    check_machine(plan, probe())
    rows = _candidates(plan)[:most]
    tried = _run(plan, rows, pool)
    spec = spec_from_config(plan.model.config, name=plan.model.name, source=plan.model.source)
    _print(tried)
    ran = sorted((t for t in tried if t.step_s is not None), key=lambda t: t.step_s or 0.0)
    if not ran:
        reason = next(t.timing for t in tried if isinstance(t.timing, OutlayError))
        raise UsageError(f"none of the {len(tried)} strategies ran", why=reason.what)
    if keep:
        for one in ran:
            _keep(one, plan, spec)
    return _replanned(plan, spec, ran, [t for t in tried if t.step_s is None])


def _candidates(plan: Plan) -> list[Alternative]:
    """The plan's own strategy, then those that fit, in the order of their predicted step."""
    step, memory = plan.estimate["step"], plan.estimate["memory"]
    own = Alternative(
        strategy=plan.strategy, verdict=str(plan.estimate["verdict"]),
        step_s=None if step is None else float(step["time_s"]),
        device_bytes=float(memory["device_bytes"]), why="",
    )  # fmt: skip
    return [own, *(a for a in plan.alternatives if a.verdict != "no")]


def _run(plan: Plan, rows: list[Alternative], pool: RankPool | None) -> list[Tried]:
    plans = [with_strategy(plan, **vars(row.strategy)) for row in rows]
    click.echo(f"{len(plans)} strategies, {STEPS} steps each, {REPEATS} times", err=True)
    with contextlib.ExitStack() as stack:
        living = pool or stack.enter_context(_pool(plan))
        # DeepSpeed compiles what offload needs at first use: once, before any rank waits for it.
        if names := tuple(sorted({name for p in plans for name in ops_needed(p.deepspeed)})):
            kind, folder = living.accelerator, living.extensions_dir
            build_ops(names, prepare_environment(living.n, living.threads_per_rank, kind, folder))
        timed = time_strategies(plans, pool=living, steps=STEPS, repeats=REPEATS)
    return [Tried(row=row, timing=t) for row, t in zip(rows, timed, strict=True)]


def _pool(plan: Plan) -> RankPool:
    cluster = plan.cluster
    threads = max(1, (cluster.host.cores if cluster.host else 1) // cluster.ranks)
    kind: AcceleratorKind = "cpu" if cluster.kind == "cpu" else "cuda"
    return RankPool(cluster.ranks, threads_per_rank=threads, accelerator=kind)


def _print(tried: list[Tried]) -> None:
    for one in tried:
        if one.step_s is None:
            click.echo(f"{one.strategy.label():<32} failed: {one.timing}", err=True)
            continue
        text = f"{one.strategy.label():<32} measured {format_seconds(one.step_s):>8}"
        if one.row.step_s is not None:
            text += f", predicted {format_seconds(one.row.step_s):>8} ({one.row.step_s / one.step_s - 1:+.0%})"
        click.echo(text, err=True)


def _keep(one: Tried, plan: Plan, spec: ModelSpec) -> None:
    raw = evaluate(spec, plan.job, plan.cluster, Candidates.of([one.strategy]), own=False)
    if raw.step is None or one.step_s is None:
        return
    now = datetime.now(UTC)
    append(
        spec=spec, job=plan.job, cluster=plan.cluster, strategy=one.strategy,
        software=software_for(plan.cluster).family, measured_s=one.step_s,
        predicted_s=float(raw.step.time_s[0]), name=f"plan-{now:%Y%m%d-%H%M%S}",
        measured_at=now.isoformat(timespec="seconds"),
    )  # fmt: skip


def _replanned(plan: Plan, spec: ModelSpec, ran: list[Tried], failed: list[Tried]) -> Plan:
    """The plan with the fastest that ran, its estimate, and what the others took."""
    best, fastest_s = ran[0], ran[0].step_s or 0.0
    chosen = with_strategy(plan, **vars(best.strategy))
    estimate = _estimate(chosen, spec, plan.cluster)
    predicted = "" if best.row.step_s is None else f", predicted {format_seconds(best.row.step_s)}"
    source = f"the fastest of {len(ran) + len(failed)} that were run here ({STEPS} steps, {REPEATS} times)"
    measured = {
        "what": "strategy", "value": f"{best.strategy.label()}: {format_seconds(fastest_s)} a step{predicted}",
        "source": source,
    }  # fmt: skip
    told = {a["what"]: a for a in (*estimate["assumptions"], *plan.estimate["assumptions"])}
    estimate["assumptions"] = [measured, *told.values()]
    looked = {one.strategy for one in (*ran, *failed)}
    others = [dataclasses.replace(t.row, why=t.says(fastest_s)) for t in (*ran[1:], *failed)]
    rest = [a for a in plan.alternatives if a.strategy not in looked]
    return dataclasses.replace(chosen, estimate=estimate, alternatives=(*others, *rest))


def _estimate(plan: Plan, spec: ModelSpec, cluster: Cluster) -> dict[str, object]:
    found = evaluate(spec, plan.job, cluster, Candidates.of([plan.strategy]))
    return estimate_dict(spec, plan.job, cluster, found, 0)

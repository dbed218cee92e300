"""Tables for the terminal. `rich` is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from outlay.planner.cost import budget_s, kw_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Job
from outlay.planner.spec.plan import Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.units import format_bytes, format_count, format_seconds, format_usd

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


def table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return grid


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(key, value)
    return grid


def between(low: float, value: float, high: float, show: Any) -> str:
    """`12.3 s (9.0 s to 17.1 s)`."""
    return f"{show(value)} ({show(low)} to {show(high)})"


def cluster_rows(cluster: Cluster) -> list[tuple[str, str]]:
    """What a probe found, as label and text."""
    a = cluster.accelerator
    rows = [
        (
            "accelerators",
            f"{cluster.ranks} x {a.title}"
            + (f", {cluster.nodes} nodes of {cluster.ranks_per_node}" if cluster.nodes > 1 else ""),
        ),
        ("memory a rank", f"{format_bytes(cluster.usable_bytes)} usable"),
        ("link", f"{cluster.intra.kind}, {cluster.intra.bytes_per_s / 1e9:.3g} GB/s one way"),
    ]
    if cluster.inter is not None:
        rows.append(("network", f"{cluster.inter.bytes_per_s / 1e9:.3g} GB/s a rank one way"))
    if cluster.driver:
        rows.append(("driver", f"{cluster.driver}, CUDA {cluster.cuda}"))
    if host := cluster.host:
        rows += [
            (
                "host",
                f"{host.cpu_model}, {host.cores} cores usable, {', '.join(host.flags) or 'no vector flags'}",
            ),
            ("RAM", f"{format_bytes(host.ram_bytes)}, {format_bytes(host.available_bytes)} free"),
            ("disk", f"{format_bytes(host.disk_free_bytes)} free here"),
        ]
    if rates := cluster.rates:
        flops = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in rates.gemm_flops.items())
        rows.append(
            (
                "measured",
                f"a rank of {rates.ranks}: {flops}; memory {rates.memory_bytes_per_s / 1e9:.3g} GB/s",
            )
        )
        if rates.all_reduce:
            size, seconds = rates.all_reduce[-1]
            rows.append(("all-reduce", f"{format_bytes(size)} in {format_seconds(seconds)}"))
    price = cluster.price_usd_per_h
    rows.append(
        ("price", "unknown" if price is None else f"{price:.4g} USD/h ({cluster.price_source})")
    )
    return rows


def print_cluster(console: Console, cluster: Cluster) -> None:
    console.print(_pairs(cluster_rows(cluster)))
    for note in cluster.notes:
        console.print(f"note: {note}", style="dim", highlight=False)


def _parts_table(title: str, parts: dict[str, float], total: float, show: Any) -> RenderableType:
    grid = table(title, "", "share")
    for name, value in sorted(parts.items(), key=lambda kv: -kv[1]):
        if value > 0.0005 * total:
            grid.add_row(name.replace("_", " "), show(value), f"{value / total:.0%}")
    return grid


def memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """The phases of the run beside each other, and what it takes of the host and the disk."""
    phases = [
        f"{name} {format_bytes(value) if value is not None else 'unknown'}"
        for name, value in memory["phases"].items()
    ]

    def taken(total: int | None, parts: dict[str, int] | None) -> str:
        if total is None or parts is None:
            return "unknown"
        largest = sorted(parts.items(), key=lambda kv: -kv[1])
        of = ", ".join(f"{k.replace('_', ' ')} {format_bytes(v)}" for k, v in largest if v > 0)
        return f"{format_bytes(total)}: {of}"

    rows = [
        ("phases", ", ".join(phases)),
        ("host, a node", taken(memory["host_bytes"], memory["host_parts"])),
    ]
    if memory["nvme_bytes"]:
        rows.append(("NVMe, a node", format_bytes(memory["nvme_bytes"])))
    return [*rows, ("disk", taken(memory["disk_bytes"], memory["disk_parts"]))]


def changes_table(rows: list[dict[str, Any]]) -> RenderableType:
    """What would make it fit, one change a line."""
    grid = table("what would change it", "saves", "then", "verdict", "outlay run")
    for row in rows:
        grid.add_row(
            row["what"], format_bytes(row["saves_bytes"]), format_bytes(row["device_bytes"]),
            row["verdict"], "yes" if row["runs"] else "no",
        )  # fmt: skip
    return grid


def _besides(b: dict[str, Any]) -> str:
    """What the run takes besides its steps, in all and each."""
    whole = sum(
        b[n] * b[s] for n, s in (("evaluations", "evaluation_s"), ("checkpoints", "checkpoint_s"))
    )
    return (
        f"about {format_seconds(whole + b['export_s'])}: saves {b['checkpoints']} × "
        f"{format_seconds(b['checkpoint_s'])}, evaluations {b['evaluations']} × "
        f"{format_seconds(b['evaluation_s'])}, export {format_seconds(b['export_s'])}"
    )


def estimate_rows(e: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline of an estimate."""
    memory, step, run, cluster = e["memory"], e["step"], e["run"], e["cluster"]
    m = between(memory["low_bytes"], memory["device_bytes"], memory["high_bytes"], format_bytes)
    rows = [
        ("model", f"{e['model']['name']}, {format_count(e['model']['parameters'])} parameters"),
        ("strategy", Strategy(**e["strategy"]).label()),
        ("memory a rank", f"{m} of {format_bytes(cluster['usable_bytes'])}: {e['verdict']}, "
                          f"{e['oom_probability']:.1%} risk of running out"),
        ("peak", f"{memory['peak_phase']} phase, {memory['peak_rank']} rank"),
        *memory_rows(memory),
    ]  # fmt: skip
    if step is None:
        rows.append(("step time", "unknown"))
        return rows
    t = e["throughput"]
    steps, batch = run["steps"], run["tokens"] / run["steps"]
    low, high = step["low_s"], step["high_s"]
    speed = between(batch / high, t["tokens_per_s"], batch / low, lambda v: f"{v:,.0f}")
    duration = between(low * steps, run["time_s"], high * steps, format_seconds)
    rows += [
        ("step time", between(step["low_s"], step["time_s"], step["high_s"], format_seconds)),
        ("throughput", f"{speed} tokens/s" + (f", MFU {t['mfu']:.1%}" if t["mfu"] else "")),
        ("run", f"{steps:,} steps, {format_count(run['tokens'])} tokens, {duration}"),
        ("besides", _besides(run["besides"])),
    ]  # fmt: skip
    cost = run["cost_usd"]
    if cost is None:
        rows.append(("cost", "unknown: no price (--price-usd-per-h)"))
    else:
        shown = between(cost["low"], cost["expected"], cost["high"], format_usd)
        price = f"{cluster['price_usd_per_h']:,.4g} USD/h ({cluster['price_source']})"
        rows.append(("cost", f"{shown} at {price}"))
    if run["energy_kwh"] is not None:
        rows.append(("energy", energy_text(run)))
    return rows


def energy_text(run: dict[str, Any]) -> str:
    """`12.3 kWh (8.1 to 20.1)`, with the CO2e where the region is known."""

    def shown(what: str, unit: str, name: str) -> str:
        value, low, high = (run[f"{what}_{end}{unit}"] for end in ("", "low_", "high_"))
        return f"{value:,.3g} {name} ({low:,.3g} to {high:,.3g})"

    text = f"{shown('energy', 'kwh', 'kWh')} with server and cooling"
    if run["co2e_kg"] is not None:
        text += f"; {shown('co2e', 'kg', 'kg CO2e')}: {run['region']}"
    return text


def budget_rows(job: Job, cluster: Cluster, step_s: float | None) -> list[tuple[str, str]]:
    """For each budget, how much of the run it holds at the expected speed."""
    rows = []
    for budget in job.budget:
        limit_s = budget_s(budget, cluster, job)
        if limit_s is None:
            need = "a price (--price-usd-per-h)" if budget.kind == "money" else (
                "the power limit of the accelerators"
                if kw_of(cluster, job) is None else "the region of the electricity (--region)"
            )  # fmt: skip
            text = f"{budget}: cannot be compared, it needs {need}"
        elif step_s is None:
            text = f"{budget}: cannot be compared, the step time is unknown"
        else:
            held = int(limit_s / step_s)
            text = f"{budget} holds about {held:,} steps"
            if held < job.steps:
                text += f" of {job.steps:,}: THE RUN WILL STOP AT THE BUDGET"
            else:
                text += f", the run has {job.steps:,}"
            text += " (set-up, evaluation and saves not counted)"
        rows.append(("budget", text))
    return rows


def print_estimate(console: Console, e: dict[str, Any], budgets: list[tuple[str, str]]) -> None:
    """Headline, parts of memory and time, assumptions."""
    console.print(_pairs([*estimate_rows(e), *budgets]))
    memory, step = e["memory"], e["step"]
    console.print(
        _parts_table("memory at the peak", memory["parts"], memory["device_bytes"], format_bytes)
    )
    if e["changes"]:
        console.print(changes_table(e["changes"]))
    if step is not None:
        console.print(_parts_table("time of a step", step["parts"], step["time_s"], format_seconds))
    print_assumptions(console, e["assumptions"])


def print_assumptions(console: Console, rows: list[dict[str, Any]]) -> None:
    """Defaults and notes a line each; figures that nobody measured, together."""
    if not rows:
        return
    console.print("assumed (intervals in parentheses above are 90 %):", style="bold")
    guesses = [row for row in rows if str(row["source"]).startswith("guess:")]
    for row in rows:
        if row not in guesses:
            value = "" if row["value"] is None else f" = {row['value']}"
            console.print(f"  {row['what']}{value}: {row['source']}", style="dim", highlight=False)
    if guesses:
        names = ", ".join(f"{row['what']} {row['value']:.3g}" for row in guesses)
        console.print(
            f"  guessed, not measured (sources: --format json): {names}",
            style="dim",
            highlight=False,
        )


def gain_text(plan: Plan) -> str:
    """What limits the plan, and what twice as much of each thing would give."""
    helping = [g for g in plan.gains if g.faster >= 0.005]
    if not helping:
        return "nothing that money buys would make it faster; the trainer's own work sets the pace"
    texts = []
    for g in helping:
        text = f"{g.change}: {g.faster:.0%} faster"
        texts.append(text + (f" ({g.strategy})" if g.strategy else ""))
    return f"{plan.limited_by}. " + " · ".join(texts)


def exported_text(compression: dict[str, Any]) -> str:
    """`int4:g32, 810 MiB; dense 2.30 GiB, int8 …`: what `outlay export` will write, and could."""
    after = [c for c in compression["choices"] if not c["trained_for"]]
    sizes = ", ".join(
        f"{'dense' if c['quantize'] == 'none' else c['quantize']} {format_bytes(c['bytes'])}"
        for c in after
    )
    dearer = [_training_text(c, after[0]) for c in compression["choices"] if c["trained_for"]]
    trained = f"; trained for it: {', '.join(dearer)}" if dearer else ""
    limit = compression["limit_bytes"]
    within = "" if limit is None else f" (of {format_bytes(limit)} allowed)"
    name = "dense" if compression["quantize"] == "none" else compression["quantize"]
    return (
        f"{name}, {format_bytes(compression['export_bytes'])}{within}; could be {sizes}{trained}; "
        "what it loses is unknown before: outlay eval measures it"
    )


def _training_text(choice: dict[str, Any], plain: dict[str, Any]) -> str:
    """`int8-dynamic in about 1.4 times the time (12.30 USD more)`: steps with quantization-aware training."""
    if choice["steps_s"] is None or not plain["steps_s"]:
        return f"{choice['quantize']} in an unknown time"
    text = (
        f"{choice['quantize']} in about {choice['steps_s'] / plain['steps_s']:.1f} times the time"
    )
    if choice["steps_usd"] is None:
        return text
    return f"{text} ({format_usd(choice['steps_usd'] - plain['steps_usd'])} more)"


def caching_rows(compression: dict[str, Any]) -> list[tuple[str, str]]:
    """What a teacher's kept logits take before the first step, where some are kept."""
    if not compression["cached_logits_bytes"]:
        return []
    seconds, usd = compression["caching_s"], compression["caching_usd"]
    took = "an unknown time" if seconds is None else f"about {format_seconds(seconds)}"
    cost = "" if usd is None else f", {format_usd(usd)}"
    size = format_bytes(compression["cached_logits_bytes"])
    return [("teacher", f"its logits before the first step: {took}{cost}; {size} on disk")]


def print_plan(console: Console, plan: Plan, *, out: str | None) -> None:
    from outlay.planner.space import TARGETS

    step = plan.estimate["step"]
    step_s = None if step is None else float(step["time_s"])
    rows = estimate_rows(plan.estimate) + budget_rows(plan.job, plan.cluster, step_s)
    if plan.job.compress is not None and plan.job.compress.label():
        rows.append(("compressed", plan.job.compress.label()))
    if plan.estimate.get("compression"):
        rows.append(("exported", exported_text(plan.estimate["compression"])))
        rows += caching_rows(plan.estimate["compression"])
    rows.append(("for", f"{plan.target}: {TARGETS[plan.target].says}"))
    if plan.gains:
        rows.append(("limited by", gain_text(plan)))
    console.print(_pairs(rows))
    legal = "" if plan.legal is None else f" {plan.legal:,} allowed,"
    console.print(
        f"{plan.considered:,} strategies looked at,{legal} {plan.feasible:,} fit. The next:",
        highlight=False,
    )
    grid = table("strategy", "step", "memory", "verdict", "why not")
    grid.columns[-1].justify = "left"
    for other in plan.alternatives:
        grid.add_row(
            other.strategy.label(),
            "?" if other.step_s is None else format_seconds(other.step_s),
            "?" if other.device_bytes is None else format_bytes(other.device_bytes),
            other.verdict,
            other.why,
        )
    console.print(grid)
    print_assumptions(console, plan.estimate["assumptions"])
    if out:
        done = f"Next: outlay run {out}" if plan.target == "runner" else (
            f"Next: outlay emit {'trainer' if plan.job.finetune is None else 'axolotl'} {out} --out FOLDER "
            "(`outlay emit --help`: other trainers, launchers)"
            if plan.target == "trainer" else
            f"`outlay run` does not execute it: `outlay emit deepspeed {out}` for a trainer of your own"
            if plan.target == "deepspeed" else "Neither DeepSpeed nor `outlay run` executes it."
        )  # fmt: skip
        console.print(f"Plan written to {out}. {done}", highlight=False)

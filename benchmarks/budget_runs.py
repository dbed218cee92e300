"""How much of a budget do real runs use? Never above it, and how far below, part by part.

    python -m benchmarks.budget_runs run --out DIR [--case 0 …] [--small] [--at-once N]
    python -m benchmarks.budget_runs show RUN [RUN …]      what finished runs used

Each case is run once, under `outlay run` on two ranks: the demo's model and text, or with --small a model of
0.7 M parameters, whose steps are short. --at-once runs several together, each disturbed by the others.
Times are taken from outside as well: from the start of the command until it has ended, which is what a
provider would see.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

POWER_W, PUE, CARBON = 200.0, 1.2, 0.4
PRICE = 0.10
"""USD/h, as in the demo."""
RANKS = 2


def _kwh(seconds: float) -> float:
    """Of so many seconds with all cores busy."""
    return POWER_W * PUE / 1e3 * seconds / 3600


CASES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("75s",), "anneal"),
    ((f"{PRICE * 80 / 3600:.6f}usd",), "anneal"),
    ((f"{RANKS * 85 / 3600:.6f}gpuh",), "cut"),
    ((f"{_kwh(75):.6f}kWh",), "anneal"),
    ((f"{_kwh(80) * CARBON:.6f}kgCO2e",), "cut"),
    (("1usd", "90s", f"{_kwh(85):.6f}kWh"), "anneal"),
    (("100s",), "cut"),
    ((f"{PRICE * 95 / 3600:.6f}usd", "1h", "1gpuh"), "cut"),
    ((f"{RANKS * 90 / 3600:.6f}gpuh", "100s"), "anneal"),
    ((f"{PRICE * 90 / 3600:.6f}usd", f"{_kwh(100):.6f}kWh"), "anneal"),
    (("95s", "1kWh", "1kgCO2e"), "ask"),
    ((f"{PRICE * 100 / 3600:.6f}usd",), "ask"),
)
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}


@click.group()
def main() -> None:
    """Real runs under budgets."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--case", "cases", type=click.IntRange(0, len(CASES) - 1), multiple=True)
@click.option("--small", is_flag=True, help="Another model than the demo's: short steps.")
@click.option("--at-once", default=1, show_default=True)
def run(out: Path, cases: tuple[int, ...], small: bool, at_once: int) -> None:
    """Run the cases that are not there yet."""
    from benchmarks.anneal import long_plan
    from outlay.runner.commands import demo

    config = {**demo.CONFIG, **SMALL} if small else None
    plan = long_plan(out, seed=0, budget="1h", global_batch=4, config=config)
    chosen = cases or range(len(CASES))
    folders = {case: out / f"case-{case}" for case in chosen}
    with ThreadPoolExecutor(at_once) as pool:
        todo = [c for c, folder in folders.items() if not (folder / "outcome.json").exists()]
        for _ in pool.map(lambda case: _run(plan, folders[case], *CASES[case]), todo):
            pass
    for folder in folders.values():
        click.echo(_line(folder))


def _run(plan: Path, folder: Path, budgets: tuple[str, ...], policy: str) -> None:
    command = [sys.executable, "-m", "outlay.runner", "run", str(plan), "--dir", str(folder)]
    command += [word for budget in budgets for word in ("--budget", budget)]
    command += ["--power-w", str(POWER_W), "--pue", str(PUE), "--kgco2e-per-kwh", str(CARBON)]
    command += ["--when-over", policy, "--yes", "--quiet", "--ledger", "off"]
    began_s = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    took_s = time.monotonic() - began_s
    if code != 4:
        raise click.ClickException(f"{folder} ended with exit code {code}")
    (folder / "outside.json").write_text(json.dumps({"took_s": took_s}) + "\n")


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
def show(runs: tuple[Path, ...]) -> None:
    """What each used of its budget, and where the rest was kept."""
    for folder in runs:
        click.echo(_line(folder))
    used = [_used(folder)[0] for folder in runs]
    click.echo(
        f"{len(used)} runs: median {statistics.median(used):.2%}, "
        f"least {min(used):.2%}, most {max(used):.2%}"
    )


def _used(folder: Path) -> tuple[float, float]:
    """(part of the budget that ends first, seconds of it that are left at this speed of spending)."""
    from outlay.runner.budget import Spent, amount_of
    from outlay.runner.folder import RunFolder

    outcome = json.loads((folder / "outcome.json").read_text())
    plan = RunFolder(folder).read_plan()
    spent = Spent(
        wall_s=outcome["wall_s"],
        cost_usd=outcome["cost_usd"],
        gpu_hours=outcome["wall_s"] / 3600 * plan.cluster.ranks,
        fraction=None,
        energy_kwh=outcome["energy_kwh"],
        co2e_kg=outcome["co2e_kg"],
    )
    used = max(amount_of(budget, spent) / budget.amount for budget in plan.job.budget)
    return used, outcome["wall_s"] * (1 / used - 1)


def _line(folder: Path) -> str:
    from outlay.runner.events import read_events
    from outlay.runner.folder import RunFolder

    run_folder = RunFolder(folder)
    events = list(read_events(run_folder.events))
    at = {event.kind: event for event in events}
    stop_s, end_s = at["stop"].elapsed_s, at["end"].elapsed_s
    used, left_s = _used(folder)
    steps = [float(e.data["step_s"]) for e in events if e.kind == "step"]
    outside = folder / "outside.json"
    took = (
        f", {json.loads(outside.read_text())['took_s']:.1f} s outside" if outside.exists() else ""
    )
    parts = [
        f"{kind} {at[kind].data[f'{kind}_s']:.2f}"
        for kind in ("save", "eval", "export")
        if kind in at
    ]
    kept = ", ".join(f"{name} {s:.2f}" for name, s in at["stop"].data.get("kept_s", {}).items())
    budgets = " and ".join(str(b) for b in run_folder.read_plan().job.budget)
    return (
        f"{folder.name}: {budgets} {run_folder.read_limits().when_over}: {used:.2%}, "
        f"{left_s:.2f} s left of {end_s + left_s:.1f}{took}; {len(steps)} steps of "
        f"{statistics.median(steps) * 1e3:.0f} ms (longest of the last 50 "
        f"{max(steps[-50:]) * 1e3:.0f}); kept at the stop {end_s + left_s - stop_s:.2f} s ({kept}), used "
        f"{end_s - stop_s:.2f}: {', '.join(parts)}"
    )


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option(
    "--limit-s", "limits_s", type=float, multiple=True, default=(60.0, 75.0, 100.0, 120.0)
)
def replay(runs: tuple[Path, ...], limits_s: tuple[float, ...]) -> None:
    """Where runs that took longer would have ended under these limits, from the times in their events.

    Computed, not run: what the room for the end is at today's bounds, without another machine's noise.
    """
    for folder in runs:
        for limit_s in limits_s:
            click.echo(f"{folder.name} under {limit_s:g} s: {_replayed(folder, limit_s)}")


def _replayed(folder: Path, limit_s: float) -> str:
    from outlay.runner.budget import Bounds
    from outlay.runner.events import read_events
    from outlay.runner.rehearsal import EVALUATION_MARGIN, TRIED_BATCHES

    events = list(read_events(folder / "events.jsonl"))
    at = {event.kind: event for event in events}
    took_s = {kind: float(at[kind].data[f"{kind}_s"]) for kind in ("save", "eval", "export")}
    shutdown_s = at["end"].elapsed_s - max(at[kind].elapsed_s for kind in took_s)
    bounds = Bounds(step_guess_s=0.0, parameters=0, write_bytes_per_s=1.0)
    bounds.export.add(took_s["export"])
    bounds.evaluate.guess((1 + EVALUATION_MARGIN / TRIED_BATCHES**0.5) * took_s["eval"] + 0.05)
    steps = 0
    for event in events:
        if event.kind == "save":
            bounds.save.add(float(event.data["save_s"]))
        elif event.kind == "step":
            steps += 1
            bounds.step.add(float(event.data["step_s"]))
            if steps == 6:
                bounds.step.forget_first(3)
            room_s = bounds.finish_s() + bounds.step.upper_s()
            if steps > 6 and limit_s - event.elapsed_s < room_s:
                end_s = event.elapsed_s + sum(took_s.values()) + shutdown_s
                return f"{end_s / limit_s:.2%}, {limit_s - end_s:.2f} s left"
    return "it ended earlier"


if __name__ == "__main__":
    main()

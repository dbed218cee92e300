"""What a calibration came to: figures with their intervals, widths of the intervals of step time, a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from outlay.planner.calibrate import Calibration, apply, priors
from outlay.planner.estimate.candidates import Array
from outlay.planner.estimate.efficiency import architecture_of

_Z90 = 1.645
ONE_MACHINE = 2.5
"""Residuals on the one CPU that was measured say little of another, nor of one that is busy with
other work: the interval is that many times as wide."""
SOURCES_A_REGIME = 3
"""From so many sources on, an architecture has an interval of its own."""
ROWS_A_REGIME = 20


def _entry(value: float, low: float, high: float, kind: str, source: str) -> dict[str, Any]:
    return {
        "value": float(f"{value:.4g}"),
        "low": float(f"{low:.4g}"),
        "high": float(f"{high:.4g}"),
        "kind": kind,
        "source": source,
    }


def fitted_figures(c: Calibration, what: str) -> dict[str, dict[str, dict[str, Any]]]:
    """File → figure → entry. A more particular file holds the sum of the deviations above it.

    A figure is `fitted` where the data took away at least a tenth of the prior's variance; else
    it stays what the prior was, a guess.
    """
    kind = "cpu" if c.rows[0].case.cluster.kind == "cpu" else "gpu"
    believed = priors(kind)
    index = {(p.figure, p.where): i for i, p in enumerate(c.params)}
    architecture = {
        r.case.cluster.accelerator.name: architecture_of(r.case.cluster.accelerator) for r in c.rows
    }
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for p in c.params:
        chain = {kind, p.where, architecture.get(p.where, "")}
        used = [index[p.figure, where] for where in chain if (p.figure, where) in index]
        shift = float(sum(c.fit.theta[i] for i in used))
        width = _Z90 * float(np.sqrt(sum(c.fit.deviation[i] ** 2 for i in used)))
        generation = architecture.get(p.where, p.where)
        low, value, high = (
            float(apply(believed[p.figure], shift + d, generation)) for d in (-width, 0.0, width)
        )
        learned = max(float(c.fit.determined[i]) for i in used)
        prior = believed[p.figure]
        source = f"{what}; determined {learned:.0%}; prior {prior.value:g}: {prior.source}"
        label = "fitted" if learned >= 0.1 else "guess"
        found[p.where][p.figure] = _entry(value, low, high, label, source)
    for name, prior in believed.items():
        shift = float(c.fit.theta[index[name, kind]])
        width = _Z90 * float(
            np.hypot(prior.architecture or 0.0, c.fit.deviation[index[name, kind]])
        )
        for generation in prior.centres.keys() - set(architecture.values()):
            low, value, high = (
                float(apply(prior, shift + d, generation)) for d in (-width, 0.0, width)
            )
            source = f"{prior.source}; moved by what other generations showed, {what}"
            found[generation][name] = _entry(value, low, high, "published", source)
    return found


def conformal_width(residual: Array, sources: Array, coverage: float = 0.90) -> float:
    """Half width w such that [x/(1+w), x·(1+w)] covered that share of the rows left out.

    A source of n rows weighs √n: its rows err together.
    """
    _, inverse, counts = np.unique(sources, return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(counts[inverse])
    order = np.argsort(np.abs(residual))
    share = np.cumsum(weight[order]) / weight.sum()
    rank = min(int(np.searchsorted(share, coverage)), len(order) - 1)
    return float(np.expm1(np.abs(residual)[order][rank]))


def regimes(c: Calibration, without: str = "") -> dict[str, Array]:
    """Architectures that at least SOURCES_A_REGIME sources measured → their rows; `gpu` → all the
    other rows (all there are where these are few)."""
    name = np.array([architecture_of(r.case.cluster.accelerator) for r in c.rows])
    source = np.array([r.source for r in c.rows])
    usable = source != without
    found = {}
    for a in sorted(map(str, set(name))):
        here = (name == a) & usable
        if len(set(source[here])) >= SOURCES_A_REGIME:
            found[a] = here
    rest = usable & ~np.isin(name, list(found))
    found["gpu"] = rest if rest.sum() >= ROWS_A_REGIME else usable
    return found


def interval_widths(c: Calibration, without: str = "") -> dict[str, float]:
    """Efficiency file → half width of the 90 % interval there."""
    source = np.array([r.source for r in c.rows])
    return {
        where: conformal_width(c.left_out[rows], source[rows])
        for where, rows in regimes(c, without).items()
    }


def coverage(c: Calibration) -> tuple[float, float, float]:
    """(rows covered, mean over sources, median half width) of intervals that never saw the source."""
    name = np.array([architecture_of(r.case.cluster.accelerator) for r in c.rows])
    source = np.array([r.source for r in c.rows])
    covered, width = np.zeros(len(source), bool), np.zeros(len(source))
    for s in set(source):
        widths = interval_widths(c, without=s)
        here = source == s
        width[here] = [widths.get(a, widths["gpu"]) for a in name[here]]
        covered[here] = np.abs(c.left_out[here]) <= np.log1p(width[here])
    by_source = np.mean([covered[source == s].mean() for s in sorted(set(source))])
    return float(covered.mean()), float(by_source), float(np.median(width))


def report(c: Calibration) -> str:
    """Errors by source, and what the parameters came to."""
    sources = np.array([r.source for r in c.rows])
    lines = ["source, rows, median error fitted / left out, 90th percentile fitted / left out"]
    medians = []
    for name in sorted(set(sources)):
        here = sources == name
        fit, out = (np.abs(np.expm1(-r[here])) for r in (c.residual, c.left_out))
        medians.append((np.median(fit), np.median(out)))
        lines.append(
            f"{name[:48]:<48} {here.sum():>4}  {np.median(fit):6.1%} {np.median(out):6.1%}"
            f"   {np.quantile(fit, 0.9):6.1%} {np.quantile(out, 0.9):6.1%}"
        )
    mean = np.mean(medians, axis=0)
    lines.append(f"mean of the medians: fitted {mean[0]:.1%}, source left out {mean[1]:.1%}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures by efficiency file, ready to be written, and the lines that a person reads."""

    figures: dict[str, dict[str, dict[str, Any]]]
    text: str


def outcome(c: Calibration, what: str) -> Outcome:
    """`what`: the source of the figures, in words."""
    figures = fitted_figures(c, what)
    lines = [report(c)]
    if c.rows[0].case.cluster.kind == "cpu":
        found = conformal_width(c.residual, np.array([r.source for r in c.rows]))
        widths, key = {"cpu": ONE_MACHINE * found}, "interval.step_fraction_measured_rates"
        how = (
            f"{ONE_MACHINE} times the 90th percentile of the fit's own residuals: one machine only"
        )
    else:
        widths, key = interval_widths(c), "interval.step_fraction_datasheet"
        how = "split conformal, source left out"
        covered, means, half = coverage(c)
        lines.append(
            f"covered, source left out: {covered:.1%} of rows, {means:.1%} mean over sources; "
            f"median half width {half:.1%}"
        )
    lines.append("")
    lines.append("figure: value (90 % interval), how well the data determine it")
    for where, entries in figures.items():
        lines += [
            f"{where:<22} {name:<40} {e['value']:<10} ({e['low']} to {e['high']}) {e['kind']}, "
            + _determined(e["source"])
            for name, e in entries.items()
        ]
    for where, width in widths.items():
        figures.setdefault(where, {})[key] = _entry(
            width, width / 2, width * 2, "fitted", f"{how}; {what}"
        )
        lines.append(f"{where:<22} {key:<40} {width:.3g} ({how})")
    return Outcome(figures=figures, text="\n".join(lines))


def _determined(source: str) -> str:
    """The part of a fitted figure's source that says so; the others moved with their relatives."""
    found = [part.strip() for part in source.split(";") if part.strip().startswith("determined")]
    return found[0] if found else "by relatives alone"


def figures_text(name: str, figures: Mapping[str, Mapping[str, Any]], before: str) -> str:
    """The YAML of one efficiency file: `figures` over those of the text `before`; its comment lines stay."""
    head = "".join(line for line in before.splitlines(True) if line.startswith("#"))
    head = head or f"# Figures fitted for {name} by `outlay calibrate`.\n"
    merged = dict((yaml.safe_load(before) or {}).get("figures", {})) | dict(figures)
    lines = [head.rstrip("\n"), "schema: outlay/efficiency@1", "figures:"]
    for key, entry in merged.items():
        body = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000)
        lines.append(f"  {key}:\n    {body.strip()}")
    return "\n".join(lines) + "\n"

"""How the answer of `outlay size` is shown: a table for a person, csv and md for a program or a page."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from outlay.planner.report.terminal import table
from outlay.planner.space import TARGETS
from outlay.profiles.units import GIB, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

STALE = "!"
"""Marks a price that is undated or older than 90 days."""
CSV_COLUMNS = (
    "option", "tags", "offer", "region", "accelerator", "accelerators", "nodes", "terms", "usd_per_h",
    "price_date", "label", "precision", "device_gib", "low_gib", "high_gib", "usable_gib", "oom_probability",
    "tokens_per_s", "hours", "hours_low", "hours_high", "usd", "usd_low", "usd_high", "limited_by",
)  # fmt: skip


def _number(v: float) -> str:
    if v >= 1e7:
        return format_count(v)
    if v >= 100:
        return f"{v:,.0f}"
    return f"{v:.2f}" if v < 1 else f"{v:.1f}"


def _range(value: dict[str, float] | None) -> str:
    if value is None:
        return "unknown"
    return f"{_number(value['expected'])} ({_number(value['low'])}-{_number(value['high'])})"


def _hours(value: dict[str, float]) -> str:
    """Hours, or days from four of them."""
    if value["expected"] < 96:
        return _range(value) + " h"
    return _range({k: v / 24 for k, v in value.items()}) + " d"


def stale(option: dict[str, Any]) -> bool:
    """Undated or older than 90 days; one's own price has no age."""
    if option["usd_per_h"] is None or option["price_source"].startswith("--"):
        return False
    age = option["price_age_days"]
    return age is None or age > 90


def headline(a: dict[str, Any]) -> str:
    """What was asked, in one line."""
    job, model, looked = a["job"], a["model"], a["looked"]
    tokens = job["steps"] * job["global_batch"] * job["seq_len"]
    method = "all weights trained" if job["finetune"] is None else (
        f"{job['finetune']['method']} rank {job['finetune']['rank']}"
        + ("" if job["finetune"]["quant"] == "none" else f" over {job['finetune']['quant']}")
    )  # fmt: skip
    return (
        f"{model['name']} · {format_count(model['parameters'])} parameters, {method}, {job['precision']}, "
        f"{job['optimizer']['name']} · {format_count(tokens)} tokens · {job['global_batch']:,} seq of "
        f"{job['seq_len']:,} a step, {job['steps']:,} steps · {looked['fitting']:,} of "
        f"{looked['strategies']:,} strategies fit, {looked['sized']:,} of {looked['points']:,} sizes of "
        "hardware looked at (bounds rule out the rest) · in ( ): "
        "memory 90 %; time and money with every assumption at its end, wider than 90 %"
    )


def _terms(option: dict[str, Any]) -> str:
    price = option["usd_per_h"]
    if price is None:
        return "no price"
    mark = f" {STALE}" if stale(option) else ""
    return f"{option['terms'].replace('_', ' ')} {price:,.4g}/h{mark}"


def _price(option: dict[str, Any]) -> str:
    price = option["usd_per_h"]
    if price is None:
        return "no price"
    return f"{STALE + ' ' if stale(option) else ''}{price:,.4g} an hour"


NARROW = 100
"""Columns; below that the table leaves out tokens/s and the interval of memory."""


def print_options(console: Console, a: dict[str, Any]) -> None:
    """Three lines an option: hardware, seller and strategy beside its figures."""
    narrow = console.width < NARROW
    usd = "total USD"
    if a["limits"]["usd"]:
        usd += f"\n(your {a['limits']['usd']:,.0f})"
    middle = ["GiB"] if narrow else ["GPU peak GiB\n(of usable)", "tokens/s"]
    grid = table("option", *middle, "time", usd, "limited by\nOOM risk")
    for column in grid.columns[1:]:
        column.no_wrap = True
    for o in a["options"]:
        grid.add_row(*_option_cells(o, a["job"]["precision"], narrow))
    for row in _losers(a)[:4]:
        grid.add_row(*_loser_cells(row, narrow))
    console.print(grid)


def _option_cells(o: dict[str, Any], precision: str, narrow: bool) -> list[str]:
    m = o["memory"]
    other = "" if o["precision"] == precision else f" {o['precision']}"
    between = "" if narrow else f" ({m['low_bytes'] / GIB:.0f}-{m['high_bytes'] / GIB:.0f})"
    peak = f"{m['device_bytes'] / GIB:.0f}{between}\n/{m['usable_bytes'] / GIB:.3g}"
    hardware = f"{o['option']} {o['accelerators']:,} x {o['accelerator']}"
    lines = [f"{hardware} {o['terms'].replace('_', ' ')}", o["offer"], f"{o['label']}{other}"]
    cells = [peak] if narrow else [peak, f"{o['tokens_per_s']:,.0f}"]
    time = _hours(o["hours"]).replace(" (", "\n(")
    money = _range(o["usd"]).replace(" (", "\n(")
    return [
        "\n".join(lines), *cells, time, f"{money}\n{_price(o)}",
        f"{o['limited_by']}\n{o['oom_probability']:.1%}",
    ]  # fmt: skip


def _loser_cells(row: dict[str, Any], narrow: bool) -> list[str]:
    peak = ""
    if row["device_bytes"] is not None:
        peak = f"{row['device_bytes'] / GIB:.0f}/{(row['usable_bytes'] or 0) / GIB:.3g}"
    hours = "–" if row["hours"] is None else format_seconds(row["hours"] * 3600)
    money = "–" if row["usd"] is None else _number(row["usd"])
    risk = "" if row["risk"] is None else f", {row['risk']:.0%}"
    count = f"{row['accelerators']:,} x " if row["accelerators"] else ""
    cells = [peak] if narrow else [peak, "–"]
    return [f"– {count}{row['accelerator']}", *cells, hours, money, f"{row['constraint']}{risk}"]


def _losers(a: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that would surprise first: what does not fit or breaks a limit, then what is only beaten."""
    order = {"memory": 0, "deadline": 1, "budget": 1, "energy": 1, "carbon": 1, "gpu_hours": 1}
    return sorted(a["losers"], key=lambda r: order.get(r["constraint"], 2))


_GROUPS = 5


def _grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Losers with the same reason together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["why"], []).append(row)
    return list(groups.values())


def verdict_lines(a: dict[str, Any]) -> list[str]:
    """Which is which, why the others lost, what limits the first, what would change the answer."""
    terms = {o["option"]: " (spot)" if o["terms"] == "spot" else "" for o in a["options"]}
    lines = [
        f"Cheapest {a['cheapest']}{terms[a['cheapest']]} · fastest {a['fastest']}{terms[a['fastest']]} · "
        f"recommended {a['recommended']} "
        f"({OBJECTIVE_SAYS[a['objective']]}). For {a['target']}: {TARGETS[a['target']].says}."
    ]
    first = a["options"][0]
    limit = a["limits"]["usd"]
    if limit and first["usd"] and 3 * first["usd"]["expected"] <= limit:
        lines.append(
            "Money is not your limit: three attempts at A cost about "
            f"{3 * first['usd']['expected']:,.0f} USD."
        )
    if a["objective"] in ("energy", "carbon"):
        emitted = first["co2e_kg"]
        lines.append(
            f"A takes {first['energy_kwh']:,.4g} kWh (accelerators' power limit × assumed load × PUE)"
            + ("" if emitted is None else f", {emitted:,.4g} kg CO2e")
            + "; hosts not counted."
        )
    helping = [g for g in first["gains"] if g["faster"] >= 0.005]
    if helping:
        lines.append(
            f"A is limited by {first['limited_by']}. "
            + " · ".join(f"{g['change']}: {g['faster']:.0%} faster" for g in helping)
        )
    groups = _grouped(_losers(a))
    for rows in groups[:_GROUPS]:
        change = next((r for r in rows if r["change"]), None)
        needs = f" {change['accelerator']} needs {change['change']}." if change else ""
        lines.append(f"{', '.join(r['accelerator'] for r in rows)}: {rows[0]['why']}.{needs}")
    rest = sum(len(rows) for rows in groups[_GROUPS:])
    if rest > 0:
        lines.append(f"{rest} more accelerators lost: --format json says why.")
    if a["unpriced"]:
        lines.append("No price in the catalog: " + ", ".join(a["unpriced"]) + ".")
    if a["included"]:
        lines.append(f"Included: {', '.join(a['included'])}.  Not: {', '.join(a['not_included'])}.")
    if a["changes_most"]:
        lines.append(
            "Changes the answer most: " + " · ".join(c["says"] for c in a["changes_most"][:4])
        )
    if a["nearest"]:
        n = a["nearest"][0]
        lines.append(
            f"Nearest measured: {n['what']} ({n['source']}): {format_seconds(n['measured'])}, predicted "
            f"{format_seconds(n['predicted'])}."
        )
    old = {o["offer"].split("/")[0]: o for o in a["options"] if stale(o)}
    if old:
        texts = [
            f"{name} "
            + ("undated" if o["price_date"] is None else f"{o['price_age_days']} days old")
            + f" {STALE}"
            for name, o in old.items()
        ]
        lines.append("Prices: " + " · ".join(texts) + " → outlay catalog refresh")
    return lines


OBJECTIVE_SAYS = {
    "balanced": "least money × time at a steady price",
    "cheapest": "the least money within the limits, at a steady price",
    "fastest": "the least time within the limits, at a steady price",
    "energy": "the least energy",
    "carbon": "the least CO2e",
}


def print_size(console: Console, a: dict[str, Any], *, out: str | None) -> None:
    """The whole answer for a person."""
    if a["scaling"]:
        console.print(a["scaling"]["says"], highlight=False)
    console.print(headline(a), highlight=False)
    print_options(console, a)
    for line in verdict_lines(a):
        console.print(line, highlight=False)
    for row in a["assumptions"]:
        value = "" if row["value"] is None else f" = {row['value']}"
        console.print(
            f"  assumed: {row['what']}{value}: {row['source']}", style="dim", highlight=False
        )
    if out:
        follow = (
            "Next: outlay plan A --out plan.yaml"
            if a["target"] == "runner"
            else f"Written to {out}."
        )
        console.print(follow, highlight=False)


def flat_rows(a: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an option, for csv and md."""
    rows = []
    for o in a["options"]:
        m, usd = o["memory"], o["usd"] or {}
        rows.append(
            {k: o.get(k) for k in CSV_COLUMNS}
            | {
                "tags": " ".join(o["tags"]), "device_gib": f"{m['device_bytes'] / GIB:.2f}",
                "low_gib": f"{m['low_bytes'] / GIB:.2f}", "high_gib": f"{m['high_bytes'] / GIB:.2f}",
                "usable_gib": f"{m['usable_bytes'] / GIB:.2f}", "tokens_per_s": f"{o['tokens_per_s']:.0f}",
                "hours": f"{o['hours']['expected']:.4g}", "hours_low": f"{o['hours']['low']:.4g}",
                "hours_high": f"{o['hours']['high']:.4g}",
                "usd": "" if not usd else f"{usd['expected']:.2f}",
                "usd_low": "" if not usd else f"{usd['low']:.2f}",
                "usd_high": "" if not usd else f"{usd['high']:.2f}",
            }
        )  # fmt: skip
    return rows


def to_csv(a: dict[str, Any]) -> str:
    """Columns as listed in CSV_COLUMNS."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows(a))
    return buffer.getvalue()


def to_md(a: dict[str, Any]) -> str:
    """A Markdown table with the lines that go with it."""
    head = "| | hardware | price | strategy | GiB of usable | tokens/s | time | total USD | limited by | OOM risk |"
    rows = [headline(a), "", head, "|---|---|---|---|---|---|---|---|---|---|"]
    for o in a["options"]:
        m = o["memory"]
        rows.append(
            f"| {o['option']} | {o['accelerators']:,} x {o['accelerator']}, {o['offer']} | {_terms(o)} | "
            f"{o['label']} | {m['device_bytes'] / GIB:.0f}/{m['usable_bytes'] / GIB:.3g} | "
            f"{o['tokens_per_s']:,.0f} | {_hours(o['hours'])} | {_range(o['usd'])} | {o['limited_by']} | "
            f"{o['oom_probability']:.1%} |"
        )
    return "\n".join([*rows, "", *(f"- {line}" for line in verdict_lines(a))]) + "\n"

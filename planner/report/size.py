"""How the answer of `outlay size` is shown: a table for a person, csv and md for a program or a page."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from outlay.planner.project_cost import YEAR_H
from outlay.planner.report.terminal import table
from outlay.planner.space import TARGETS
from outlay.profiles.money import shown
from outlay.profiles.units import GIB, format_count, format_seconds, format_usd

if TYPE_CHECKING:
    from rich.console import Console

STALE = "!"
"""Marks a price that is undated or older than 90 days."""
CSV_COLUMNS = (
    "option", "tags", "offer", "region", "accelerator", "accelerators", "nodes", "terms", "usd_per_h",
    "price_date", "purchase_usd", "label", "precision", "device_gib", "low_gib", "high_gib", "usable_gib",
    "oom_probability",
    "tokens_per_s", "hours", "hours_low", "hours_high", "usd", "usd_low", "usd_high", "energy_kwh", "co2e_kg",
    "limited_by",
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


def _money(value: dict[str, float] | None) -> str:
    """In the currency that is shown."""
    return _range(value and {k: v / shown().usd for k, v in value.items()})


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
        "hardware looked at (bounds rule out the rest) · 90 % intervals in ( )"
    )


def _terms(option: dict[str, Any]) -> str:
    return f"{option['terms'].replace('_', ' ')} {_price(option)}"


def _price(option: dict[str, Any]) -> str:
    price = option["usd_per_h"]
    if price is None:
        return "no price"
    mark = STALE + " " if stale(option) else ""
    if option["purchase_usd"] is not None:
        return f"{mark}{_number(option['purchase_usd']['expected'] / shown().usd)} to buy"
    if option["terms"] == "reserved":
        return f"{mark}{_number(price * YEAR_H / shown().usd)} a year"
    return f"{mark}{price / shown().usd:,.4g} an hour"


NARROW = 100
"""Columns; below that the table leaves out tokens/s and the interval of memory."""


def print_options(console: Console, a: dict[str, Any]) -> None:
    """Three lines an option: hardware, seller and strategy beside its figures."""
    narrow = console.width < NARROW
    usd = f"total {shown().name}"
    if a["limits"]["usd"]:
        usd += f"\n(your {_number(a['limits']['usd'] / shown().usd)})"
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
    money = _money(o["usd"]).replace(" (", "\n(")
    return [
        "\n".join(lines), *cells, time, f"{money}\n{_price(o)}",
        f"{o['limited_by']}\n{o['oom_probability']:.1%}",
    ]  # fmt: skip


def _loser_cells(row: dict[str, Any], narrow: bool) -> list[str]:
    peak = ""
    if row["device_bytes"] is not None:
        peak = f"{row['device_bytes'] / GIB:.0f}/{(row['usable_bytes'] or 0) / GIB:.3g}"
    hours = "–" if row["hours"] is None else format_seconds(row["hours"] * 3600)
    money = "–" if row["usd"] is None else _number(row["usd"] / shown().usd)
    risk = "" if row["risk"] is None or row["device_bytes"] is None else f", {row['risk']:.0%}"
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
    marked = {"spot": " (spot)", "buy": " (bought)"}
    terms = {o["option"]: marked.get(o["terms"], "") for o in a["options"]}
    lines = [
        f"Cheapest {a['cheapest']}{terms[a['cheapest']]} · fastest {a['fastest']}{terms[a['fastest']]} · "
        f"recommended {a['recommended']} "
        f"({_says(a)}). For {a['target']}: {TARGETS[a['target']].says}."
    ]
    first = a["options"][0]
    lines += kept_lines(a)
    limit = a["limits"]["usd"]
    if limit and first["usd"] and 3 * first["usd"]["expected"] <= limit:
        lines.append(
            "Money is not your limit: three attempts at A cost about "
            f"{format_usd(3 * first['usd']['expected'])}."
        )
    lines += buy_lines(a)
    lines += energy_lines(a)
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
    lines += front_lines(a)
    old = {o["offer"].split("/")[0]: o for o in a["options"] if stale(o)}
    if old:
        texts = [
            f"{name} "
            + ("undated" if o["price_date"] is None else f"{o['price_age_days']} days old")
            + f" {STALE}"
            for name, o in old.items()
        ]
        cure = "outlay catalog refresh" if set(old) - {"buy"} else "--purchase-usd"
        lines.append("Prices: " + " · ".join(texts) + f" → {cure}")
    return lines


def _sure(p: float) -> str:
    """Never 0 or 100 %: the tails of the interval are not known that well."""
    return "over 99%" if p > 0.99 else "under 1%" if p < 0.01 else f"{p:.0%}"


def kept_lines(a: dict[str, Any]) -> list[str]:
    """How sure A keeps the deadline and the budget that were asked for."""
    keeps, limits = a["options"][0]["keeps"], a["limits"]
    texts = []
    defaulted = any(row["what"] == "deadline" for row in a["assumptions"])
    if keeps["hours"] is not None and not defaulted:
        texts.append(
            f"the deadline of {format_seconds(limits['hours'] * 3600)} with {_sure(keeps['hours'])}"
        )
    if keeps["usd"] is not None:
        texts.append(f"the budget of {format_usd(limits['usd'])} with {_sure(keeps['usd'])}")
    return [f"A keeps {' and '.join(texts)} probability."] if texts else []


def buy_lines(a: dict[str, Any]) -> list[str]:
    """What each bought option costs a year, and when it pays."""
    lines = [a["buy_refused"]] if a["buy_refused"] else []
    for b in a["buy"]:
        own = b["owned"]
        parts = {
            "capital": own["capital_usd_a_year"], "place": own["place_usd_a_year"],
            "upkeep": own["upkeep_usd_a_year"],
        }  # fmt: skip
        year = ", ".join(f"{name} {format_usd(v['expected'])}" for name, v in parts.items())
        others = own["use_h_a_year"]
        use = (
            f"shared with other work, {others:,.0f} h a year in all" if others
            else "for this project alone, a year at least"
        )  # fmt: skip
        lines.append(
            f"{b['option']}, {b['accelerators']:,} x {b['accelerator']} bought {use}: "
            f"{_money(own['purchase_usd'])} {shown().name} at once; a year: {year}; an hour of work: electricity "
            f"{format_usd(own['electricity_usd_per_h']['expected'])}. {b['says']}"
        )
    return lines


def energy_lines(a: dict[str, Any]) -> list[str]:
    """Energy and CO2e of A, and of the least of those shown where that is another."""

    def text(o: dict[str, Any]) -> str:
        kwh = _range({k: o[f"energy_{end}kwh"] for k, end in _ENDS.items()})
        said = f"{o['option']} takes {kwh} kWh, server and cooling included"
        if o["co2e_kg"] is None:
            return f"{said}; CO2e unknown: no --region"
        return f"{said}; {_range({k: o[f'co2e_{end}kg'] for k, end in _ENDS.items()})} kg CO2e ({o['co2e_of']})"

    known = [o for o in a["options"] if o["energy_kwh"] is not None]
    if not known:
        return []
    least = min(known, key=lambda o: o["energy_kwh"])
    rows = [o for o in known if o["option"] == "A" or o is least]
    return [". ".join(text(o) for o in rows) + ". Building the hardware is not in it."]


_ENDS = {"low": "low_", "expected": "", "high": "high_"}
_FRONT = 8


def front_lines(a: dict[str, Any]) -> list[str]:
    """Time against money, evenly from the whole front; each kind of price is marked."""
    rows = a["pareto"]
    if len(rows) < 3:
        return []
    some = [rows[round(i * (len(rows) - 1) / (_FRONT - 1))] for i in range(_FRONT)]
    texts = [
        f"{format_seconds(p['hours'] * 3600)} {format_usd(p['usd'])} ({p['accelerators']:,} {p['accelerator']}"
        + ("" if p["terms"] == "on_demand" else f", {p['terms'].replace('_', ' ')}") + ")"
        for p in {id(p): p for p in some}.values()
    ]  # fmt: skip
    return [f"Time against money, {len(rows)} points nothing beats in both: " + " · ".join(texts)]


OBJECTIVE_SAYS = {
    "balanced": "least money × time at a steady price",
    "cheapest": "the least money within the limits, at a steady price",
    "fastest": "the least time within the limits, at a steady price",
    "energy": "the least energy",
    "carbon": "the least CO2e",
}


def _says(a: dict[str, Any]) -> str:
    """What A is."""
    text = OBJECTIVE_SAYS[a["objective"]]
    terms = a["options"][0]["terms"]
    if terms not in ("spot", "buy"):
        return text
    word = "at a spot price" if terms == "spot" else "bought"
    return f"{text.removesuffix('at a steady price').rstrip(', ')}, {word}: no steady price keeps the limits"


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
                "purchase_usd": "" if o["purchase_usd"] is None else f"{o['purchase_usd']['expected']:.2f}",
                "energy_kwh": "" if o["energy_kwh"] is None else f"{o['energy_kwh']:.4g}",
                "co2e_kg": "" if o["co2e_kg"] is None else f"{o['co2e_kg']:.4g}",
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
    head = (
        "| | hardware | price | strategy | GiB of usable | tokens/s | time "
        f"| total {shown().name} | limited by | OOM risk |"
    )
    rows = [headline(a), "", head, "|---|---|---|---|---|---|---|---|---|---|"]
    for o in a["options"]:
        m = o["memory"]
        rows.append(
            f"| {o['option']} | {o['accelerators']:,} x {o['accelerator']}, {o['offer']} | {_terms(o)} | "
            f"{o['label']} | {m['device_bytes'] / GIB:.0f}/{m['usable_bytes'] / GIB:.3g} | "
            f"{o['tokens_per_s']:,.0f} | {_hours(o['hours'])} | {_money(o['usd'])} | {o['limited_by']} | "
            f"{o['oom_probability']:.1%} |"
        )
    return "\n".join([*rows, "", *(f"- {line}" for line in verdict_lines(a))]) + "\n"

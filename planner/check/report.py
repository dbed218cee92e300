"""The answer for a person: the verdict, the reason and the mend first; then what it means and what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlay.planner.report.terminal import between, estimate_rows, table
from outlay.profiles.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_STATE = {
    "illegal": "WILL NOT START", "does not fit": "DOES NOT FIT", "tight": "TIGHT", "fits": "FITS",
    "unknown": "NOT KNOWN WHETHER IT FITS",
}  # fmt: skip
_STYLE = {
    "illegal": "bold red",
    "does not fit": "bold red",
    "tight": "bold yellow",
    "fits": "bold green",
}
_HEAD = {
    "illegal": "refused", "ignored": "has no effect", "changed": "does something else", "advice": "could be better",
}  # fmt: skip


def pairs(rows: list[tuple[str, str]]) -> RenderableType:
    """Labels in a column, their text folded beside it."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(key, Text(value))
    return grid


def memory_parts(memory: dict[str, Any]) -> RenderableType:
    """What the memory at the peak is made of."""
    grid = table("  memory at the peak, a rank", "", "share")
    for name, size in sorted(memory["parts"].items(), key=lambda kv: -kv[1]):
        if size > 0.0005 * memory["device_bytes"]:
            grid.add_row(
                f"  {name.replace('_', ' ')}",
                format_bytes(size),
                f"{size / memory['device_bytes']:.0%}",
            )
    return grid


def _memory(e: dict[str, Any]) -> str:
    m = e["memory"]
    shown = between(m["low_bytes"], m["device_bytes"], m["high_bytes"], format_bytes)
    usable = format_bytes(e["cluster"]["usable_bytes"])
    return f"{shown} of {usable} a rank, {e['oom_probability']:.0%} risk of running out of memory"


def headline(value: dict[str, Any]) -> str:
    """One line: the state, with the number behind it."""
    state, e = value["state"], value["estimate"]
    count = sum(f["level"] == "illegal" for f in value["findings"])
    text = _STATE[state]
    if state == "illegal":
        text += f": {count} fault{'s' if count > 1 else ''}"
        if value["after"] == "illegal" and e is None:
            by_hand = sum(f["level"] == "illegal" and not f["mended"] for f in value["findings"])
            text += f", {by_hand} of them to be mended by hand"
        elif e is not None:
            word = {
                "no": "and mended it would not fit",
                "tight": "mended it is tight",
                "ok": "mended it fits",
            }
            text += f"; {word[e['verdict']]}: {_memory(e)}"
    elif e is not None:
        text += f": {_memory(e)}"
    else:
        text += f": {value['unknown']}"
    return text


def reasons(value: dict[str, Any]) -> list[tuple[str, str]]:
    """why and mend, as label and text."""
    rows: list[tuple[str, str]] = []
    e = value["estimate"]
    if e is not None and e["verdict"] != "ok":
        parts = sorted(e["memory"]["parts"].items(), key=lambda kv: -kv[1])[:4]
        largest = ", ".join(
            f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in parts if size > 0
        )
        rows.append(("why", f"{e['memory']['peak_phase']} phase: {largest}"))
    m = value["mended"]
    if m is not None and e is not None and m["device_bytes"] != e["memory"]["device_bytes"]:
        text = f"{format_bytes(m['device_bytes'])} (to {format_bytes(m['high_bytes'])}), {m['verdict']}"
        if m["step_s"] is not None and e is not None and e["step"] is not None:
            text += f", step {format_seconds(m['step_s'])} instead of {format_seconds(e['step']['time_s'])}"
        rows.append(("mended", text))
    if value["fit"] is not None:
        rows.append(("to fit", _variant(value["fit"], e)))
    elif value["smallest"] is not None:
        small = value["smallest"]
        low = "; ".join(small["changes"]) or "nothing can be changed"
        text = f"nothing that this file can say is enough. The least is {format_bytes(small['device_bytes'])}"
        text += f" ({low}): take more or larger accelerators, a shorter context, or adapters"
        rows.append(("to fit", text))
    if value["better"] is not None:
        rows.append(("faster", _variant(value["better"], e)))
    return rows


def _variant(found: dict[str, Any], e: dict[str, Any]) -> str:
    text = "; ".join(found["changes"])
    text += f": {format_bytes(found['device_bytes'])} (to {format_bytes(found['high_bytes'])}), {found['verdict']}"
    if found["step_s"] is not None:
        text += f", step {format_seconds(found['step_s'])}"
        if e["step"] is not None:
            text += f" instead of {format_seconds(e['step']['time_s'])}"
    if found["outside"]:
        text += (
            ". Not in these files: set "
            + "; ".join(found["outside"])
            + " where the training is configured"
        )
    return text


def _meaning(value: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for row in value["meaning"]:
        shown = "not said" if row["value"] is None else str(row["value"])
        place = row["where"] or ""
        if row["default"]:
            place = f"{place}; {row['default']}" if place else row["default"]
        rows.append((row["what"], f"{shown}   [{place}]" if place else shown))
    return rows


def _findings(console: Console, value: dict[str, Any]) -> None:
    for level, head in _HEAD.items():
        found = [f for f in value["findings"] if f["level"] == level]
        if not found:
            continue
        console.print(f"{head}:", style="bold")
        for f in found:
            console.print(
                f"  {f['where']}: {f['what']}", highlight=False, markup=False, soft_wrap=True
            )
            console.print(f"    do:  {f['do']}", highlight=False, markup=False, soft_wrap=True)
            console.print(
                f"    why: {f['rule']}: {f['evidence']}",
                style="dim",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def print_check(console: Console, value: dict[str, Any], *, write_hint: str) -> None:
    """The whole answer."""
    console.print(
        f"{value['file']}: {headline(value)}",
        style=_STYLE.get(value["state"], "bold"),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if rows := reasons(value):
        console.print(pairs(rows))
    if value["findings"]:
        console.print()
        _findings(console, value)
    console.print(
        f"\nwhat it says ({value['framework']}, for DeepSpeed {value['deepspeed']}):",
        style="bold",
        highlight=False,
    )
    console.print(pairs([(f"  {k}", v) for k, v in _meaning(value)]))
    for note in value["notes"]:
        console.print(f"  note: {note}", highlight=False, markup=False)
    e = value["estimate"]
    if e is not None:
        console.print(
            f"\nwhat will happen ({value['estimate_is_of']}; in parentheses 90 % intervals):",
            style="bold",
            highlight=False,
        )
        assumed = [a for a in e["assumptions"] if str(a["source"]).startswith("default")]
        taken = {a["what"] for a in assumed}
        rows = [(k, v) for k, v in estimate_rows(e) if k not in ("model", "disk")]
        if taken & {"tokens", "steps"}:
            rows = [("run, if so long" if k == "run" else k, v) for k, v in rows]
        console.print(pairs([(f"  {k}", v) for k, v in rows]))
        console.print(memory_parts(e["memory"]))
        for row in assumed:
            console.print(
                f"  taken: {row['what']} = {row['value']} ({row['source']})",
                style="dim",
                highlight=False,
                markup=False,
            )
    elif value["state"] == "illegal":
        console.print(
            f"\nwhat will happen is not known: {value['unknown']}", highlight=False, markup=False
        )
    if value["diff"]:
        console.print(f"\nmended{write_hint}:", style="bold", highlight=False)
        console.print(value["diff"].rstrip("\n"), highlight=False, markup=False, soft_wrap=True)


def markdown(value: dict[str, Any]) -> str:
    """For an issue or a pull request."""
    lines = [f"**{value['file']}: {headline(value)}**", ""]
    lines += [f"- {label}: {text}" for label, text in reasons(value)]
    for f in value["findings"]:
        lines.append(
            f"- {_HEAD[f['level']]}: `{f['where']}` {f['what']}. {f['do']} (`{f['rule']}`: {f['evidence']})"
        )
    lines += ["", "| what | value | where |", "|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['value']} | {r['where'] or r['default']} |" for r in value["meaning"]
    ]
    if value["estimate"] is not None:
        lines += ["", "| | |", "|---|---|"]
        lines += [f"| {k} | {v} |" for k, v in estimate_rows(value["estimate"])]
    if value["diff"]:
        lines += ["", "```diff", value["diff"].rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"

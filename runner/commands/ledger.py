"""`outlay ledger`: what runs cost, for whom, and what projects may still spend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.planner.options import format_option
from outlay.profiles.errors import UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from outlay.runner.ledger import Ledger
    from outlay.runner.ledger.bills import Bill

file_option = click.option(
    "--ledger", "file", help="Its file; else OUTLAY_LEDGER, else that of this user."
)


def _opened(file: str | None) -> Ledger:
    from outlay.runner.ledger import Ledger

    found = Ledger.opened(file)
    if found is None:
        raise UsageError("the ledger is switched off", do="unset OUTLAY_LEDGER, or give --ledger")
    return found


def _keys(by: str) -> list[str]:
    return [key.strip() for key in by.split(",") if key.strip()]


@click.group()
def ledger() -> None:
    """What runs cost, for whom, and what projects may still spend."""


@ledger.command()
@click.option(
    "--by", default="", help="Sums by these: user,project,tag,machine,run,tool,state,month."
)
@format_option("table", "json", "csv")
@file_option
def show(by: str, format_: str, file: str | None) -> None:
    """Runs with what was predicted and what they cost, or sums; and how project budgets stand."""
    from outlay.runner.ledger import report

    found = _opened(file)
    rows, keys = report.attempts(found), _keys(by)
    shown = report.by_keys(rows, keys) if keys else report.by_run(rows)
    columns = (*keys, *report.SUM) if keys else report.RUN
    standing = report.budgets(found)
    if format_ == "json":
        content = {"schema": report.SCHEMA, "rows": shown, "budgets": standing}
        click.echo(json.dumps(content, indent=2))
    elif format_ == "csv":
        click.echo(report.to_csv(shown, columns), nl=False)
    else:
        click.echo(report.to_table(shown, columns) if shown else "no runs yet")
        if standing:
            click.echo("\nproject budgets\n" + report.to_table(standing, tuple(standing[0])))


@ledger.command()
@format_option("csv", "json")
@click.option("--out", help="A file, instead of stdout.")
@file_option
def export(format_: str, out: str | None, file: str | None) -> None:
    """Every attempt with all its columns."""
    from outlay.planner.spec.files import write_text
    from outlay.runner.ledger import report

    found = _opened(file)
    rows = report.attempts(found)
    content: dict[str, Any] = {
        "schema": report.SCHEMA, "attempts": rows, "budgets": report.budgets(found),
    }  # fmt: skip
    text = (
        report.to_csv(rows, report.ATTEMPT)
        if format_ == "csv"
        else json.dumps(content, indent=2) + "\n"
    )
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(Path(out), text)


@ledger.command()
@click.argument("bill")
@click.option("--by", default="", help="user, project, tag, machine, run, tool, state or month.")
@click.option("--key-column", help="The bill's column that holds it; without: the name of --by.")
@click.option("--cost-column", help="The bill's column of USD; without: the first that is known.")
@click.option("--from", "start", help="Of the period, UTC: 2026-11-01; without: the bill's dates.")
@click.option("--until", help="Its end, not included: 2026-12-01.")
@format_option("table", "json", "csv")
@file_option
def reconcile(
    bill: str,
    by: str,
    key_column: str | None,
    cost_column: str | None,
    start: str | None,
    until: str | None,
    format_: str,
    file: str | None,
) -> None:
    """A provider's BILL.csv beside what the ledger says of its period, in all or by one column."""
    from outlay.runner.ledger import period, report
    from outlay.runner.ledger.bills import read_bill
    from outlay.runner.ledger.bills import reconcile as differences

    keys = _keys(by)
    if len(keys) > 1:
        raise UsageError("a bill is compared by one column", where="--by", do=f"give {keys[0]}")
    if key_column is not None and not keys:
        raise UsageError("--key-column says where the bill holds --by", do="give --by")
    billed = read_bill(
        Path(bill),
        key_column=(key_column or keys[0]) if keys else None,
        cost_column=cost_column,
        asked=period.asked(start, until),
    )
    attempts = period.within(
        report.attempts(_opened(file)), billed.period or period.Period(), months=keys == ["month"]
    )
    sums = report.by_keys(attempts, keys)
    booked = {str(row[keys[0]]) if keys else "": row["cost_usd"] for row in sums}
    rows = [
        {
            keys[0] if keys else "key": row.key or "all" if not keys else row.key,
            "billed_usd": row.billed_usd,
            "ledger_usd": row.ledger_usd,
            "difference_usd": row.difference_usd,
        }
        for row in differences(billed.usd, booked)
    ]
    _show_differences(rows, billed, format_)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _show_differences(rows: list[dict[str, Any]], billed: Bill, format_: str) -> None:
    from outlay.runner.ledger import report

    said = f"period: {billed.period}"
    if billed.period is None:
        said = "the bill has no dates that are known: all of the ledger is compared; give --from and --until"
    if billed.left_out:
        said += f"; {billed.left_out} of the bill's lines begin outside it"
    click.echo(said, err=True)
    if format_ == "json":
        p = billed.period
        period = None if p is None else {"start": _iso(p.start), "end": _iso(p.end)}
        content = {"schema": report.SCHEMA, "period": period, "differences": rows}
        click.echo(json.dumps(content, indent=2))
        return
    columns = tuple(rows[0]) if rows else ("key", "billed_usd", "ledger_usd", "difference_usd")
    shown = report.to_csv if format_ == "csv" else report.to_table
    click.echo(shown(rows, columns).rstrip("\n"))


@ledger.command("import")
@click.argument("sacct")
@click.option("--usd-per-gpu-h", type=float, help="Price, where the cluster has one.")
@file_option
def import_(sacct: str, usd_per_gpu_h: float | None, file: str | None) -> None:
    """Slurm jobs that ended, from `sacct --parsable2` or a CSV of it; each is taken once."""
    from outlay.runner.ledger.bills import import_sacct

    if usd_per_gpu_h is not None and not 0 <= usd_per_gpu_h < 1e6:
        raise UsageError(f"{usd_per_gpu_h} USD makes no sense", where="--usd-per-gpu-h")
    new, passed = import_sacct(_opened(file), Path(sacct), usd_per_gpu_h=usd_per_gpu_h)
    click.echo(f"{new} jobs entered; {passed} known already, or not ended", err=True)


@ledger.command()
@click.argument("project")
@click.argument("amount")
@click.option("--rate", multiple=True, help="USD for one of a currency, for 5000eur: eur=1.08.")
@file_option
def budget(project: str, amount: str, rate: tuple[str, ...], file: str | None) -> None:
    """What PROJECT may spend in all: 5000usd, 300gpuh, 80kWh, 20kgCO2e; `none` takes them away.

    Another currency is kept in USD, at the --rate of now.
    """
    from outlay.planner.spec.job import Budget
    from outlay.profiles.money import parse_rates

    if not project.strip():
        raise UsageError("a project needs a name", where="PROJECT")
    if amount.lower() == "none":
        removed = _opened(file).remove_budgets(project)
        click.echo(f"{project}: {removed} budgets taken away", err=True)
        return
    limit = Budget.parse(amount, where="AMOUNT", rates=parse_rates(rate))
    found = _opened(file)
    found.set_budget(project, limit)
    (total,) = [t for t in found.totals(project) if t.budget.kind == limit.kind]
    click.echo(f"{project}: {limit}, {total.spent:.4g} spent, {total.left:.4g} free", err=True)
    if total.charged > limit.amount:
        click.echo(f"warning: {total.charged:.6g} are spent or reserved already", err=True)

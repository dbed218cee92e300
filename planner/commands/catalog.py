"""`outlay catalog`: what outlay knows."""

from __future__ import annotations

import click


@click.group()
def catalog() -> None:
    """Accelerators and models that outlay knows."""


@catalog.command("list")
@click.argument("what", type=click.Choice(["accelerators", "models"]), default="accelerators")
def catalog_list(what: str) -> None:
    """One name a line."""
    from outlay.planner.spec.families import preset_names
    from outlay.profiles.loader import accelerators

    for name in sorted(accelerators()) if what == "accelerators" else preset_names():
        click.echo(name)


@catalog.command("show")
@click.argument("name")
def catalog_show(name: str) -> None:
    """One accelerator with the source of every figure."""
    from outlay.planner.spec.files import to_yaml
    from outlay.profiles.loader import accelerator

    click.echo(to_yaml(accelerator(name)), nl=False)


@catalog.command("search")
@click.argument("text", metavar="[TEXT]", default="")
@click.option(
    "--at-most", type=click.FloatRange(min=0, min_open=True), help="USD an hour of the node."
)
@click.option("--memory", help="Least memory of one accelerator, as 80GB.")
@click.option("--vendor", help="NVIDIA, AMD, Google, …")
def catalog_search(
    text: str, at_most: float | None, memory: str | None, vendor: str | None
) -> None:
    """Nodes for rent whose name, provider, region or accelerator contains TEXT, cheapest first."""
    import datetime

    from outlay.planner.project_cost import price_age_mark
    from outlay.profiles.errors import UsageError
    from outlay.profiles.loader import accelerator
    from outlay.profiles.offers import instances
    from outlay.profiles.units import parse_bytes

    if at_most is not None and not at_most < float("inf"):
        raise UsageError(f"{at_most} is not a price", where="--at-most")
    least = parse_bytes(memory, where="--memory") if memory else 0
    found = []
    for i in instances():
        card = accelerator(i.accelerator)
        words = f"{i.provider} {i.name} {i.region or ''} {i.accelerator}".lower()
        usd = i.on_demand_usd_per_h
        if text.lower() not in words or (card.memory_bytes or 0) < least:
            continue
        if (vendor and card.vendor.lower() != vendor.lower()) or (
            at_most is not None and (usd is None or usd > at_most)
        ):
            continue
        found.append(i)
    if not found:
        raise UsageError("no node for rent is like that", do="outlay catalog search  shows all")
    today = datetime.date.today()
    for i in sorted(found, key=lambda i: (i.on_demand_usd_per_h or float("inf"), i.name)):
        dated = datetime.date.fromisoformat(i.price_date) if i.price_date else None
        usd, age = i.on_demand_usd_per_h, price_age_mark(dated, today)
        price = "price unknown" if usd is None else f"{usd:.2f} USD/h {i.price_date or ''} {age}"
        click.echo(
            f"{i.count}x{i.accelerator}  {i.provider} {i.name} {i.region or '-'}  {price}".rstrip()
        )

"""`outlay catalog`: what outlay knows."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from outlay.profiles.offers import Instance


@click.group()
def catalog() -> None:
    """Accelerators, models and prices that outlay knows, and one's own."""


@catalog.command("list")
@click.argument(
    "what", default="accelerators",
    type=click.Choice(["accelerators", "instances", "models", "purchases", "assumptions", "regions"]),
)  # fmt: skip
@click.option("--own", is_flag=True, help="Of instances, only those of one's own layer.")
@click.option("--csv", "as_csv", is_flag=True, help="Instances in the columns `import` reads.")
def catalog_list(what: str, own: bool, as_csv: bool) -> None:
    """One name a line; instances and purchases with their price, its date and whose it is; assumptions of
    totals (--assume); regions with their electricity (--region)."""
    from outlay.planner.commands.catalog_tables import TABLES, columns
    from outlay.planner.spec.families import preset_names
    from outlay.profiles.errors import UsageError
    from outlay.profiles.loader import accelerators
    from outlay.profiles.offers import OURS, instances
    from outlay.profiles.own_offers import layer_text

    if what != "instances":
        if own or as_csv:
            raise UsageError(
                "--own and --csv are of instances", do="outlay catalog list instances --own"
            )
        if what in TABLES:
            for line in columns(TABLES[what]()):
                click.echo(line)
            return
        for name in sorted(accelerators()) if what == "accelerators" else preset_names():
            click.echo(name)
        return
    found = [i for i in instances() if not own or i.origin != OURS]
    if not found:
        raise UsageError(
            "there is no price of one's own", do="outlay catalog import FILE.csv  makes some"
        )
    if as_csv:
        click.echo(layer_text(found), nl=False)
        return
    rows = [
        (f"{i.provider}/{i.name}", i.region or "-", f"{i.count}x{i.accelerator}", _price(i), i.origin)
        for i in found
    ]  # fmt: skip
    for line in columns(rows):
        click.echo(line)


def _price(node: Instance) -> str:
    """On demand, with its date and a mark where that is old or missing."""
    from outlay.planner.project_cost import price_age_mark

    if node.on_demand_usd_per_h is None:
        return "price unknown"
    dated = datetime.date.fromisoformat(node.price_date) if node.price_date else None
    age = price_age_mark(dated, datetime.date.today())
    return f"{node.on_demand_usd_per_h:.2f} USD/h {node.price_date or ''} {age}".rstrip()


@catalog.command("show")
@click.argument("name")
def catalog_show(name: str) -> None:
    """An accelerator with its sources, PROVIDER/INSTANCE with its prices, or a model."""
    from outlay.planner.spec.families import preset_config, preset_names, resolve_model
    from outlay.planner.spec.files import to_yaml
    from outlay.profiles.errors import UnknownName
    from outlay.profiles.loader import accelerator, accelerators, aliases
    from outlay.profiles.offers import instances

    wanted = name.strip().lower()
    nodes = [i for i in instances() if f"{i.provider}/{i.name}".lower() == wanted]
    if nodes:
        click.echo(to_yaml(nodes if len(nodes) > 1 else nodes[0]), nl=False)
    elif wanted in preset_names():
        facts = preset_config(wanted)[1]
        click.echo(to_yaml({"facts": facts, "spec": resolve_model(wanted)[0]}), nl=False)
    elif wanted in accelerators() or wanted in aliases():
        click.echo(to_yaml(accelerator(wanted)), nl=False)
    elif "/" in wanted:
        known = [f"{i.provider}/{i.name}".lower() for i in instances()]
        raise UnknownName("instance", name, known)
    else:
        known = [*accelerators(), *aliases(), *preset_names()]
        raise UnknownName("accelerator, PROVIDER/INSTANCE or model", name, known)


@catalog.command("check")
def catalog_check() -> None:
    """Whether every figure is what it can be: ours, and the layer of one's own. Exit 2 if not."""
    from outlay.planner.spec.families import preset_names, resolve_model
    from outlay.profiles.catalog_check import own_faults, shipped_faults
    from outlay.profiles.errors import OutlayError, UsageError
    from outlay.profiles.own_offers import layer_folder

    counts, faults = shipped_faults()
    for name in preset_names():
        try:
            resolve_model(name)
        except OutlayError as error:
            faults.append(f"models/{name}.json: {error.what}")
    own, own_wrong = own_faults()
    for fault in [*faults, *own_wrong]:
        click.echo(fault)
    looked_at = (
        f"{counts['accelerators']} accelerators, {counts['instances']} instances, "
        f"{len(preset_names())} models; {own} instances of one's own ({layer_folder() or 'off'})"
    )
    if wrong := len(faults) + len(own_wrong):
        raise UsageError(f"{wrong} of the catalog's entries cannot be right", why=looked_at)
    click.echo(f"all as it should be: {looked_at}")


@catalog.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Of the layer's file; default: the file's own name.")
@click.option("--dry-run", is_flag=True, help="Check the file, write nothing.")
def catalog_import(file: Path, name: str | None, dry_run: bool) -> None:
    """Prices, quotes and machines of one's own (.csv, .yaml), over the catalog's."""
    from outlay.profiles.offers import instances, shipped_instances
    from outlay.profiles.own_offers import import_file, read_own

    instances()  # a layer that is broken already is told before anything is written
    if dry_run:
        nodes = read_own(file)
        click.echo(f"{file}: {len(nodes)} rows, all as they should be; nothing was written")
    else:
        target, nodes = import_file(file, name)
        click.echo(f"wrote {target}: {len(nodes)} rows")
    ours = {i.key for i in shipped_instances()} | {(*i.key[:2], None) for i in shipped_instances()}
    shapes = {i.key[:2]: (i.accelerator, i.count) for i in shipped_instances()}
    sellers = {provider for provider, _ in shapes}
    told = (
        (
            sum(shapes.get(i.key[:2], (i.accelerator, i.count)) != (i.accelerator, i.count) for i in nodes),
            "have another accelerator or count than the catalog's node of that name",
        ),
        (sum(i.key in ours for i in nodes), "replace a price of the catalog"),
        (
            sum(i.provider in sellers and i.key[:2] not in shapes for i in nodes),
            "bear a provider's name of the catalog, but a node of another name: both are offered",
        ),
        (
            sum(i.on_demand_usd_per_h is not None and i.price_date is None for i in nodes),
            "have no price_date: `undated !` will stand beside them",
        ),
        (
            sum(i.on_demand_usd_per_h is None for i in nodes),
            "have no on_demand_usd_per_h: they are looked at only in the terms that are priced",
        ),
        (
            sum(i.inter_node_bytes_per_s is None for i in instances() if i.key in {n.key for n in nodes})
            if not dry_run else 0,
            "have no inter_node_gbps: only one such node at a time is planned",
        ),
    )  # fmt: skip
    for count, what in told:
        if count:
            click.echo(f"  {count} {what}")


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
    from outlay.profiles.errors import UsageError
    from outlay.profiles.loader import accelerator
    from outlay.profiles.offers import OURS, instances
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
    for i in sorted(found, key=lambda i: (i.on_demand_usd_per_h or float("inf"), i.name)):
        whose = "" if i.origin == OURS else f"  [{i.origin}]"
        click.echo(
            f"{i.count}x{i.accelerator}  {i.provider} {i.name} {i.region or '-'}  {_price(i)}{whose}"
        )


@catalog.command("refresh")
@click.option("--provider", "providers", multiple=True, help="Only these, repeatable.")
def catalog_refresh(providers: tuple[str, ...]) -> None:
    """Today's prices through gpuhunt into one's own layer; where a provider fails, the old ones stay.

    Exit 1 where a provider that was named fails, or none could be refreshed.
    """
    from outlay.profiles.errors import OutlayError
    from outlay.profiles.refresh import refresh

    outcomes = refresh(providers, datetime.date.today())
    for outcome in outcomes:
        done = outcome.state == "refreshed"
        click.echo(f"{outcome.provider}: {outcome.state}: {outcome.text}", err=not done)
    left = [o.provider for o in outcomes if o.state != "refreshed"]
    if left and (providers or len(left) == len(outcomes)):
        raise OutlayError(
            f"no new prices of {', '.join(left)}",
            do="the old prices stay in force; try again later",
        )

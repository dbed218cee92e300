"""`outlay catalog`: what outlay knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    pass


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

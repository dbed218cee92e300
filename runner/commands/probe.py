"""`outlay probe`: what is in this machine, and with --measure how fast it is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import click

from outlay.planner.commands.question import console, emit_text
from outlay.planner.options import format_option
from outlay.planner.probe import probe as probe_machine
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import to_json, to_yaml

BUSY = 0.5
"""Load (1-minute average, processes a core) from which on measured rates are another's, too."""


def with_rates(cluster: Cluster) -> Cluster:
    """The cluster with its rates measured now; notes say when other work was running beside."""
    from outlay.runner.measure_rates import measure_rates

    notes = cluster.notes
    cores = cluster.host.cores if cluster.host else 1
    load = os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else 0.0
    if load > BUSY:
        notes += (
            f"the machine was busy while its rates were measured (load {load:.1f} a core): "
            "they are low, and predicted times long",
        )
    return dataclasses.replace(cluster, rates=measure_rates(cluster.ranks), notes=notes)


@click.command()
@click.option("--ranks", type=click.IntRange(1), help="Processes on a CPU machine (default: two).")
@click.option(
    "--measure", is_flag=True, help="Time matrix multiplies, memory and all-reduce (about 20 s)."
)
@click.option("--price-usd-per-h", type=float, help="What this machine costs an hour.")
@format_option("table", "json", "yaml")
@click.option("--out", help="Also write the cluster to this file, for --hardware.")
def probe(
    ranks: int | None, measure: bool, price_usd_per_h: float | None, format_: str, out: str | None
) -> None:
    """What is in this machine."""
    cluster = probe_machine(ranks=ranks, folder=Path.cwd(), price_usd_per_h=price_usd_per_h)
    if measure:
        cluster = with_rates(cluster)
    if out:
        emit_text(to_yaml(cluster), out)
    if format_ == "table":
        from outlay.planner.report.terminal import print_cluster

        print_cluster(console(), cluster)
    else:
        click.echo(to_json(cluster) if format_ == "json" else to_yaml(cluster), nl=False)

"""The person's own layer: prices, quotes and machines, in CSV or YAML, over what is shipped.

It is a folder of CSV files with the columns of `instances/*.csv`: OUTLAY_CATALOG, else
$XDG_CONFIG_HOME/outlay/catalog (`off` = neither read nor written). `refreshed-*.csv` are read first,
so that what a person wrote beats what was fetched.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml

from outlay.profiles.errors import FileError, UnknownName, UsageError
from outlay.profiles.offer_faults import faults_of
from outlay.profiles.offers import Instance, instance_of
from outlay.profiles.rows import Row, csv_rows, text_lines
from outlay.profiles.units import GIB

VARIABLE = "OUTLAY_CATALOG"
REFRESHED = "refreshed-"
"""How the files that `catalog refresh` writes begin."""

COLUMNS = (
    "provider", "name", "region", "accelerator", "count", "vcpus", "ram_gib", "nvme_gb",
    "interconnect", "inter_node_gbps", "on_demand_usd_per_h", "price_date", "spot_usd_per_h",
    "spot_least_usd_per_h", "spot_date", "reserved_1y_usd_per_h", "reserved_date", "source", "note",
)  # fmt: skip
NEEDED = ("provider", "name", "accelerator", "count")
"""The columns that may not be left out."""


def layer_folder() -> Path | None:
    """Where the layer lies; null = off."""
    given = os.environ.get(VARIABLE, "")
    if given:
        return None if given.lower() == "off" else Path(given)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "outlay" / "catalog"


def layer_files() -> tuple[tuple[Path, int, int], ...]:
    """Each file with its time (ns) and size, in the order in which they are laid over ours."""
    folder = layer_folder()
    if folder is None or not folder.exists():
        return ()
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", where=VARIABLE, do="name a folder, or off")
    found = sorted(folder.glob("*.csv"), key=lambda f: (not f.name.startswith(REFRESHED), f.name))
    stats = ((path, path.stat()) for path in found)
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


def read_own(path: Path, origin: str | None = None) -> tuple[Instance, ...]:
    """The rows of a person's file, each checked; the first fault is raised with its place."""
    found: dict[tuple[str, str, str | None], str] = {}
    nodes = []
    for row in own_rows(path):
        node = own_instance(row, path.name if origin is None else origin)
        if node.key in found:
            raise FileError(
                f"{node.provider}/{node.name} in {node.region or 'no region'} is there twice",
                where=row.where, why=f"first at {found[node.key]}", do="keep one of them",
            )  # fmt: skip
        found[node.key] = row.where
        nodes.append(node)
    return tuple(nodes)


def own_instance(row: Row, origin: str) -> Instance:
    """One row, checked. Only here are names of accelerators resolved and case forgiven."""
    from outlay.profiles.loader import accelerator

    try:
        card = accelerator(row.text("accelerator"))
    except UnknownName as error:
        raise FileError(
            error.what, where=row.at("accelerator"), do=message_do(error) or "outlay catalog list"
        ) from None
    node = dataclasses.replace(
        instance_of(row),
        provider=row.text("provider").lower(),
        accelerator=card.name,
        origin=origin,
    )
    for column, fault in faults_of(node):
        raise FileError(fault, where=row.at(column))
    return node


def message_do(error: UnknownName) -> str:
    return f"nearest: {', '.join(error.near)}" if error.near else ""


def own_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV or YAML file, every column of COLUMNS there, empty where it was left out."""
    text = _text_of(path)
    yaml_file = path.suffix.lower() in (".yaml", ".yml")
    if not yaml_file and path.suffix.lower() != ".csv":
        raise FileError("is neither .csv nor .yaml", where=str(path), do="save it as one of these")
    rows = list(_yaml_rows(text, str(path)) if yaml_file else _csv_rows(text, str(path)))
    if not rows:
        raise FileError(
            "there is no row in it", where=str(path), why=f"columns: {', '.join(COLUMNS)}"
        )
    for row in rows:
        cells = {column: " ".join((row.cells.get(column) or "").split()) for column in COLUMNS}
        for column, cell in cells.items():
            if not cell.isprintable():
                raise FileError(
                    f"{cell[:40]!a} has signs that cannot be shown", where=row.at(column)
                )
        cells["source"] = cells["source"] or f"own: {path.name}"
        yield Row(dict(cells), row.where)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise FileError("this is a folder, a file was expected", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise FileError("is not text in UTF-8", where=str(path), why=str(error)) from None
    except OSError as error:
        raise FileError("cannot be read", where=str(path), why=str(error)) from None


def _check_columns(names: Iterable[str], where: str) -> None:
    """All of NEEDED, none that there is not, none twice."""
    names = list(names)
    if len(names) == 1 and re.search(r"[;\t]", names[0]):
        raise FileError(
            "the columns are not separated by commas", where=where, do="save it with commas"
        )
    for name in names:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=3)
            raise FileError(
                f"unknown column {name[:40]!r}",
                where=where,
                do=f"nearest: {', '.join(near)}" if near else f"known: {', '.join(COLUMNS)}",
            )
        if names.count(name) > 1:
            raise FileError(f"the column {name} is there twice", where=where)
    for name in NEEDED:
        if name not in names:
            raise FileError(
                f"there is no column {name}", where=where, why=f"needed: {', '.join(NEEDED)}"
            )


def _csv_rows(text: str, where: str) -> Iterator[Row]:
    lines = text_lines(text)
    head = next((i for i, line in enumerate(lines) if not line.startswith("#")), None)
    if head is None:
        return
    try:
        names = next(csv.reader(lines[head:], strict=True), [])
        _check_columns([name.strip() for name in names], f"{where}:{head + 1}")
        for row in csv_rows(text, where):
            cells = {(name or "").strip(): cell for name, cell in row.cells.items()}
            if None in row.cells:
                raise FileError(
                    f"more cells than the {len(names)} columns", where=row.where,
                    do="put a text with a comma in quotes; write 1200, not 1,200",
                )  # fmt: skip
            yield Row(cells, row.where)
    except csv.Error as error:
        raise FileError(f"not valid CSV: {error}", where=f"{where}:{head + 1}") from None


def _yaml_rows(text: str, where: str) -> Iterator[Row]:
    """A list of mappings, or one under the key `instances`; every value is taken as it is written."""
    try:
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise FileError(
            f"not valid YAML: {getattr(error, 'problem', error)}", where=f"{where}{line}"
        ) from None
    except RecursionError:
        raise FileError("not valid YAML: nested too deep", where=where) from None
    if isinstance(top, yaml.MappingNode):
        top = next((v for k, v in top.value if k.value == "instances"), top)
    if not isinstance(top, yaml.SequenceNode):
        raise FileError(
            "a list of machines was expected",
            where=where,
            do="write `- provider: …`, `  name: …` for each",
        )
    for item in top.value:
        at = f"{where}:{item.start_mark.line + 1}"
        if not isinstance(item, yaml.MappingNode):
            raise FileError("a mapping of columns was expected", where=at)
        _check_columns([str(key.value) for key, _ in item.value], at)
        cells: dict[str, str | None] = {}
        for key, value in item.value:
            if not isinstance(value, yaml.ScalarNode):
                raise FileError("one value was expected", where=f"{at}: {key.value}")
            cells[key.value] = "" if value.tag == "tag:yaml.org,2002:null" else value.value
        yield Row(cells, at)


def import_file(path: Path, name: str | None = None) -> tuple[Path, tuple[Instance, ...]]:
    """Checks the file and lays it over the catalog as NAME.csv; the same name replaces."""
    folder = layer_folder()
    if folder is None:
        raise UsageError(
            "there is nowhere to import to", why=f"{VARIABLE} is off", do=f"unset {VARIABLE}"
        )
    stem = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") if name is None else name
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", stem) or stem.startswith(REFRESHED):
        raise UsageError(
            f"{stem!r} cannot be the name of a layer", where="--name",
            why=f"lower-case letters, digits, - and _; not {REFRESHED}…, which refresh writes",
        )  # fmt: skip
    nodes = read_own(path)
    target = folder / f"{stem}.csv"
    others = {
        node.key: other.name
        for other, _, _ in layer_files()
        if other != target and not other.name.startswith(REFRESHED)
        for node in read_own(other)
    }
    for row, node in zip(own_rows(path), nodes, strict=True):
        if node.key in others:
            raise FileError(
                f"{node.provider}/{node.name} is in {others[node.key]} already", where=row.where,
                do=f"outlay catalog import {path} --name {others[node.key].removesuffix('.csv')}"
                "  replaces that file; or take the row out of one of them",
            )  # fmt: skip
    write_layer(target, nodes, [f"Imported from {path.name}."])
    return target, nodes


def layer_text(nodes: Iterable[Instance], head: Iterable[str] = ()) -> str:
    """The rows as CSV in COLUMNS."""
    text = io.StringIO()
    for line in head:
        text.write(f"# {line}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for node in nodes:
        writer.writerow([_CELLS[column](node) for column in COLUMNS])
    return text.getvalue()


def write_layer(path: Path, nodes: Iterable[Instance], head: Iterable[str]) -> None:
    """A file of the layer, all of it or nothing."""
    text = layer_text(nodes, head)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError("cannot be written", where=str(path), why=str(error)) from None


def _plain(value: float | str | None) -> str:
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def _scaled(field: str, unit: float) -> Callable[[Instance], str]:
    def cell(node: Instance) -> str:
        value = getattr(node, field)
        return "" if value is None else f"{value / unit:.10g}"

    return cell


def _same(field: str) -> Callable[[Instance], str]:
    return lambda node: _plain(getattr(node, field))


_CELLS: dict[str, Callable[[Instance], str]] = {column: _same(column) for column in COLUMNS} | {
    "ram_gib": _scaled("ram_bytes", GIB),
    "nvme_gb": _scaled("nvme_bytes", 1e9),
    "inter_node_gbps": _scaled("inter_node_bytes_per_s", 1e9 / 8),
}
"""Column → its cell."""

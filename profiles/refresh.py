"""`outlay catalog refresh`: today's prices through gpuhunt, provider by provider, into the person's layer.

gpuhunt publishes a catalog a provider (read without credentials), and asks some providers' own
interfaces, most of them with a key in the environment. Where a provider fails, the prices that
there were stay, with their dates.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError

from outlay.profiles.errors import MissingExtra, UnknownName, UsageError
from outlay.profiles.fetched import Fetched, keep_terms, rows_of
from outlay.profiles.offers import instances, shipped_instances
from outlay.profiles.own_offers import REFRESHED, VARIABLE, layer_folder, write_layer

PUBLISHED = {
    "aws": "aws", "azure": "azure", "gcp": "gcp", "lambda": "lambdalabs", "nebius": "nebius",
    "oracle": "oci", "runpod": "runpod", "verda": "verda", "cloudrift": "cloudrift",
}  # fmt: skip
"""Our name → gpuhunt's, of the catalogs that it publishes."""

ASKED = {
    "crusoe": ("crusoe", "CrusoeProvider"),
    "digitalocean": ("digitalocean", "DigitalOceanProvider"),
    "hotaisle": ("hotaisle", "HotAisleProvider"),
    "jarvislabs": ("jarvislabs", "JarvisLabsProvider"),
    "seeweb": ("seeweb", "SeewebProvider"),
    "vultr": ("vultr", "VultrProvider"),
}
"""Our name → gpuhunt's module and class, of the providers that are asked themselves. Not here: markets of
single machines (vastai, lium), whose offers are gone the next hour, and sandboxes (daytona)."""

TIMEOUT_S = 60.0
"""gpuhunt sets none for what it publishes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one provider."""

    provider: str
    state: Literal["refreshed", "failed", "skipped"]
    """skipped: there is no key for it in the environment."""
    text: str


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A provider's offers, or why there are none."""

    items: Sequence[Any] = ()
    date: str = ""
    source: str = ""
    why: str = ""
    skipped: bool = False


class _Heard(logging.Handler):
    """gpuhunt tells of a failed catalog in its log alone."""

    def __init__(self) -> None:
        super().__init__()
        self.why: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and isinstance(record.args, tuple) and record.args:
            self.why[str(record.args[0])] = _reason(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, HTTPError):
        error.close()  # gpuhunt leaves the answer open
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


@contextmanager
def _listening() -> Iterator[_Heard]:
    """gpuhunt's log comes here and not to the terminal; a silent server is given up."""
    logger, heard = logging.getLogger("gpuhunt"), _Heard()
    before, spread = socket.getdefaulttimeout(), logger.propagate
    logger.addHandler(heard)
    logger.propagate = False
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield heard
    finally:
        socket.setdefaulttimeout(before)
        logger.removeHandler(heard)
        logger.propagate = spread


def refresh(providers: Sequence[str], today: datetime.date) -> list[Outcome]:
    """Each provider (all that there are where none is named), in turn."""
    known = [*PUBLISHED, *ASKED]
    wanted = list(dict.fromkeys(name.strip().lower() for name in providers)) or known
    for name in wanted:
        if name not in known and name in _elsewhere():
            raise UsageError(
                f"gpuhunt has no prices of {name} that the catalog can take", where="--provider",
                why=_kept(name), do="outlay catalog import FILE.csv  takes prices of one's own",
            )  # fmt: skip
        if name not in known:
            raise UnknownName("provider of prices", name, known, where="--provider")
    folder = layer_folder()
    if folder is None:
        raise UsageError(
            "there is nowhere to write to", why=f"{VARIABLE} is off", do=f"unset {VARIABLE}"
        )
    try:
        gpuhunt = importlib.import_module("gpuhunt")
    except ImportError:
        raise MissingExtra("gpuhunt", "prices") from None
    instances()  # a layer that is broken already is told before anything is fetched
    answers = _published(gpuhunt, [name for name in wanted if name in PUBLISHED], today)
    for name in wanted:
        if name in ASKED:
            answers[name] = _asked(gpuhunt, name, today)
    outcomes = [_settle(name, answers[name], folder, today) for name in wanted]
    if not providers:
        outcomes += [
            Outcome(provider=name, state="skipped", text=f"gpuhunt has none of it; {_kept(name)}")
            for name in sorted(_elsewhere())
        ]
    return outcomes


def _elsewhere() -> set[str]:
    """Providers of the catalog that a refresh does not reach."""
    return {node.provider for node in shipped_instances()} - {*PUBLISHED, *ASKED}


def _published(gpuhunt: Any, names: Sequence[str], today: datetime.date) -> dict[str, _Answer]:
    """gpuhunt downloads all that it publishes at once; what is not wanted is let go."""
    if not names:
        return {}
    found = gpuhunt.Catalog(balance_resources=False, auto_reload=False)
    with _listening() as heard:
        try:
            found.load()
        except gpuhunt.GPUHuntError as error:
            heard.why.setdefault("", _reason(error))
    answers = {}
    for name in names:
        theirs = PUBLISHED[name]
        catalog = found.catalog.get(theirs)
        if catalog is None:
            why = heard.why.get(theirs) or heard.why.get("") or "it was not in the answer"
            answers[name] = _Answer(why=why)
        else:
            answers[name] = _Answer(
                items=catalog.items,
                date=_date_of(catalog.version, today),
                source=f"gpuhunt {_version()}, catalog {theirs} {catalog.version[:40]}",
            )
    return answers


def _date_of(version: str, today: datetime.date) -> str:
    """A published catalog's version begins with the day on which its prices were read."""
    match = re.match(r"(20\d\d)-?(\d\d)-?(\d\d)", version)
    try:
        day = datetime.date(*map(int, match.groups())) if match else today
    except ValueError:
        day = today
    return min(day, today).isoformat()


def _version() -> str:
    from importlib.metadata import version

    return version("gpuhunt")


def _asked(gpuhunt: Any, name: str, today: datetime.date) -> _Answer:
    module, kind = ASKED[name]
    with _listening():
        try:
            provider = getattr(importlib.import_module(f"gpuhunt.providers.{module}"), kind)
            found = gpuhunt.Catalog(balance_resources=False, auto_reload=False)
            found.add_provider(provider.from_env())
            items = found.query(provider=module, min_gpu_count=1)
        except gpuhunt.MissingCredsError as error:
            return _Answer(why=str(error), skipped=True)
        except Exception as error:  # whatever their answer makes of their reader
            return _Answer(why=_reason(error))
    return _Answer(
        items=items, date=today.isoformat(), source=f"gpuhunt {_version()}, asked {module}"
    )


def _settle(name: str, answer: _Answer, folder: Path, today: datetime.date) -> Outcome:
    """Writes what came; keeps what was there where nothing usable did."""
    if answer.skipped:
        return Outcome(provider=name, state="skipped", text=f"{answer.why}; {_kept(name)}")
    if answer.why:
        return Outcome(provider=name, state="failed", text=f"{answer.why}; {_kept(name)}")
    fetched = rows_of(name, answer.items, date=answer.date, source=answer.source, today=today)
    if not fetched.nodes:
        text = (
            f"no usable price among {len(answer.items)} offers{_left_out(fetched)}; {_kept(name)}"
        )
        return Outcome(provider=name, state="failed", text=text)
    before = {n.key: n for n in instances() if n.provider == name}
    nodes = [keep_terms(n, before[n.key]) if n.key in before else n for n in fetched.nodes]
    changed = sum(
        n.key in before and n.on_demand_usd_per_h != before[n.key].on_demand_usd_per_h
        for n in nodes
    )
    fresh = sum(n.key not in before for n in nodes)
    path = folder / f"{REFRESHED}{name}.csv"
    write_layer(path, nodes, [f"Fetched {today} by outlay catalog refresh: {answer.source}."])
    return Outcome(
        provider=name,
        state="refreshed",
        text=f"{len(nodes)} prices of {answer.date}, {fresh} of nodes that were not known, "
        f"{changed} changed{_left_out(fetched)}",
    )


def _left_out(fetched: Fetched) -> str:
    parts = []
    if fetched.unmatched:
        most = sorted(fetched.unmatched.items(), key=lambda pair: -pair[1])
        named = ", ".join(gpu for gpu, _ in most[:4]) + (" …" if len(most) > 4 else "")
        total = sum(fetched.unmatched.values())
        parts.append(f"{total} offers left out, which accelerator is not clear ({named})")
    if fetched.implausible:
        parts.append(f"{fetched.implausible} nodes left out, their price or count cannot be meant")
    return "".join(f"; {part}" for part in parts)


def _kept(name: str) -> str:
    """What stays in force where nothing came."""
    dates = [n.price_date for n in instances() if n.provider == name and n.on_demand_usd_per_h]
    if not dates:
        return "the catalog has no price of it"
    dated = sorted(date for date in dates if date)
    if not dated:
        return f"its {len(dates)} prices stay, undated"
    span = dated[0] if dated[0] == dated[-1] else f"{dated[0]} to {dated[-1]}"
    undated = f", {len(dates) - len(dated)} undated" if len(dated) < len(dates) else ""
    return f"its {len(dates)} prices of {span}{undated} stay"

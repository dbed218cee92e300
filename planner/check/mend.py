"""Findings → the mended documents: edits, read again, until nothing more is found that the files can say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outlay.planner.read.document import Document, KeyPath
from outlay.planner.read.edits import Edit, edited, set_to, unified_diff
from outlay.planner.read.meaning import (
    ACCELERATE,
    ARGUMENTS,
    DEEPSPEED,
    FIXED,
    LOOP,
    MAIN,
    MODEL,
    DocEdit,
    Meaning,
)
from outlay.planner.read.reader import read_meaning
from outlay.planner.rules.config import ConfigRule, Found, found_in
from outlay.planner.rules.setup import Setup, setup_of
from outlay.profiles.errors import FileError

ROUNDS = 6
"""A mend may uncover the next fault; more rounds than that would be a rule that undoes another."""
Rows = list[tuple[ConfigRule, Found]]


def level_of(row: tuple[ConfigRule, Found]) -> str:
    """illegal | ignored | changed | advice."""
    return row[1].level or row[0].level


_LINKS: tuple[tuple[str, KeyPath, str], ...] = (
    (ACCELERATE, ("deepspeed_config", "deepspeed_config_file"), DEEPSPEED),
    (MAIN, ("deepspeed_config", "deepspeed_config_file"), DEEPSPEED),
    (ARGUMENTS, ("deepspeed",), DEEPSPEED),
    (MAIN, ("args", "deepspeed_config"), DEEPSPEED),
    (MAIN, ("args", "deepspeed"), DEEPSPEED),
    (MAIN, ("launch", "deepspeed_config_file"), DEEPSPEED),
    (MAIN, ("deepspeed",), DEEPSPEED),
    (MAIN, ("launch", "config_file"), ACCELERATE),
)
"""(document, where it names another, which that is); those that are named by another come first."""


def links(meaning: Meaning) -> list[tuple[str, KeyPath, str]]:
    """Which of its documents names which."""
    documents = meaning.documents
    return [
        (holder, path, target)
        for holder, path, target in _LINKS
        if holder in documents
        and target in documents
        and isinstance(documents[holder].get(*path), str)
    ]


def with_edits(meaning: Meaning, edits: Sequence[DocEdit], kind: str) -> Meaning:
    """The configuration after the edits, read again."""
    documents = dict(meaning.documents)
    for name, document in meaning.documents.items():
        mine: list[Edit] = [e.edit for e in edits if e.document == name]
        if mine:
            documents[name] = edited(document, mine)
    _set_beside(documents, (LOOP, MODEL))
    for holder, path, target in links(meaning):
        named = str(meaning.documents[holder].get(*path))
        near = documents[holder].beside | {named: documents[target]}
        documents[holder] = replace(documents[holder], beside=near)
    _set_beside(documents, (ARGUMENTS,))
    after = read_meaning(documents[MAIN], kind)
    # a command's, where the configuration that it names is the main document
    said = {k: v for k, v in meaning.values.items() if k in ("world", "nodes") and v.place is None}
    return replace(after, values=after.values | said)


def _set_beside(documents: dict[str, Document], fixed: tuple[str, ...]) -> None:
    """What the program reads by its name: as it is now, for whoever looks beside."""
    near = {FIXED[key]: documents[key] for key in fixed if key in documents}
    for holder in (ACCELERATE, ARGUMENTS, MAIN):
        if holder in documents and near:
            beside = documents[holder].beside | near
            documents[holder] = replace(documents[holder], beside=beside)


def again(s: Setup, edits: Sequence[DocEdit]) -> Setup:
    """The setup after the edits."""
    meaning = with_edits(s.meaning, edits, s.meaning.framework)
    return setup_of(meaning, s.version, spec=s.spec, cluster=s.cluster)


@dataclass(frozen=True, kw_only=True)
class Mended:
    """What the mends of the findings make of a configuration."""

    setup: Setup
    applied: frozenset[tuple[str, str]]
    """(rule, where) of the findings whose mend is in it."""
    left: Rows
    """What still stands and is no advice."""


def mended(s: Setup, rows: Rows) -> Mended:
    """Apply every mend that is no mere advice, and look again."""
    applied: set[tuple[str, str]] = set()
    now, found = s, rows
    for _ in range(ROUNDS):
        faults = [row for row in found if level_of(row) != "advice" and row[1].edits]
        if not faults:
            break
        before = {name: d.text for name, d in now.meaning.documents.items()}
        rule = faults[0][0]
        same = [row for row in faults if row[0] is rule]
        try:
            after = again(now, [e for row in same for e in row[1].edits])
        except FileError:
            break
        if {name: d.text for name, d in after.meaning.documents.items()} == before:
            break
        applied |= {(row[0].name, row[1].where) for row in same}
        now, found = after, found_in(after)
    else:
        found = found_in(now)
    return Mended(
        setup=now, applied=frozenset(applied), left=[r for r in found if level_of(r) != "advice"]
    )


def diff_of(before: Meaning, after: Meaning) -> str:
    """Both documents' changes as one unified diff."""
    parts = []
    for name, document in before.documents.items():
        other = after.documents.get(name)
        if other is not None and other.text != document.text:
            parts.append(unified_diff(document, other, f"{document.name} (mended)"))
    return "".join(parts)


_SUFFIX = {DEEPSPEED: ".deepspeed.json", ACCELERATE: ".accelerate.yaml"}


def written_texts(before: Meaning, after: Meaning, out: str) -> dict[str, str]:
    """File name → text: OUT, and beside it each file that it names and that changed; OUT then names that.

    A file that the program finds by its name (FIXED) is written as OUT.NAME, for a person to put in its place.
    """
    documents, texts = dict(after.documents), {}
    for holder, path, target in links(after):
        document, was = documents[target], before.documents.get(target)
        if was is not None and document.text == was.text and document.on_disk:
            continue
        beside = Path(out).with_name(Path(out).stem + _SUFFIX[target])
        texts[str(beside)] = document.text
        names = documents[holder]
        named = str(beside) if names.syntax == "command" else beside.name
        documents[holder] = edited(replace(names, beside={}), [set_to(*path, value=named)])
    for key, name in FIXED.items():
        if key in documents and documents[key].text != before.documents[key].text:
            texts[str(Path(out).with_name(f"{Path(out).stem}.{name}"))] = documents[key].text
    texts[out] = documents[MAIN].text
    return texts

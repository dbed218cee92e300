"""Edits of a document's text that leave everything else as it stands: comments, order, spacing."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from outlay.planner.read.document import Document, KeyPath, Node, parse_document


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change. A later edit sees the text that the earlier ones left."""

    op: str
    """set | remove | rename | cut."""
    path: KeyPath = ()
    value: Any = None
    """The new value (set), or the new key (rename)."""
    span: tuple[int, int] | None = None
    """Of the unedited text, for cut."""


def set_to(*path: str | int, value: Any) -> Edit:
    return Edit(op="set", path=path, value=value)


def remove(*path: str | int) -> Edit:
    return Edit(op="remove", path=path)


def rename(*path: str | int, key: str) -> Edit:
    return Edit(op="rename", path=path, value=key)


def edited(document: Document, edits: Sequence[Edit]) -> Document:
    """The document after the edits. An edit of what is not there does nothing."""
    cuts = sorted({e.span for e in edits if e.op == "cut" and e.span}, reverse=True)
    text = document.text
    for start, end in cuts:
        text = text[:start] + text[end:]
    for edit in edits:
        if edit.op == "cut":
            continue
        current = _parsed(document, text)
        text = _applied(current, edit)
    return _parsed(document, text)


def _parsed(document: Document, text: str) -> Document:
    return parse_document(text, document.path, document.name, on_disk=document.on_disk)


def _applied(document: Document, edit: Edit) -> str:
    text, node = document.text, document.node(edit.path)
    if document.syntax == "command":
        return _command_applied(document, edit, node)
    if edit.op == "remove":
        return text if node is None else _without(document, edit.path, node)
    if edit.op == "rename":
        if node is None or node.key_start is None or node.key_end is None:
            return text
        key = json.dumps(edit.value) if text[node.key_start] == '"' else edit.value
        return text[: node.key_start] + key + text[node.key_end :]
    if node is not None and not (isinstance(node.value, dict) and not node.flow):
        shown = _shown(document, edit.value, node.start)
        tail = text[node.end :]
        if node.start == node.end and not text[: node.start].endswith((" ", "\n")):
            shown = " " + shown  # `key:` with nothing behind it
        return text[: node.start] + shown + tail
    if node is not None:
        text = _without(document, edit.path, node)
        document = _parsed(document, text)
    return _inserted(document, edit.path, edit.value)


def _command_applied(document: Document, edit: Edit, node: Node | None) -> str:
    """Flags: another value, without the flag, or one more behind the last."""
    text = document.text
    if edit.op == "remove":
        if node is None or node.key_start is None:
            return text
        before = re.sub(r"(?:[ \t]|\\\n)+$", "", text[: node.key_start])
        return before + text[node.end :]
    value = edit.value if isinstance(edit.value, str) else json.dumps(edit.value)
    if node is not None and edit.op == "set":
        if node.start == node.key_start and "=" in text[node.start : node.end]:
            value = text[node.start : node.end].split("=")[0] + "=" + value
        elif node.start == node.key_start:
            value = text[node.start : node.end] + " " + value
        return text[: node.start] + value + text[node.end :]
    group = document.node(edit.path[:-1])
    anchor = group if group is not None and group.children else document.node(("script",))
    if anchor is None:
        return text
    return text[: anchor.end] + f" --{edit.path[-1]} {value}" + text[anchor.end :]


def _shown(document: Document, value: Any, at: int) -> str:
    """A value as the document writes values."""
    if document.syntax == "json":
        column = at - (document.text.rfind("\n", 0, at) + 1)
        line = document.text[at - column : at]
        indent = len(line) - len(line.lstrip())
        step = _step(document)
        body = json.dumps(value, indent=step, ensure_ascii=False)
        return body.replace("\n", "\n" + " " * indent)
    if isinstance(value, dict | list):
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]


def _step(document: Document) -> int:
    """Spaces that one level of this document is indented by."""
    found = re.search(r"\n( +)\S", document.text)
    return len(found[1]) if found else 2


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _without(document: Document, path: KeyPath, node: Node) -> str:
    text = document.text
    start = node.start if node.key_start is None else node.key_start
    parent = document.node(path[:-1])
    assert parent is not None
    if not parent.flow:
        end = _line_end(text, max(_last_offset(node) - 1, start))
        return text[: _line_start(text, start)] + text[end:]
    siblings = list(parent.children.values())
    index = next(i for i, s in enumerate(siblings) if s.start == node.start)
    if index + 1 < len(siblings):
        after = siblings[index + 1]
        return text[:start] + text[after.key_start or after.start :]
    if index:
        return text[: siblings[index - 1].end] + text[node.end :]
    return text[:start].rstrip() + text[node.end :].lstrip()


def _inserted(document: Document, path: KeyPath, value: Any) -> str:
    """With the key added at the end of its parent; parents that are missing are made."""
    parent, missing = document.root, list(path)
    depth = 0
    for key in path[:-1]:
        child = parent.children.get(key)
        if child is None or not isinstance(child.value, dict):
            break
        parent, depth = child, depth + 1
    missing = list(path[depth:])
    key, rest = str(missing[0]), missing[1:]
    for inner in reversed(rest):
        value = {str(inner): value}
    replaced = document.node(path[: depth + 1])
    if replaced is not None:
        shown = _shown(document, value, replaced.start)
        return document.text[: replaced.start] + shown + document.text[replaced.end :]
    return (
        _in_braces(document, parent, key, value)
        if parent.flow
        else _in_block(document, parent, key, value)
    )


def _in_braces(document: Document, parent: Node, key: str, value: Any) -> str:
    text = document.text
    children = list(parent.children.values())
    step = _step(document)
    if not children:
        line = text[_line_start(text, parent.start) : parent.start]
        outer = len(line) - len(line.lstrip())
        body = json.dumps({key: value}, indent=step).replace("\n", "\n" + " " * outer)
        return text[: parent.start] + body + text[parent.end :]
    last = children[-1]
    first_at = children[0].key_start or children[0].start
    first = text[_line_start(text, first_at) : first_at]
    indent = len(first) - len(first.lstrip())
    one_line = bool(first.strip())
    lead = " " if one_line else "\n" + " " * indent
    if document.syntax == "json":
        shown = json.dumps(value, indent=None if one_line else step)
        shown = f"{json.dumps(key)}: " + shown.replace("\n", "\n" + " " * indent)
    else:
        shown = f"{key}: {json.dumps(value)}"
    return text[: last.end] + "," + lead + shown + text[last.end :]


def _in_block(document: Document, parent: Node, key: str, value: Any) -> str:
    text = document.text
    children = [
        c for c in parent.children.values() if parent.start <= (c.key_start or 0) <= parent.end
    ]
    first = children[0].key_start if children and children[0].key_start is not None else 0
    indent = first - _line_start(text, first)
    body = yaml.safe_dump({key: value}, sort_keys=False, width=1000)
    body = "".join(" " * indent + line for line in body.splitlines(keepends=True))
    last = max((_last_offset(c) for c in children), default=len(text))
    at = _line_end(text, max(last - 1, 0))
    head = text[:at]
    if head and not head.endswith("\n"):
        head += "\n"
    return head + body + text[at:]


def _last_offset(node: Node) -> int:
    """Where the last scalar of a node ends: block nodes themselves end at the next key."""
    if node.children and not node.flow:
        return max(_last_offset(c) for c in node.children.values())
    return max(node.end, node.key_end or 0)


def unified_diff(before: Document, after: Document, to: str) -> str:
    """As `diff -u` prints it; empty where nothing changed."""
    return "".join(
        difflib.unified_diff(
            before.text.splitlines(keepends=True),
            after.text.splitlines(keepends=True),
            before.name,
            to,
        )
    )

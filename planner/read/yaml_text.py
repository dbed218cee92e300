"""YAML with the place of every value, from PyYAML's node marks."""

from __future__ import annotations

from typing import Any

import yaml

from outlay.planner.read.document import MOST_DEPTH, MOST_NODES, KeyPath, Node, Twice
from outlay.profiles.errors import FileError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"


class _Builder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.twice: list[Twice] = []
        self.scalars = yaml.constructor.SafeConstructor()

    def fail(self, what: str, node: yaml.Node) -> FileError:
        return FileError(f"not valid YAML: {what}", where=f"{self.name}:{node.start_mark.line + 1}")

    def build(self, node: yaml.Node, path: KeyPath, key: yaml.Node | None) -> Node:
        self.count += 1
        if len(path) > MOST_DEPTH or self.count > MOST_NODES:
            raise self.fail("too deep or too large for a configuration", node)
        place: dict[str, Any] = {
            "start": node.start_mark.index, "end": node.end_mark.index,
            "line": node.start_mark.line + 1,
        }  # fmt: skip
        if key is not None:
            place |= {
                "key_start": key.start_mark.index, "key_end": key.end_mark.index,
                "key_line": key.start_mark.line + 1,
            }  # fmt: skip
        if isinstance(node, yaml.MappingNode):
            children = self.mapping(node, path)
            value: Any = {str(k): c.value for k, c in children.items()}
            return Node(value=value, flow=bool(node.flow_style), children=children, **place)
        if isinstance(node, yaml.SequenceNode):
            items: dict[str | int, Node] = {
                i: self.build(n, (*path, i), None) for i, n in enumerate(node.value)
            }
            value = [c.value for c in items.values()]
            return Node(value=value, flow=bool(node.flow_style), children=items, **place)
        return Node(value=self.scalar(node), **place)

    def scalar(self, node: yaml.Node) -> Any:
        try:
            return self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            what = str(getattr(error, "problem", None) or error)
            raise self.fail(what, node) from None

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str | int, Node]:
        children: dict[str | int, Node] = {}
        merged: dict[str | int, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                sources = (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                for source in reversed(sources):
                    if not isinstance(source, yaml.MappingNode):
                        raise self.fail("<< takes a mapping", value_node)
                    merged |= self.mapping(source, path)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.fail("a key must be a word", key_node)
            key = str(key_node.value)
            child = self.build(value_node, (*path, key), key_node)
            if key in children:
                line = child.key_line or child.line
                self.twice.append(Twice(path=(*path, key), line=line, earlier=children[key]))
            children[key] = child
        return {**{k: v for k, v in merged.items() if k not in children}, **children}


def parse_yaml(text: str, name: str) -> tuple[Node, list[Twice], list[tuple[int, int, str]]]:
    """(root, keys that stand twice, nothing). Raises FileError."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise FileError("the file has no keys, only comments", where=name)
        builder = _Builder(name)
        return builder.build(node, (), None), builder.twice, []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        context = getattr(error, "context", None) or ""
        raise FileError(
            f"not valid YAML: {problem}",
            where=f"{name}:{mark.line + 1}" if mark else name,
            why=f"at column {mark.column + 1} {context}".rstrip() if mark else "",
            do="indent with spaces" if "\\t" in problem else "",
        ) from None
    except RecursionError:
        raise FileError("not valid YAML: nested without end", where=name) from None

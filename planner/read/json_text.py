"""JSON with the place of every value. Comments and trailing commas are read and remembered.

DeepSpeed's own loader takes them (hjson, `runtime/config.py:444`); transformers and accelerate read the
same file with a strict parser. So both are needed: the value, and that a strict reader would refuse it.
"""

from __future__ import annotations

import re
from json import decoder
from json.decoder import JSONDecodeError
from typing import Any, NoReturn

from outlay.planner.read.document import MOST_DEPTH, MOST_NODES, KeyPath, Node, Twice
from outlay.profiles.errors import FileError

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMENT = re.compile(r"//[^\n]*|#[^\n]*|/\*.*?\*/", re.S)
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
_WORD = re.compile(r"[A-Za-z_$][\w$.-]*")
_LITERALS = {"True": "true", "False": "false", "None": "null"}


class _Scanner:
    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.nodes = 0
        self.twice: list[Twice] = []
        self.relaxed: list[tuple[int, int, str]] = []

    def line(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def failure(self, what: str, at: int, do: str = "") -> FileError:
        start = self.text.rfind("\n", 0, at) + 1
        return FileError(
            f"not valid JSON: {what}",
            where=f"{self.name}:{self.line(at)}",
            why=f"at column {at - start + 1}",
            do=do,
        )

    def fail(self, what: str, at: int, do: str = "") -> NoReturn:
        raise self.failure(what, at, do)

    def skip(self, at: int) -> int:
        """Past white space and comments."""
        while True:
            at = _SPACE.match(self.text, at).end()  # type: ignore[union-attr]
            comment = _COMMENT.match(self.text, at)
            if comment is None:
                return at
            self.relaxed.append((at, comment.end(), "a comment"))
            at = comment.end()

    def peek(self, at: int) -> str:
        return self.text[at : at + 1]

    def string(self, at: int) -> tuple[str, int]:
        try:
            text, end = decoder.scanstring(self.text, at + 1, True)  # type: ignore[attr-defined]
            return str(text), int(end)
        except JSONDecodeError as error:
            self.fail(error.msg.lower(), error.pos)

    def value(self, at: int, path: KeyPath, key: tuple[int, int] | None) -> Node:
        self.nodes += 1
        if len(path) > MOST_DEPTH or self.nodes > MOST_NODES:
            self.fail("too deep or too large for a configuration", at)
        place: dict[str, Any] = {"start": at, "line": self.line(at)}
        if key is not None:
            place |= {"key_start": key[0], "key_end": key[1], "key_line": self.line(key[0])}
        char = self.peek(at)
        if char == "{":
            return self.mapping(at, path, place)
        if char == "[":
            return self.sequence(at, path, place)
        if char == '"':
            text, end = self.string(at)
            return Node(value=text, end=end, **place)
        if number := _NUMBER.match(self.text, at):
            return Node(value=self.number(number), end=number.end(), **place)
        word = _WORD.match(self.text, at)
        if word is not None and word[0] in _WORDS:
            return Node(value=_WORDS[word[0]], end=word.end(), **place)
        if word is not None:
            wanted = _LITERALS.get(word[0])
            do = f"write {wanted}" if wanted else f'write "{word[0]}" if a text is meant'
            self.fail(f"{word[0]!r} is no JSON value", at, do)
        raise self.failure("a value was expected" if char else "the file ends too early", at)

    def number(self, match: re.Match[str]) -> float | int:
        try:
            whole = not (match[1] or match[2])
            return int(match[0]) if whole else float(match[0])
        except ValueError:
            self.fail("a number of that many digits makes no sense", match.start())

    def mapping(self, at: int, path: KeyPath, place: dict[str, Any]) -> Node:
        children: dict[str | int, Node] = {}
        end = self.skip(at + 1)
        while self.peek(end) != "}":
            key_at = end
            if self.peek(end) != '"':
                found = _WORD.match(self.text, end)
                do = f'write "{found[0]}"' if found else ""
                what = "a key in double quotes was expected"
                self.fail(what if self.peek(end) else "the file ends inside a mapping", end, do)
            key, end = self.string(end)
            key_end = end
            end = self.skip(end)
            if self.peek(end) != ":":
                self.fail(f"a colon was expected after {key!r}", end)
            child = self.value(self.skip(end + 1), (*path, key), (key_at, key_end))
            if key in children:
                line = child.key_line or child.line
                self.twice.append(Twice(path=(*path, key), line=line, earlier=children[key]))
            children[key] = child
            end = self.comma(child.end, "}")
        value = {k: c.value for k, c in children.items()}
        return Node(value=value, end=end + 1, flow=True, children=children, **place)

    def sequence(self, at: int, path: KeyPath, place: dict[str, Any]) -> Node:
        children: dict[str | int, Node] = {}
        end = self.skip(at + 1)
        while self.peek(end) != "]":
            child = self.value(end, (*path, len(children)), None)
            children[len(children)] = child
            end = self.comma(child.end, "]")
        value = [c.value for c in children.values()]
        return Node(value=value, end=end + 1, flow=True, children=children, **place)

    def comma(self, at: int, closing: str) -> int:
        """Past the comma between two items; a trailing one is remembered."""
        end = self.skip(at)
        char = self.peek(end)
        if char == closing:
            return end
        if char != ",":
            what = f"a comma or {closing} was expected" if char else "the file ends too early"
            self.fail(what, end)
        after = self.skip(end + 1)
        if self.peek(after) == closing:
            self.relaxed.append((end, end + 1, "a trailing comma"))
        return after


def parse_json(text: str, name: str) -> tuple[Node, list[Twice], list[tuple[int, int, str]]]:
    """(root, keys that stand twice, what only a lenient reader takes). Raises FileError."""
    scanner = _Scanner(text, name)
    root = scanner.value(scanner.skip(0), (), None)
    rest = scanner.skip(root.end)
    if rest < len(text):
        scanner.fail("more text after the end", rest)
    return root, scanner.twice, sorted(set(scanner.relaxed))

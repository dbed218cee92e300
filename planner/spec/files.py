"""Files in and out: YAML or JSON → checked dataclasses, with `file:line: key` in every complaint."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import yaml

from outlay.profiles.errors import FileError

T = TypeVar("T")

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numpy scalars → dicts, lists, Python numbers, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        return value.item()
    return value


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file whose top level is a mapping. Raises FileError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise FileError("this is a folder, a file was expected", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise FileError("not a text file", where=str(path), why=str(error)) from None
    except OSError as error:
        raise FileError("cannot be read", where=str(path), why=str(error)) from None
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except json.JSONDecodeError as error:
        raise FileError(f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise FileError(
            f"not valid YAML: {getattr(error, 'problem', error)}", where=f"{path}{line}"
        ) from None
    if not isinstance(value, dict):
        kind = "nothing" if value is None else type(value).__name__
        raise FileError(f"a mapping of keys was expected, found {kind}", where=str(path))
    return value


def check_schema(value: dict[str, Any], expected: str, path: str | Path) -> None:
    """Refuse a file of another format or of a version that this outlay does not know."""
    found = value.get("schema")
    if found != expected:
        raise FileError(
            f"schema is {found!r}, expected {expected!r}",
            where=line_of(path, ("schema",)),
            do="pass the right kind of file, or make it again with this version of outlay",
        )


def parse(kind: type[T], value: Any, *, path: str | Path) -> T:
    """Check a mapping against a dataclass: types, required keys, no unknown keys."""
    from pydantic import TypeAdapter, ValidationError

    _forbid_extra(kind)
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        keys = tuple(k for k in first["loc"] if not (isinstance(k, str) and k[:1].isupper()))
        more = error.error_count() - 1
        shown = first.get("input")
        found = "" if isinstance(shown, dict | list) else f"; found {shown!r}"
        raise FileError(
            f"{'.'.join(map(str, keys)) or kind.__name__}: {first['msg']}{found}",
            where=line_of(path, keys),
            why=f"and {more} more" if more else "",
        ) from None


def _forbid_extra(kind: Any, seen: set[Any] | None = None) -> None:
    """Make pydantic refuse unknown keys in this dataclass and all that it holds."""
    seen = set() if seen is None else seen
    if kind in seen:
        return
    seen.add(kind)
    if dataclasses.is_dataclass(kind):
        kind.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]
        import typing

        for hint in typing.get_type_hints(kind).values():
            _forbid_extra(hint, seen)
    else:
        for inner in getattr(kind, "__args__", ()):
            _forbid_extra(inner, seen)


def line_of(path: str | Path, keys: tuple[Any, ...]) -> str:
    """`path:line` of a nested key in a YAML or JSON file; the nearest parent where it is missing."""
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return str(path)
    line = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(key):
                    line, node = key_node.start_mark.line + 1, value_node
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return f"{path}:{line}" if line else str(path)


def to_yaml(value: Any) -> str:
    """YAML in the order of the fields, one document."""
    return yaml.dump(plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_json(value: Any) -> str:
    """JSON, indented, ending in a newline. NaN is refused: it is not JSON."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def require_new(path: str | Path, text: str) -> None:
    """Raise FileError where another text is there: a configuration may have been edited by hand.

    Files that only outlay writes (plan.yaml, estimates) are replaced; what other programs read is not.
    """
    target = Path(path)
    try:
        same = not target.is_file() or target.read_bytes() == text.encode()
    except OSError as error:
        raise FileError("cannot be read", where=str(path), why=error.strerror or "") from None
    if not same:
        raise FileError(
            "there is another file already", where=str(path), do="name a new file, or remove it"
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing: a temporary beside it, fsync, rename. A link's target is replaced, not
    the link; a device or a pipe is written into."""
    path = Path(path)
    try:
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("w", encoding="utf-8") as out:
                out.write(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FileError("cannot be written", where=str(path), why=error.strerror or "") from None

"""Rows and tokens of a data file or folder: exactly with a tokenizer, else by measured bytes a token.

A row is a line of .jsonl and .txt, a record of .csv and .parquet, and a whole file of any other text.
"""

from __future__ import annotations

import codecs
import csv
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from outlay.planner.bytes_per_token import bytes_per_token
from outlay.profiles.errors import FileError, UsageError
from outlay.profiles.units import format_bytes, format_count

WHOLE_BYTES = 256 * 2**20
"""Data of up to this size is read whole; of more, PIECES pieces are, evenly spread."""
WHOLE_WITH_TOKENIZER_BYTES = 2 * 2**30
"""The same where every token is asked for."""
PIECES = 64
PIECE_BYTES = 2 * 2**20
ROWS = (".jsonl", ".ndjson", ".csv", ".parquet")
TEXT_KEYS = ("text", "content")
"""Where a row keeps its text, looked for in this order; then chats, then pairs of prompt and answer."""
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "input", "output"),
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"),
)  # fmt: skip
CHATS = ("messages", "conversations")
FOREIGN_SHARE = 0.1
"""Of bytes outside ASCII: beyond it, text is not of the kind that bytes a token were measured on."""
Z90 = 1.645
Measure = Callable[[list[str]], list[int]]


@dataclass(frozen=True, kw_only=True)
class DataCount:
    """What is in the data. Token figures count one end-of-text token a row."""

    rows: int
    text_bytes: int
    tokens: int
    tokens_low: int
    tokens_high: int
    """By the most and the fewest bytes a token that were seen; both the count where all were counted."""
    row_tokens: np.ndarray[Any, np.dtype[np.float64]]
    """Lengths of the rows that were read."""
    read_fraction: float
    """Of the bytes on disk."""
    source: str

    @property
    def exact(self) -> bool:
        return self.tokens_low == self.tokens_high


@dataclass(frozen=True, kw_only=True)
class Padding:
    """One epoch with a row a sequence, each cut or padded to the sequence length."""

    computed: int
    """Tokens that the hardware works on."""
    trained: int
    truncated: int
    """Tokens of rows longer than the sequence, which are lost."""
    rows_cut: int


def count_data(
    path: str | Path, *, tokenizer: str | None = None, whole_bytes: int | None = None
) -> DataCount:
    """Raises FileError with the line where there is one."""
    files = _files(Path(path).expanduser())
    if whole_bytes is None:
        whole_bytes = WHOLE_BYTES if tokenizer is None else WHOLE_WITH_TOKENIZER_BYTES
    stats = [f.stat() for f in files]
    stamps = tuple((s.st_size, s.st_mtime_ns) for s in stats)
    return _counted(str(path), tuple(files), stamps, tokenizer, whole_bytes)


@lru_cache(maxsize=8)
def _counted(
    path: str, files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], tokenizer: str | None,
    whole_bytes: int,
) -> DataCount:  # fmt: skip
    """Once for files that have not changed: `outlay size` asks for the job more than once."""
    skipped = {f for f in files if len(files) > 1 and not (_has_rows(f) or _is_text(f))}
    on_disk = sum(stamps[i][0] for i, f in enumerate(files) if f not in skipped)
    measure = None if tokenizer is None else _measure(tokenizer)
    share = min(1.0, PIECES * PIECE_BYTES / on_disk) if on_disk > whole_bytes else 1.0
    lengths, sizes, pieces, foreign, read = array("d"), array("d"), [], 0, 0
    for file in (f for f in files if f not in skipped):
        for texts, raw in _pieces(file, share):
            here = [len(t.encode("utf-8", "surrogatepass")) for t in texts]
            foreign += sum(n - len(t) for n, t in zip(here, texts, strict=True) if not t.isascii())
            counted = [float(n + 1) for n in measure(texts)] if measure else []
            lengths.extend(counted)
            sizes.extend(here)
            pieces.append((raw, len(texts), sum(here), sum(counted)))
            read += raw
    if not sizes or not sum(sizes):
        raise FileError("no text in it", where=path, why=f"{len(files)} files were read")
    total = _total(pieces, lengths, sizes, on_disk if share < 1 else read, foreign, tokenizer)
    if not skipped:
        return total
    left = f"; {len(skipped)} of {len(files)} files are not text and left out ({min(skipped).name})"
    return replace(total, source=total.source + left)


def _has_rows(file: Path) -> bool:
    return file.suffix.lower() in ROWS


def _is_text(file: Path) -> bool:
    """By its first bytes; what turns out otherwise later is an error with its line."""
    try:
        with file.open("rb") as handle:
            start = handle.read(2**16)
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except (OSError, UnicodeDecodeError):
        return False
    return b"\0" not in start


def _total(
    pieces: list[tuple[int, int, int, float]], lengths: array[float], sizes: array[float],
    on_disk: int, foreign: int, tokenizer: str | None,
) -> DataCount:  # fmt: skip
    raw, rows, text, tokens = (float(sum(p[i] for p in pieces)) for i in range(4))
    scale = on_disk / raw
    known = bytes_per_token()
    if tokenizer is not None:
        row_tokens = np.frombuffer(lengths)
        low = high = tokens
        source = f"counted with {tokenizer}"
    else:
        size = np.frombuffer(sizes)
        row_tokens = size / known.expected + 1
        tokens, low, high = (
            text / r + rows for r in (known.expected, known.high, known.low)
        )  # fmt: skip
        source = (
            f"estimated at {known.expected:.2f} bytes a token ({known.low:.2f} to {known.high:.2f} seen: "
            f"{known.source}); "
            "--tokenizer counts them"
        )
        if foreign > FOREIGN_SHARE * text:
            source += (
                f"; {foreign / text:.0%} of its bytes are beyond one a character: no ratio was measured for such "
                "text, the interval does not hold"
            )
    if scale > 1.0001:
        error = _sampling_error(pieces)
        low, high = low * max(0.0, 1 - error), high * (1 + error)
        source += f"; {1 / scale:.1%} of {format_bytes(on_disk)} was read, in pieces (±{error:.1%} for that)"
    return DataCount(
        rows=round(rows * scale), text_bytes=round(text * scale), tokens=round(tokens * scale),
        tokens_low=int(low * scale), tokens_high=round(high * scale), row_tokens=row_tokens,
        read_fraction=min(1.0, 1 / scale), source=source,
    )  # fmt: skip


def _sampling_error(pieces: list[tuple[int, int, int, float]]) -> float:
    """Half the 90 % interval of a ratio estimate, relative: tokens (or text) a byte on disk vary by piece."""
    raw = np.array([p[0] for p in pieces], float)
    got = np.array([p[3] or p[2] for p in pieces], float)
    if len(raw) < 2:
        return 1.0
    rest = got - got.sum() / raw.sum() * raw
    return float(Z90 * np.sqrt(len(raw) / (len(raw) - 1) * (rest**2).sum()) / got.sum())


def padding(count: DataCount, seq_len: int) -> Padding:
    """What one epoch costs without packing."""
    fits = np.minimum(count.row_tokens, seq_len)
    whole = count.rows / len(count.row_tokens)
    return Padding(
        computed=count.rows * seq_len, trained=round(float(fits.sum()) * whole),
        truncated=round(float((count.row_tokens - fits).sum()) * whole),
        rows_cut=round(float((count.row_tokens > seq_len).sum()) * whole),
    )  # fmt: skip


def describe(count: DataCount) -> str:
    """`12,000 rows, 3.1M (2.5M to 4.0M) tokens`."""
    text = f"{count.rows:,} rows, {format_count(count.tokens)}"
    if not count.exact:
        text += f" ({format_count(count.tokens_low)} to {format_count(count.tokens_high)})"
    return text + " tokens"


def _measure(reference: str) -> Measure:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError(
            "counting tokens exactly needs the package tokenizers, which is not installed",
            where="--tokenizer", do="pip install tokenizers; or leave --tokenizer out for an estimate",
        ) from None  # fmt: skip
    path = Path(reference).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileError("no such tokenizer", where=str(path), do="pass a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # the library raises plain Exception for every kind of bad file
    except Exception as error:
        raise FileError("not a tokenizer.json", where=str(path), why=str(error)) from None
    return lambda texts: [
        len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)
    ]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        found = [path]
    elif path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file())
        found = [p for p in inside if not any(x.startswith(".") for x in p.relative_to(path).parts)]
    else:
        raise FileError("no such file or folder", where=str(path), do="pass --data FILE or FOLDER")
    if not found:
        raise FileError("the folder holds no files", where=str(path))
    for file in found:
        if file.stat().st_size == 0 and len(found) == 1:
            raise FileError("the file is empty", where=str(file))
    return [f for f in found if f.stat().st_size]


def _pieces(file: Path, share: float) -> Iterator[tuple[list[str], int]]:
    """(texts of rows, bytes on disk they took), a piece at a time."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(file, share)
        elif suffix == ".csv":
            yield from _csv(file, share)
        elif suffix in (".jsonl", ".ndjson"):
            for lines, first, raw in _line_pieces(file, share):
                yield [_json_text(x, file, first, i) for i, x in enumerate(lines) if x.strip()], raw
        elif suffix == ".txt" or file.stat().st_size > PIECE_BYTES:
            for lines, first, raw in _line_pieces(file, share):
                yield [_decoded(x, file, first, i) for i, x in enumerate(lines) if x.strip()], raw
        else:
            yield [_decoded(file.read_bytes(), file, 1, 0)], file.stat().st_size
    except OSError as error:
        raise FileError("cannot be read", where=str(file), why=str(error)) from None


def _line_pieces(file: Path, share: float) -> Iterator[tuple[list[bytes], int | None, int]]:
    """(lines, number of the first where it is known, their bytes): the whole file, or a share of it
    in pieces evenly spread, each from a line start to a line end."""
    size = file.stat().st_size
    count = max(1, -(-size // PIECE_BYTES)) if share >= 1 else max(1, round(size * share / PIECE_BYTES))  # fmt: skip
    with file.open("rb") as handle:
        line = 1
        for i in range(count):
            if share < 1:
                handle.seek(size * i // count)
                if i:
                    handle.readline()
            lines = handle.readlines(PIECE_BYTES)
            raw = sum(map(len, lines))
            if not lines:
                return
            yield lines, (line if share >= 1 or i == 0 else None), raw
            line += len(lines)


def _where(file: Path, first: int | None, i: int) -> str:
    return f"{file}:{first + i}" if first is not None else str(file)


def _decoded(line: bytes, file: Path, first: int | None, i: int) -> str:
    if b"\0" in line:
        raise FileError(
            "a binary file", where=_where(file, first, i), why="it has zero bytes",
            do="pass .jsonl, .txt, .csv, .parquet, or a folder of text",
        )  # fmt: skip
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError("not UTF-8 text", where=_where(file, first, i), why=str(error)) from None


def _json_text(line: bytes, file: Path, first: int | None, i: int) -> str:
    where = _where(file, first, i)
    text = _decoded(line, file, first, i)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError("not a line of JSON", where=where, why=str(error)) from None
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise FileError(f"a row has to be an object, this is a {type(row).__name__}", where=where)
    return row_text(row, where)


def row_text(row: dict[str, Any], where: str) -> str:
    """All the text of a row: its text, its chat's messages, or prompt and answer, joined."""
    for key in TEXT_KEYS:
        if isinstance(row.get(key), str):
            return str(row[key])
    for key in CHATS:
        if isinstance(row.get(key), list):
            said = [m.get("content", m.get("value")) for m in row[key] if isinstance(m, dict)]
            return "\n".join(s for s in said if isinstance(s, str))
    for keys in PAIRS:
        if all(isinstance(row.get(k), str) for k in keys):
            return "\n".join(row[k] for k in keys)
    found = ", ".join(map(str, list(row)[:8])) or "none"
    raise _no_text(found, where)


def _no_text(found: str, where: str) -> FileError:
    pairs = ", ".join("+".join(p) for p in PAIRS)
    return FileError(
        "the row has no text", where=where, why=f"its columns: {found}",
        do=f"name a column {' or '.join(TEXT_KEYS)}, or have {', '.join(CHATS)}, {pairs}",
    )  # fmt: skip


def _csv(file: Path, share: float) -> Iterator[tuple[list[str], int]]:
    """Records may span lines, so a large file is read from its start only."""
    size = file.stat().st_size
    limit = size if share >= 1 else max(PIECE_BYTES, round(size * share))
    csv.field_size_limit(2**31 - 1)
    with file.open("rb") as handle:
        rows = csv.DictReader(_text_lines(handle, file))
        texts, start = [], 0
        try:
            for row in rows:
                texts.append(row_text(_known(row), f"{file}:{rows.line_num}"))
                if (at := handle.tell()) - start >= PIECE_BYTES:
                    yield texts, at - start
                    texts, start = [], at
                    if at >= limit:
                        return
        except csv.Error as error:
            raise FileError("not CSV", where=f"{file}:{rows.line_num}", why=str(error)) from None
        if texts:
            yield texts, handle.tell() - start


def _known(row: dict[Any, Any]) -> dict[str, Any]:
    """Without what csv gives where a record is shorter or longer than the header."""
    return {k: v for k, v in row.items() if k is not None and v is not None}


def _text_lines(handle: Iterable[bytes], file: Path) -> Iterator[str]:
    for i, line in enumerate(handle):
        yield _decoded(line, file, 1, i)


def _parquet(file: Path, share: float) -> Iterator[tuple[list[str], int]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(
            "reading .parquet needs the package pyarrow, which is not installed", where=str(file),
            do="pip install pyarrow; or pass .jsonl",
        ) from None  # fmt: skip
    try:
        table = pq.ParquetFile(file)
        groups = table.num_row_groups
        size, taken = file.stat().st_size, max(1, round(groups * share))
        for i in sorted({g * groups // taken for g in range(taken)}) if groups else []:
            rows = table.read_row_group(i).to_pylist()
            texts = [row_text(row, f"{file}: row group {i}, row {j}") for j, row in enumerate(rows)]
            yield texts, round(size / groups)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise FileError("not a parquet file", where=str(file), why=str(error)) from None

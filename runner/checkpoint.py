"""Checkpoints that survive a crash at any moment.

    ROOT/step-00000123.partial/    being written; whatever has this ending is worth nothing
    ROOT/step-00000123/            whole: manifest.json names each file with its size and hash

Written by all ranks into the partial folder, flushed to the disk, then renamed. The folder must be
one that every rank sees. A resume takes the newest folder that verifies, never `latest`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from outlay.planner.spec.files import plain, write_text
from outlay.profiles.errors import CheckpointError

if TYPE_CHECKING:
    from outlay.runner.engine import Engine

SCHEMA_MANIFEST = "outlay/manifest@1"
MANIFEST = "manifest.json"
MANIFEST_KEYS = (
    "schema",
    "created",
    "step",
    "tokens",
    "data",
    "spent",
    "rng",
    "config_sha256",
    "strategy",
    "ranks",
    "versions",
    "files",
    "sha256",
)
"""In order. `sha256` is that of the manifest itself without this key."""
_PACKAGES = ("outlay", "torch", "deepspeed", "transformers", "numpy")
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL, _REPLACED = ".partial", ".replaced"
_CHUNK_BYTES = 1 << 22

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A folder that looks like a checkpoint and is none."""

    path: Path
    reason: str


def folder_name(step: int) -> str:
    """`step-00000123`."""
    return f"step-{step:08d}"


def save_checkpoint(
    engine: Engine, root: Path, step: int, state: dict[str, Any], *, keep: int = 2
) -> Path:
    """Collective: write, flush, hash, rename, and drop all but the newest `keep` checkpoints.

    `state` (JSON) comes back from `load_checkpoint`; its `tokens` and `data` (which data; the
    position in it follows from the step) are in the manifest too. Raises CheckpointError on every
    rank where rank 0 could not write.
    """
    final, partial = root / folder_name(step), root / (folder_name(step) + _PARTIAL)
    _on_rank_0(engine, final, lambda: _make_empty(partial))
    engine.save(partial, state)
    files = _seal_files(engine, partial)
    _on_rank_0(engine, final, lambda: _publish(engine, partial, final, step, state, files, keep))
    return final


def load_checkpoint(engine: Engine, folder: Path) -> dict[str, Any]:
    """Collective: check every file (shared among the ranks), then load into a fresh engine."""
    problems = _gather(
        engine, _problem_of(lambda: _verify_share(folder, engine.rank, engine.world))
    )
    first = next((problem for problem in problems if problem), None)
    if first is not None:
        raise first
    return engine.load(folder)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there, whole and unchanged."""
    _verify_share(folder, 0, 1)


def newest_valid(root: Path) -> tuple[Path | None, list[Rejected]]:
    """The newest checkpoint that verifies, and those newer than it that do not, with reasons."""
    rejected: list[Rejected] = []
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            rejected.append(Rejected(path=folder, reason=str(error)))
        else:
            return folder, rejected
    return None, rejected


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first; partial ones are not among them."""
    if not root.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in root.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))
    ]
    return [path for _, path in sorted(found)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, itself checked. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError("no manifest", where=str(path), why=str(error)) from None
    try:
        manifest: dict[str, Any] = json.loads(raw)
        found = manifest["sha256"]
        expected = _manifest_hash(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the manifest is damaged", where=str(path), why=repr(error)) from None
    if manifest.get("schema") != SCHEMA_MANIFEST:
        raise CheckpointError(
            f"schema is {manifest.get('schema')!r}, expected {SCHEMA_MANIFEST!r}", where=str(path)
        )
    if found != expected:
        raise CheckpointError(
            "the manifest is damaged",
            where=str(path),
            why=f"sha256 expected {found}, found {expected}",
        )
    return manifest


def _verify_share(folder: Path, rank: int, world: int) -> None:
    for entry in read_manifest(folder)["files"][rank::world]:
        path = folder / entry["path"]
        try:
            size = path.stat().st_size
        except OSError:
            raise CheckpointError(
                "a file is missing",
                where=str(path),
                why=f"expected {entry['bytes']} bytes, found none",
            ) from None
        if size != entry["bytes"]:
            raise CheckpointError(
                "a file has another size",
                where=str(path),
                why=f"expected {entry['bytes']} bytes, found {size}",
            )
        found = _sha256(path)
        if found != entry["sha256"]:
            raise CheckpointError(
                "a file has changed",
                where=str(path),
                why=f"expected sha256 {entry['sha256']}, found {found}",
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError("a file cannot be read", where=str(path), why=str(error)) from None
    return digest.hexdigest()


def _manifest_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _seal_files(engine: Engine, partial: Path) -> list[dict[str, Any]]:
    """Flush and hash every file, each by one rank; the entries of all, by path."""
    from outlay.runner.export import sync_file

    def seal() -> list[dict[str, Any]]:
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        entries = []
        for path in paths[engine.rank :: engine.world]:
            sync_file(path)
            name = path.relative_to(partial).as_posix()
            entries.append({"path": name, "bytes": path.stat().st_size, "sha256": _sha256(path)})
        return entries

    entries: list[dict[str, Any]] = []
    for share in _gather(engine, _value_or_problem(seal, partial)):
        if isinstance(share, CheckpointError):
            raise share
        entries += share
    return sorted(entries, key=lambda entry: str(entry["path"]))


def _publish(
    engine: Engine,
    partial: Path,
    final: Path,
    step: int,
    state: dict[str, Any],
    files: list[dict[str, Any]],
    keep: int,
) -> None:
    from outlay.runner.export import sync_folder

    plan = engine.plan
    manifest: dict[str, Any] = {
        "schema": SCHEMA_MANIFEST,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "tokens": state.get("tokens"),
        "data": state.get("data"),
        "spent": state.get("spent"),
        "rng": "rng/",
        "config_sha256": config_hash(plan.deepspeed, plan.model.config),
        "strategy": plain(plan.strategy),
        "ranks": engine.world,
        "versions": _versions(),
        "files": files,
    }
    manifest["sha256"] = _manifest_hash(manifest)
    write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for folder in {partial, *(path.parent for path in partial.rglob("*"))}:
        sync_folder(folder)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    _drop_old(final.parent, keep)


def _drop_old(root: Path, keep: int) -> None:
    """All but the newest `keep`, and what a crash left half-written or half-replaced."""
    for path in checkpoints(root)[:-keep]:
        # A folder that is half deleted must not look like a damaged checkpoint.
        dying = path.with_name(path.name + _REPLACED)
        path.rename(dying)
    for path in root.iterdir():
        if path.is_dir() and path.name.endswith((_PARTIAL, _REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


def config_hash(*parts: dict[str, Any]) -> str:
    """Of the DeepSpeed configuration and the model's, so that a resume under another is noticed."""
    text = json.dumps([plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _gather(engine: Engine, mine: T) -> list[T]:
    import torch

    everyone: list[Any] = [None] * engine.world
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _value_or_problem(act: Callable[[], T], where: Path) -> T | CheckpointError:
    try:
        return act()
    except OSError as error:
        return CheckpointError("the checkpoint cannot be written", where=str(where), why=str(error))
    except CheckpointError as error:
        return error


def _problem_of(act: Callable[[], None]) -> CheckpointError | None:
    try:
        act()
    except CheckpointError as error:
        return error
    return None


def _on_rank_0(engine: Engine, where: Path, act: Callable[[], None]) -> None:
    """Rank 0 acts, the others wait; its failure is everybody's."""
    problem = None
    if engine.rank == 0:
        outcome = _value_or_problem(act, where)
        problem = outcome if isinstance(outcome, CheckpointError) else None
    problems: Iterable[CheckpointError | None] = _gather(engine, problem)
    for found in problems:
        if found is not None:
            raise found

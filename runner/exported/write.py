"""An export, whole or not at all: weights, config, tokenizer, card."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from outlay.planner.estimate.compression import exported_bytes
from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.files import plain, to_json, write_text
from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import FileError, UsageError
from outlay.runner.evaluate.load import Folder, read_folder
from outlay.runner.export import sync_file, sync_folder
from outlay.runner.exported import card
from outlay.runner.exported.matrices import Linear
from outlay.runner.exported.packed import copy_beside, write_int8, write_packed
from outlay.runner.exported.source import Source, read_record


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """How each linear module is stored; those not named stay dense."""

    name: str
    """none, int8, int8-dynamic, int4:gN or mixed."""
    packings: Mapping[str, Packing]
    linears: tuple[Linear, ...]
    """All of the model; empty where nothing is packed."""
    planned_bytes: int
    sensitivity: dict[str, Any] | None = None


def planned(dense: Folder, packing: Packing | None) -> int:
    """The planner's figure, from the config alone."""
    spec = spec_from_config(dense.config, name=dense.path.name, source=str(dense.path))
    return exported_bytes(spec, dtype_width(dense), packing)


def dtype_width(dense: Folder) -> int:
    """Bytes of a number of the model's precision."""
    said = str(dense.config.get("dtype") or dense.config.get("torch_dtype") or "float32")
    known: Any = getattr(torch, said, None)
    if not isinstance(known, torch.dtype):
        raise FileError(f"dtype {said!r} is not known", where=str(dense.path / "config.json"))
    return known.itemsize


def require_new(out: Path) -> None:
    """An export goes into a folder that is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "already there, and not an empty folder", where=str(out), do="choose another folder"
        )


def write(source: Source, chosen: Chosen, partial: Path) -> None:
    """Weights and what lies beside them, into `partial`."""
    dense = source.dense
    if chosen.name == "none":
        shutil.copytree(dense.path, partial, dirs_exist_ok=True)
    elif chosen.name.startswith("int8"):
        write_int8(dense, partial, next(iter(chosen.packings.values())))
    else:
        rest = [m.name for m in chosen.linears if m.name not in chosen.packings]
        write_packed(dense, partial, chosen.packings, rest)
    copy_beside(dense.path, partial)


def finish(record: card.Record, partial: Path, out: Path) -> None:
    """Card in, everything flushed, then the name."""
    write_text(partial / "outlay.json", to_json(record))
    write_text(partial / "README.md", card.readme(record))
    for path in partial.iterdir():
        if path.is_file():
            # safetensors and torch write for their user alone
            path.chmod(0o644)
            sync_file(path)
    if out.exists():
        out.rmdir()
    partial.chmod(0o755)
    partial.rename(out)
    sync_folder(out.resolve().parent)


def new_partial(out: Path) -> Path:
    """Beside `out`, so that the last step is a rename."""
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=out.resolve().parent, prefix=f".{out.name}.partial-"))


def record_of(
    source: Source, chosen: Chosen, partial: Path, evaluation: dict[str, Any] | None
) -> card.Record:
    """All that is known of the export; from an earlier `outlay.json` where the run is not known."""
    counted = tuple(_counted(source.dense, chosen))
    spec = spec_from_config(source.dense.config, name=_name(source), source="export")
    earlier = read_record(source.dense.path)
    data, training = facts(source)
    return card.Record(
        exported_at=datetime.now(UTC).isoformat(timespec="seconds"),
        outlay_version=version("outlay"),
        model=_name(source),
        family=spec.family,
        parameters=parameter_counts(spec).total,
        quantize=chosen.name,
        asked=_asked(source) or _kept(earlier, "asked"),
        weights=sum(m.weights for m in counted),
        zeros=sum(m.zeros for m in counted),
        matrices=counted,
        weights_bytes=read_folder(partial).weights_bytes,
        planned_bytes=chosen.planned_bytes,
        dense_bytes=source.dense.weights_bytes,
        data=data or _again(card.Data, earlier, "data"),
        training=training or _again(card.Training, earlier, "training"),
        evaluation=evaluation,
        sensitivity=chosen.sensitivity,
    )


def _kept(earlier: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = earlier.get(key)
    return value if isinstance(value, dict) else None


def _again(kind: Any, earlier: dict[str, Any], key: str) -> Any:
    value = _kept(earlier, key)
    return None if value is None else kind(**value)


def _asked(source: Source) -> dict[str, Any] | None:
    if source.plan is None or source.plan.job.compress is None:
        return None
    asked: dict[str, Any] = plain(source.plan.job.compress)
    if asked.get("distill"):
        asked["distill"]["teacher"] = Path(asked["distill"]["teacher"]).name
    return asked


def _name(source: Source) -> str:
    if source.plan is not None:
        return source.plan.model.name
    return str(read_record(source.dense.path).get("model") or source.dense.path.resolve().name)


def _counted(dense: Folder, chosen: Chosen) -> list[card.Matrix]:
    """Every matrix of the blocks, and a packed head, with its zeros; read from the dense files."""
    from safetensors import safe_open

    found = []
    for file in sorted(dense.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors file, no mapping
                packing = chosen.packings.get(name.removesuffix(".weight"))
                is_matrix = len(opened.get_slice(name).get_shape()) == 2
                if packing is None and not (is_matrix and _in_a_block(name)):
                    continue
                tensor = opened.get_tensor(name)
                found.append(
                    card.Matrix(
                        name=name, weights=tensor.numel(),
                        zeros=tensor.numel() - int(torch.count_nonzero(tensor)),
                        stored="dense" if packing is None else packing.name,
                    )
                )  # fmt: skip
    return found


def _in_a_block(name: str) -> bool:
    """`model.layers.3.mlp.up_proj.weight`: a number stands in the name of what is repeated."""
    return any(part.isdigit() for part in name.split("."))


def facts(source: Source) -> tuple[card.Data | None, card.Training | None]:
    """Data and training of a run."""
    plan, outcome = source.plan, source.outcome
    if plan is None or source.run is None:
        return None, None
    job, step, e = plan.job, source.step or 0, plan.estimate
    training = card.Training(
        steps=step, global_batch=job.global_batch, precision=job.precision,
        optimizer=job.optimizer.name, lr=job.optimizer.lr, strategy=plan.strategy.label(),
        hardware=plan.cluster.accelerator.name, ranks=plan.strategy.world,
        started_from=None if plan.model.weights is None else Path(plan.model.weights).name,
        wall_s=None if outcome is None else outcome.wall_s,
        cost_usd=None if outcome is None else outcome.cost_usd,
        energy_kwh=None if outcome is None else outcome.energy_kwh,
        energy_source=None if outcome is None else outcome.energy_source,
        co2e_kg=None if outcome is None else outcome.co2e_kg,
        heldout_loss=None if outcome is None else outcome.heldout_loss,
        heldout_unigram=None if outcome is None else outcome.heldout_unigram,
        planned={
            "step_s": (e.get("step") or {}).get("time_s"),
            "cost_usd": ((e.get("run") or {}).get("cost_usd") or {}).get("expected"),
            "device_bytes": (e.get("memory") or {}).get("device_bytes"),
        },
    )  # fmt: skip
    return _data_of(source, step), training


def _data_of(source: Source, step: int) -> card.Data | None:
    from outlay.runner.data.dataset import TokenDataset

    assert source.plan is not None and source.run is not None
    job = source.plan.job
    if job.data is None:
        return None
    folder = source.run.dataset(source.plan)
    if not (folder / "dataset.json").is_file():
        return None
    info = TokenDataset(folder, seq_len=job.seq_len, seed=job.seed).info
    return card.Data(
        name=Path(job.data.path).name, train_sha256=info.train.sha256,
        train_tokens=info.train.tokens, train_files=len(info.train.files),
        tokens_seen=step * job.tokens_per_step, seq_len=job.seq_len, vocab_size=info.vocab_size,
    )  # fmt: skip

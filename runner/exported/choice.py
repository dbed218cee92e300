"""How an export is stored: one packing for all matrices of the blocks, or a mixture under a size limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import UsageError
from outlay.runner.compress.post_training import (
    Option,
    Step,
    choose,
    options_of,
    sensitivities,
    steps_of,
)
from outlay.runner.evaluate.load import Folder, here, load_model
from outlay.runner.exported.matrices import Linear, check_groups, linears
from outlay.runner.exported.write import Chosen, dtype_width, planned

CALIBRATION_SEED = 1234


def uniform(dense: Folder, packing: Packing | None) -> Chosen:
    """All matrices of the blocks alike; null = as they are."""
    if packing is None:
        return Chosen(name="none", packings={}, linears=(), planned_bytes=planned(dense, None))
    found = linears(dense)
    check_groups(found, packing)
    return Chosen(
        name=packing.name,
        packings={m.name: packing for m in found if not m.is_head},
        linears=found,
        planned_bytes=planned(dense, packing),
    )


def mixture(
    dense: Folder, limit_bytes: int, tokens: np.ndarray[tuple[int, ...], np.dtype[np.int64]], *,
    batch: int, progress: Callable[[str], None],
) -> Chosen:  # fmt: skip
    """The least measured loss within `limit_bytes` of the whole folder; dense where that fits already."""
    found, width = linears(dense), dtype_width(dense)
    overhead = _overhead(dense, found)
    size = dense.folder_bytes + overhead
    if dense.folder_bytes <= limit_bytes:
        return uniform(dense, None)
    by_name = {m.name: m for m in found}
    # refuse before measuring what no mixture can hold
    choose(_cheapest(found, width), size, limit_bytes)
    model = load_model(dense, device=here())
    before, options = sensitivities(
        model, found, tokens, width=width, batch=batch, progress=progress
    )
    steps = [s for name, o in options.items() for s in steps_of(by_name[name], o, width)]
    packings = choose(steps, size, limit_bytes)
    saved = sum(
        m.bytes_as(None, width) - m.bytes_as(packings[m.name], width, mixed=True)
        for m in found if m.name in packings
    )  # fmt: skip
    predicted = sum(
        next(max(0.0, o.loss) for o in options[name] if o.packing == packing)
        for name, packing in packings.items()
    )
    return Chosen(
        name="mixed",
        packings=packings,
        linears=found,
        planned_bytes=dense.weights_bytes - saved,
        sensitivity={
            "limit_bytes": limit_bytes,
            "calibration_tokens": int(tokens.size),
            "loss_before": before,
            "loss_increase_if_additive": predicted,
            "options": {
                name: [
                    {"packing": o.packing.name, "bytes": o.stored_bytes, "loss": o.loss}
                    for o in each
                ]
                for name, each in options.items()
            },
        },
    )


def _cheapest(found: tuple[Linear, ...], width: int) -> list[Step]:
    """Steps as if no bit fewer cost anything: what the limit could be at the very least."""
    return [
        step
        for m in found
        for step in steps_of(
            m,
            [
                Option(packing=p, stored_bytes=m.bytes_as(p, width, mixed=True), loss=0.0)
                for p in options_of(m)
            ],
            width,
        )
    ]


def _overhead(dense: Folder, found: tuple[Linear, ...]) -> int:
    """Bytes beside the weights that a packed folder has more than the dense one: names of three tensors
    for one, the list of modules in config.json, the card; from the names' lengths, with room to spare."""
    names = sum(len(m.name) for m in found)
    return 4 * names + 700 * len(found) + 8192


def calibration_tokens(
    data: Path, seq_len: int, sequences: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Windows of the training part, spread over it."""
    from outlay.runner.data.dataset import TokenDataset

    dataset = TokenDataset(data, seq_len=seq_len, seed=CALIBRATION_SEED)
    if dataset.windows < 1:
        raise UsageError("there is not one window to calibrate on", where=str(data))
    count = min(sequences, dataset.windows)
    return np.stack([dataset.sample(i) for i in range(count)])


def described(chosen: Chosen) -> str:
    """For the terminal: how many matrices in which packing."""
    kinds: dict[str, int] = {}
    for packing in chosen.packings.values():
        kinds[packing.name] = kinds.get(packing.name, 0) + 1
    dense = len(chosen.linears) - len(chosen.packings)
    parts = [f"{n} matrices {name}" for name, n in sorted(kinds.items())]
    return ", ".join(parts + ([f"{dense} dense"] if dense and kinds else [])) or "dense"

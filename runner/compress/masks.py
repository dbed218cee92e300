"""Masks that hold: weights that stay zero while DeepSpeed trains, in the fp32 masters of every stage.

The optimizer under DeepSpeed steps on fp32 masters, each rank on its own partition (see
`fragments.py`). A hook after that step sets the pruned masters and their optimizer states to zero,
before DeepSpeed copies the masters into the weights of the forward pass and sends them around. So
nothing is gathered, and a pruned weight cannot come back: it is zero in the master, in the moments
and in every rank's copy. A mask is one byte a weight, of the partition only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from outlay.profiles.errors import CheckpointError
from outlay.runner.compress.fragments import Fragment, fragments_of, inner_optimizer
from outlay.runner.compress.parts import Live, Target, live

if TYPE_CHECKING:
    from outlay.runner.engine import Engine

FOLDER = "masks"
"""In a checkpoint: one file for each rank that speaks for a piece, eight weights a byte."""

Key = tuple[str, int, int]
"""(weight, rank in the tensor-parallel group, first element): names a piece of the model."""


class Masks:
    """What is pruned of the fragments that this rank holds."""

    def __init__(self, engine: Engine, targets: list[Target]) -> None:
        self.engine, self.targets = engine, targets
        self.live: dict[str, Live] = live(engine, targets)
        self.fragments: list[Fragment] = fragments_of(engine.deepspeed, self.live)
        self.pruned = [
            torch.zeros(f.length, dtype=torch.bool, device=f.holder.device) for f in self.fragments
        ]
        slice_ = engine.rank % engine.plan.strategy.tp
        self.keys: list[Key] = [(f.name, slice_, f.start) for f in self.fragments]
        self._agree()
        self._of_holder = self._by_holder()
        self._hook = inner_optimizer(engine.deepspeed).register_step_post_hook(self._after_step)

    def _agree(self) -> None:
        """Who has what: once, so that later only numbers travel."""
        mine = [(key, f.length) for key, f in zip(self.keys, self.fragments, strict=True)]
        everyone: list[Any] = [None] * self.engine.world
        torch.distributed.all_gather_object(everyone, mine)
        index = {target.name: i for i, target in enumerate(self.targets)}
        speaker: dict[Key, int] = {}
        for rank, pieces in enumerate(everyone):
            for key, _ in pieces:
                speaker.setdefault(key, rank)
        lengths = {key: length for pieces in everyone for key, length in pieces}
        self.all_keys = sorted(speaker, key=lambda key: (index[key[0]], *key[1:]))
        self.speaker = speaker
        self.order = {key: i for i, key in enumerate(self.all_keys)}
        self.weight_of = [index[key[0]] for key in self.all_keys]
        """Which target each piece belongs to, in order."""
        self.sizes = [0] * len(self.targets)
        for key in self.all_keys:
            self.sizes[index[key[0]]] += lengths[key]

    def _by_holder(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for i, fragment in enumerate(self.fragments):
            found.setdefault(id(fragment.holder), []).append(i)
        return found

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed steps on one holder at a time in some stages: mask those it has just stepped on."""
        for group in optimizer.param_groups:
            for holder in group["params"]:
                self._apply(optimizer, holder)

    def _apply(self, optimizer: torch.optim.Optimizer, holder: torch.Tensor) -> None:
        state = optimizer.state.get(holder, {})
        alike = [t for t in state.values() if torch.is_tensor(t) and t.numel() == holder.numel()]
        for i in self._of_holder.get(id(holder), ()):
            # a product with zeros and ones takes a tenth of the time of masked_fill_ on a CPU
            kept = (self.pruned[i].view(torch.uint8) ^ 1).to(holder.dtype)
            for tensor in (holder, *alike):
                self.fragments[i].view(tensor).mul_(kept.to(tensor))

    def apply(self) -> None:
        """Now, to all masters and states of this rank. A step that overflowed has left them as they were."""
        optimizer = inner_optimizer(self.engine.deepspeed)
        for holder in {id(f.holder): f.holder for f in self.fragments}.values():
            self._apply(optimizer, holder)

    def speaks(self, key: Key) -> bool:
        """Whether this rank counts for the piece, where several hold a copy."""
        return self.speaker[key] == self.engine.rank

    def zeros(self) -> list[int]:
        """How many masters of each target are exactly zero, in the whole model. Collective."""
        counts = torch.zeros(len(self.targets), dtype=torch.int64)
        for key, fragment in zip(self.keys, self.fragments, strict=True):
            if self.speaks(key):
                view = fragment.view()
                counts[self.weight_of[self.order[key]]] += view.numel() - view.count_nonzero().cpu()
        counts = counts.to(self.engine.device)
        torch.distributed.all_reduce(counts)
        return [int(count) for count in counts]

    def save(self, folder: Path, sparsity: float) -> None:
        """Into a checkpoint: one file a rank, of the pieces it speaks for."""
        mine = {
            self.order[key]: np.packbits(pruned.cpu().numpy())
            for key, pruned in zip(self.keys, self.pruned, strict=True)
            if self.speaks(key)
        }
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        named: dict[str, Any] = {str(order): bits for order, bits in mine.items()}
        np.savez(self._file(folder, self.engine.rank), sparsity=sparsity, **named)
        torch.distributed.barrier()

    def load(self, folder: Path) -> float:
        """What `save` wrote, into an engine of the same plan; returns its `sparsity`."""
        files: dict[int, Any] = {}
        ranks = {self.speaker[key] for key in self.keys} | {self.engine.rank}
        for rank in ranks:
            path = self._file(folder, rank)
            if not path.is_file():
                raise CheckpointError("the masks of pruned weights are missing", where=str(path))
            files[rank] = np.load(path, allow_pickle=False)
        for i, (key, fragment) in enumerate(zip(self.keys, self.fragments, strict=True)):
            packed = files[self.speaker[key]][str(self.order[key])]
            bits = np.unpackbits(packed, count=fragment.length).astype(bool)
            self.pruned[i] = torch.from_numpy(bits).to(fragment.holder.device)
        return float(files[self.engine.rank]["sparsity"])

    @staticmethod
    def _file(folder: Path, rank: int) -> Path:
        return folder / FOLDER / f"rank-{rank:05d}.npz"

    def close(self) -> None:
        """Let go of the engine's tensors."""
        self._hook.remove()
        self.fragments, self.live, self._of_holder = [], {}, {}

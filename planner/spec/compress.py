"""Compression: how small the model must become, and what trains it there.

    compress:
      pruning: {sparsity: 0.5, schedule: cubic}     # or {pattern: "2:4"}
      qat: {bits: 4, group: 32}
      distill: {teacher: models/large, temperature: 2}
      export_bytes: 4GB

Whether a model's dimensions allow it is checked in `planner/compression.py`; here only what is wrong
with the numbers themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from outlay.profiles.errors import UsageError
from outlay.profiles.units import parse_bytes, split_number

Part = Literal["attention", "mlp", "head", "embedding"]
"""Matrices of the blocks' attention and MLP; the vocabulary projection; the token table."""
Scope = Literal["layer", "global"]
Ramp = Literal["cubic", "one_shot"]
Importance = Literal["magnitude", "activation", "taylor"]

BLOCK_PARTS: tuple[Part, ...] = ("attention", "mlp")
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Weights that are held at zero: the smallest, more of them as training goes on."""

    sparsity: float | None = None
    """Share of the weights of `parts` that is zero at the end; null = what `pattern` says."""
    pattern: str | int | None = None
    """`N:M`: of each M neighbours along the input, N stay (2:4, 4:8); null = anywhere."""
    scope: Scope = "layer"
    """layer: that share of each matrix; global: of all of them together."""
    schedule: Ramp = "cubic"
    """cubic: Zhu & Gupta 2017 (arXiv:1710.01878); one_shot: all at `start`."""
    start: float = 0.0
    """When the first weights go, as a share of the steps."""
    end: float = 0.6
    """When the last go; the rest of the steps recover."""
    updates: int = 50
    """How often masks are chosen anew between start and end."""
    parts: tuple[Part, ...] = BLOCK_PARTS
    """Which matrices."""

    def __post_init__(self) -> None:
        where = "compress.pruning"
        _check_parts(self.parts, where)
        _check_share("start", self.start, where)
        if self.updates < 1:
            raise UsageError(f"updates must be at least 1, not {self.updates}", where=where)
        if self.schedule == "cubic" and not self.start < self.end <= 1:
            raise UsageError(
                f"the masks are chosen from start {self.start:g} to end {self.end:g}", where=where,
                do="shares of the steps, start below end, end at most 1",
            )  # fmt: skip
        if isinstance(self.pattern, int):
            # YAML 1.1 reads an unquoted 2:4 as minutes and seconds
            object.__setattr__(self, "pattern", "{}:{}".format(*divmod(self.pattern, 60)))
        if self.pattern is not None:
            self._check_pattern(where)
        elif self.sparsity is None:
            raise UsageError("how sparse?", where=where, do='give sparsity: 0.5, or pattern: "2:4"')
        elif not 0 < self.sparsity < 1:
            raise UsageError(
                f"sparsity is the share of zeros, between 0 and 1, not {self.sparsity:g}",
                where=where,
            )

    def _check_pattern(self, where: str) -> None:
        kept, group = self.kept_of()
        if not kept < group:
            raise UsageError(
                f"pattern {self.pattern}: {kept} of {group} weights stay, so none is pruned",
                where=where, do="N:M with N below M, such as 2:4 or 4:8",
            )  # fmt: skip
        if self.sparsity is not None and abs(self.sparsity - (1 - kept / group)) > 1e-9:
            raise UsageError(
                f"pattern {self.pattern} is a sparsity of {1 - kept / group:g}, "
                f"and sparsity says {self.sparsity:g}",
                where=where, do="leave one of them out",
            )  # fmt: skip
        if self.scope == "global":
            raise UsageError(
                f"pattern {self.pattern} holds in every group of {group}: it has no global scope",
                where=where, do="leave scope out",
            )  # fmt: skip

    def kept_of(self) -> tuple[int, int]:
        """(N, M) of the pattern. Raises UsageError where it is none."""
        match = _PATTERN.fullmatch(str(self.pattern))
        if match is None:
            raise UsageError(
                f"{self.pattern!r} is no pattern", where="compress.pruning.pattern",
                do="N:M, such as 2:4 or 4:8",
            )  # fmt: skip
        return int(match[1]), int(match[2])

    def label(self) -> str:
        """For tables: `50% of each matrix pruned, cubic`."""
        how = "at once" if self.schedule == "one_shot" else "little by little"
        if self.pattern is not None:
            return f"pruned {self.pattern}, {how}"
        what = "all matrices together" if self.scope == "global" else "each matrix"
        return f"{100 * self.final_sparsity:.4g}% of {what} pruned, {how}"

    @property
    def final_sparsity(self) -> float:
        """Share of zeros that is asked for at the end."""
        if self.pattern is not None:
            kept, group = self.kept_of()
            return 1 - kept / group
        assert self.sparsity is not None
        return self.sparsity

    @classmethod
    def parse(cls, text: str, *, where: str = "--prune") -> Pruning:
        """`"50%"`, `"0.5"`, `"2:4"`, with `global` or `one-shot` after a comma."""
        head, *words = (word.strip().lower() for word in text.split(","))
        for word in words:
            if word not in ("global", "one-shot"):
                raise UsageError(
                    f"{text!r}: what is {word!r}", where=where,
                    do="50% or 2:4, then global or one-shot: --prune 50%,global",
                )  # fmt: skip
        scope: Scope = "global" if "global" in words else "layer"
        schedule: Ramp = "one_shot" if "one-shot" in words else "cubic"
        if not head[:1].isdigit() and head[:1] != ".":
            raise UsageError(
                f"{text!r} is not known", where=where, do="50%, 2:4, 4:8, or none to prune nothing"
            )
        if ":" in head:
            return cls(pattern=head, scope=scope, schedule=schedule)
        return cls(sparsity=share_of(head, where), scope=scope, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Qat:
    """Quantization-aware training: the forward pass sees the weights as they will be stored."""

    bits: Literal[4, 8] = 8
    """Of a weight."""
    group: int | None = None
    """Weights along the input that share a scale; null = 32 for 4 bits, a whole row for 8."""
    activation_bits: Literal[8] | None = None
    """8 = the inputs too, with a scale for each token; null = they are left as they are."""
    start: float = 0.0
    """From when on, as a share of the steps."""
    parts: tuple[Part, ...] = BLOCK_PARTS
    """Which matrices."""

    def __post_init__(self) -> None:
        where = "compress.qat"
        _check_parts(self.parts, where)
        if "embedding" in self.parts:
            raise UsageError(
                "the token table is not quantized in training", where=f"{where}.parts",
                do="leave embedding out; head is its projection to the vocabulary",
            )  # fmt: skip
        _check_share("start", self.start, where)
        if self.group is not None and (self.group < 8 or self.group & (self.group - 1)):
            raise UsageError(
                f"group must be a power of two of at least 8, not {self.group}", where=where
            )
        if self.bits == 8 and self.group is not None:
            raise UsageError(
                f"8 bits have one scale for each output channel, not for each {self.group} weights",
                where=where, do="leave group out, or use bits: 4",
            )  # fmt: skip

    def label(self) -> str:
        """For tables: `trained for int4 in groups of 32`."""
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        inputs = "" if self.activation_bits is None else ", int8 activations"
        return f"trained for int{self.bits}{groups}{inputs}"

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale; null = all of an output channel."""
        return 32 if self.bits == 4 and self.group is None else self.group

    @classmethod
    def parse(cls, text: str, *, where: str = "--qat") -> Qat:
        """`"int8"` (weights and activations), `"int8-weight"`, `"int4"`, `"int4:g64"`, `"int4-act8:g32"`."""
        name, _, detail = text.strip().lower().partition(":")
        kinds: dict[str, tuple[Literal[4, 8], Literal[8] | None]] = {
            "int8": (8, 8), "int8-weight": (8, None), "int4": (4, None), "int4-act8": (4, 8)
        }  # fmt: skip
        if name not in kinds or (detail and not (detail[0] == "g" and detail[1:].isdecimal())):
            raise UsageError(
                f"{text!r} is not known", where=where,
                do="int8 (weights and activations), int8-weight, int4:g32 or int4-act8:g32",
            )  # fmt: skip
        bits, activations = kinds[name]
        group = int(detail[1:]) if detail else None
        return cls(bits=bits, group=group, activation_bits=activations)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learning from what a larger model says, beside the text."""

    teacher: str
    """Folder of transformers with safetensors."""
    temperature: float = 2.0
    """Divides both models' logits."""
    weight: float = 0.5
    """Of the teacher's part of the loss; the text has the rest."""
    hidden: float = 0.0
    """Weight of the squared distance between hidden states; 0 = none."""
    top_k: int | None = None
    """Logits a token that are computed ahead and kept on disk; null = the teacher runs beside."""
    teacher_zero: Literal[0, 3] = 0
    """3 = the teacher's weights are split over the ranks."""
    teacher_offload: Literal["none", "cpu"] = "none"
    """Where the split weights rest."""

    def __post_init__(self) -> None:
        where = "compress.distill"
        if not self.temperature > 0:
            raise UsageError(f"temperature must be positive, not {self.temperature:g}", where=where)
        _check_share("weight", self.weight, where)
        if self.hidden < 0:
            raise UsageError(f"hidden must not be negative: {self.hidden:g}", where=where)
        if self.weight == 0 and self.hidden == 0:
            raise UsageError("weight and hidden are both 0: nothing is distilled", where=where)
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}", where=where)
        if self.top_k is not None and self.hidden > 0:
            raise UsageError(
                "hidden states are not in the cached logits", where=where,
                do="leave top_k out, or hidden",
            )  # fmt: skip
        if self.teacher_offload != "none" and self.teacher_zero != 3:
            raise UsageError(
                "teacher_offload is of split weights", where=where, do="with teacher_zero: 3"
            )


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Structured pruning: matrices that really become smaller, before training goes on."""

    heads: float = 0.0
    """Share of the attention heads that goes, by whole groups where heads share keys."""
    channels: float = 0.0
    """Share of the MLP's inner width that goes."""
    layers: int = 0
    """Whole blocks that go."""
    importance: Importance = "magnitude"
    """magnitude needs no text; activation and taylor look at some."""
    multiple: int = 1
    """The inner width stays a multiple of this (64 suits matrix units)."""

    def __post_init__(self) -> None:
        where = "shrink"
        _check_share("heads", self.heads, where)
        _check_share("channels", self.channels, where)
        if self.layers < 0:
            raise UsageError(f"layers must not be negative: {self.layers}", where=where)
        if self.multiple < 1:
            raise UsageError(f"multiple must be at least 1, not {self.multiple}", where=where)
        if self.heads == self.channels == self.layers == 0:
            raise UsageError(
                "nothing is pruned", where=where, do="give a share of heads or channels, or layers"
            )


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What a job does to make its model smaller."""

    pruning: Pruning | None = None
    """Weights that are held at zero; `--prune`."""
    qat: Qat | None = None
    """Forward passes with rounded weights; `--qat`."""
    distill: Distill | None = None
    """A teacher beside the text."""
    export_bytes: int | str | None = None
    """Largest size of the exported folder, such as 4GB; null = any."""

    def __post_init__(self) -> None:
        if self.export_bytes is not None:
            size = parse_bytes(self.export_bytes, where="compress.export_bytes")
            if size < 1:
                raise UsageError("no model fits into 0 bytes", where="compress.export_bytes")
            # a file says 4GB, the rest of the code reads bytes
            object.__setattr__(self, "export_bytes", size)
        if self.pruning is None and self.qat is None and self.distill is None and (
            self.export_bytes is None
        ):  # fmt: skip
            raise UsageError(
                "compress says nothing",
                do="give pruning, qat, distill or export_bytes, or leave it out",
            )

    def label(self) -> str:
        """Pruning and quantization, for tables; empty where there is neither."""
        return "; ".join(part.label() for part in (self.pruning, self.qat) if part is not None)


def with_flags(
    compress: Compression | None, prune: str | None, qat: str | None
) -> Compression | None:
    """What a file says, with `--prune` and `--qat` over it (`none` takes one away)."""
    if prune is None and qat is None:
        return compress
    said = {f.name: getattr(compress, f.name, None) for f in fields(Compression)}
    if prune is not None:
        said["pruning"] = None if prune == "none" else Pruning.parse(prune)
    if qat is not None:
        said["qat"] = None if qat == "none" else Qat.parse(qat)
    return Compression(**said) if any(v is not None for v in said.values()) else None


def share_of(text: str, where: str) -> float:
    """`"50%"` or `"0.5"`."""
    value, unit = split_number(text, where=where)
    if unit not in ("", "%"):
        raise UsageError(f"{text!r} is not a share", where=where, do="50% or 0.5")
    return value / 100 if unit else value


def _check_share(key: str, value: float, where: str) -> None:
    if not 0 <= value < 1 and not (key == "weight" and value == 1):
        raise UsageError(f"{key} is a share below 1, not {value:g}", where=where)


def _check_parts(parts: tuple[Part, ...], where: str) -> None:
    if not parts:
        raise UsageError("parts names no matrix", where=f"{where}.parts")
    twice = sorted({part for part in parts if parts.count(part) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)} is named twice", where=f"{where}.parts")

"""What a compression does to a model's matrices, and whether their dimensions allow it.

From the sizes alone (`ModelSpec`): the same matrices that `runner/compress/parts.py` finds in the
module; a test compares the two for every family that is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from outlay.planner.distillation import check_distill
from outlay.planner.spec.compress import Compression, Part, Pruning, Qat
from outlay.planner.spec.job import Finetune, Job
from outlay.planner.spec.model import Attention, Block, ModelSpec
from outlay.profiles.errors import UsageError

_TURNED = ("gpt2",)
"""model_types whose linear layers are transformers' Conv1D."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """`count` equal matrices of one kind."""

    part: Part
    what: str
    inputs: int
    outputs: int
    count: int

    @property
    def weights(self) -> int:
        """Of all of them."""
        return self.inputs * self.outputs * self.count


def matrices(spec: ModelSpec, parts: tuple[Part, ...]) -> tuple[Matrix, ...]:
    """The matrices of these parts, as transformers holds them."""
    found: list[Matrix] = []
    for block in spec.blocks:
        found += _attention(block.attention, spec.hidden, block.count)
        found += _mlp(block, spec.hidden)
    table = {"inputs": spec.embedding_width or spec.hidden, "outputs": spec.vocab, "count": 1}
    if spec.has_head:
        found.append(Matrix(part="head", what="vocabulary projection", **table))
    found.append(Matrix(part="embedding", what="token table", **table))
    return tuple(m for m in found if m.part in parts)


def _attention(a: Attention, hidden: int, count: int) -> Iterator[Matrix]:
    sizes = [("output projection", a.out_width, hidden)]
    if a.kv_rank:
        expanded = a.k_width - a.kv_heads * a.rope_head_dim + a.v_width
        q = (
            [("q compression", hidden, a.q_rank), ("q expansion", a.q_rank, a.q_width)]
            if a.q_rank
            else [("q projection", hidden, a.q_width)]
        )
        sizes += [
            *q,
            ("kv compression", hidden, a.kv_rank + a.rope_head_dim),
            ("kv expansion", a.kv_rank, expanded),
        ]
    elif a.fused_qkv:
        sizes.append(("qkv projection", hidden, a.q_width + a.k_width + a.v_width))
    else:
        widths = (("q", a.q_width), ("k", a.k_width), ("v", a.v_width))
        sizes += [(f"{name} projection", hidden, width) for name, width in widths]
    for what, inputs, outputs in sizes:
        yield Matrix(part="attention", what=what, inputs=inputs, outputs=outputs, count=count)


def _mlp(block: Block, hidden: int) -> Iterator[Matrix]:
    mlp, count = block.mlp, block.count
    wide = 2 if mlp.gated and mlp.fused_gate else 1
    into = 2 if mlp.gated and not mlp.fused_gate else 1
    yield Matrix(
        part="mlp", what="up projection", inputs=hidden, outputs=wide * mlp.ffn, count=into * count
    )
    yield Matrix(part="mlp", what="down projection", inputs=mlp.ffn, outputs=hidden, count=count)


def check_compression(
    compress: Compression | None, spec: ModelSpec, finetune: Finetune | None = None
) -> None:
    """Raise UsageError where the model cannot be compressed so."""
    if compress is None:
        return
    for what, asked in (("pruning", compress.pruning), ("qat", compress.qat)):
        if asked is None:
            continue
        _check_kind(f"compress.{what}", spec, finetune)
        _check_ties(f"compress.{what}.parts", spec, asked.parts)
    if compress.distill is not None:
        check_distill(compress.distill, spec)
    if compress.pruning is not None:
        _check_pattern(compress.pruning, spec)
    if compress.qat is not None:
        _check_linear(spec)
        _check_groups(compress.qat, spec)


def check_job(job: Job, spec: ModelSpec) -> None:
    """`check_compression` of a job."""
    check_compression(job.compress, spec, job.finetune)


def _check_kind(where: str, spec: ModelSpec, finetune: Finetune | None) -> None:
    if any(block.mlp.experts for block in spec.blocks):
        raise UsageError(
            f"{spec.name} is a mixture of experts", where=where,
            why="transformers holds the experts of a block as one weight of three dimensions, "
            "and neither masks nor fake quantization of it was tried",
            do="name a dense model",
        )  # fmt: skip
    if finetune is not None:
        held = "" if finetune.quant == "none" else f", held as {finetune.quant}"
        raise UsageError(
            f"{finetune.method} trains adapters over frozen weights{held}", where=where,
            why="a frozen weight cannot recover from what is taken from it",
            do="--finetune full, or leave the compression out",
        )  # fmt: skip


def _check_linear(spec: ModelSpec) -> None:
    if spec.family in _TURNED:
        raise UsageError(
            f"{spec.name} keeps its matrices as Conv1D", where="compress.qat",
            why="torchao stores torch.nn.Linear only, and trains for nothing else",
            do="name a model of another family, or leave qat out",
        )  # fmt: skip


def _check_ties(where: str, spec: ModelSpec, parts: tuple[Part, ...]) -> None:
    if spec.tie_embeddings and {"head", "embedding"} <= set(parts):
        raise UsageError(
            f"head and embedding are one matrix in {spec.name}: it would be pruned twice",
            where=where, why="tie_word_embeddings is true in its config", do="name one of the two",
        )  # fmt: skip
    if not matrices(spec, parts):
        raise UsageError(f"{spec.name} has none of {', '.join(parts)}", where=where)


def _check_pattern(pruning: Pruning, spec: ModelSpec) -> None:
    if pruning.pattern is None:
        return
    kept, group = pruning.kept_of()
    _check_divides(
        spec, pruning.parts, group, f"pattern {kept}:{group}", "compress.pruning.pattern",
        "another pattern, or parts without it, or sparsity without a pattern",
    )  # fmt: skip


def _check_groups(qat: Qat, spec: ModelSpec) -> None:
    if qat.group_size is None:
        return
    _check_divides(
        spec, qat.parts, qat.group_size, f"{qat.bits}-bit groups of {qat.group_size}",
        "compress.qat.group", "another group, or parts without it",
    )  # fmt: skip


def _check_divides(
    spec: ModelSpec, parts: tuple[Part, ...], group: int, what: str, where: str, do: str
) -> None:
    by_inputs: dict[int, list[str]] = {}
    for m in matrices(spec, parts):
        if m.inputs % group:
            by_inputs.setdefault(m.inputs, []).append(f"{m.part} {m.what}")
    if by_inputs:
        shown = "; ".join(f"{', '.join(names)}: {n} inputs" for n, names in by_inputs.items())
        raise UsageError(
            f"{what} cannot be laid over the matrices of {spec.name}", where=where,
            why=f"no multiple of {group}: {shown}", do=do,
        )  # fmt: skip

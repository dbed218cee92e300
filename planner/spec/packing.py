"""How the weights of an exported model are stored: bits, groups, scales, and what that comes to in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlay.planner.spec.compress import Qat
from outlay.profiles.errors import UsageError

WORDS = ("int8", "int8-dynamic", "int4")
_INT8_SCALE_BYTES = 4
"""torchao keeps it in fp32 whatever the weights are in."""
_SHAPE_BYTES = 16
"""compressed-tensors keeps each packed matrix's two sizes as int64."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Integers with a scale each row or group; symmetric, so that a zero stays one."""

    bits: Literal[4, 8]
    group: int | None = None
    """Weights along the input that share a scale; null = a whole row."""
    dynamic: bool = False
    """The inputs too, in 8 bits with a scale a token found as they come."""

    def __post_init__(self) -> None:
        if self.bits == 4 and (self.group is None or self.group < 8 or self.group % 8):
            raise UsageError(
                f"int4 has groups of a multiple of 8 weights, not {self.group}",
                where="--quantize", do="int4:g32",
            )  # fmt: skip

    @property
    def name(self) -> str:
        """As `--quantize` takes it."""
        if self.bits == 4:
            return f"int4:g{self.group}"
        return "int8-dynamic" if self.dynamic else "int8"

    @classmethod
    def parse(cls, text: str, *, where: str = "--quantize") -> Packing:
        """`"int8"`, `"int8-dynamic"`, `"int4"` (groups of 32), `"int4:g64"`."""
        name, _, detail = text.strip().lower().partition(":")
        grouped = name == "int4" and detail[:1] == "g" and detail[1:].isdecimal()
        if name not in WORDS or (detail and not grouped):
            raise UsageError(
                f"{text!r} is not known", where=where, do="int8, int8-dynamic or int4:g32"
            )
        if name == "int4":
            return cls(bits=4, group=int(detail[1:]) if detail else 32)
        return cls(bits=8, dynamic=name == "int8-dynamic")

    @classmethod
    def of_training(cls, qat: Qat) -> Packing:
        """What a model was trained to be stored as. Beside 4-bit weights inputs are left as they are:
        no format that transformers reads keeps both."""
        dynamic = qat.bits == 8 and qat.activation_bits == 8
        return cls(bits=qat.bits, group=qat.group_size, dynamic=dynamic)

    def matrix_bytes(
        self, outputs: int, inputs: int, scale_width: int, *, mixed: bool = False
    ) -> int:
        """One matrix [outputs, inputs] as its files hold it; `scale_width`: bytes of a number of the
        model's precision.

        torchao 0.18's Int8Tensor: integers, an fp32 scale and an int8 zero point a row. compressed-tensors
        0.20's pack-quantized (every int4, and all of a `mixed` model): int32 words of 32/bits weights, rows
        padded to whole words; scales; the two sizes. Names and the header of the file are left out.
        """
        if self.bits == 8 and not mixed:
            return outputs * (inputs + _INT8_SCALE_BYTES + 1)
        a_word = 32 // self.bits
        words = outputs * -(-inputs // a_word)
        scales = outputs * (1 if self.group is None else -(-inputs // self.group))
        return 4 * words + scale_width * scales + _SHAPE_BYTES

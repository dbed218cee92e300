"""Structured pruning by its sizes: which config the smaller model has, and how many weights.

The config is one that transformers builds as it is, so every layer loses as many heads and channels.
`runner/compress/structured.py` cuts the tensors to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outlay.planner.spec.compress import Shrink
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError, UsageError

_FFN_KEYS = ("intermediate_size", "n_inner", "ffn_dim")
_HEAD_KEYS = ("num_attention_heads",)
_LAYER_KEYS = ("num_hidden_layers", "n_layer")
_PER_LAYER = ("layer_types", "no_rope_layers")
HEADS_FIXED = {
    **dict.fromkeys(
        ("gpt2", "gpt_neox", "opt", "phi", "starcoder2"),
        "its config has no head_dim: transformers would make each head wider",
    ),
    "olmo2": "its norm of queries and keys is over all heads together",
}
"""model_type → why its heads are not cut."""
SHRINKS = (
    "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "opt", "phi", "qwen2", "qwen3", "smollm3",
    "starcoder2",
)  # fmt: skip
"""model_types whose matrices `runner/compress/structured.py` cuts; a test shrinks each."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is left of every block, and of the blocks."""

    heads: int
    kv_heads: int
    ffn: int
    layers: int


def sizes_after(spec: ModelSpec, shrink: Shrink) -> Sizes:
    """Raise UsageError where the model cannot be made smaller so."""
    _check_family(spec, shrink)
    attention, mlp = spec.blocks[0].attention, spec.blocks[0].mlp
    gone = int(shrink.heads * attention.kv_heads + 1e-9)
    if shrink.heads and not gone:
        raise UsageError(
            f"{shrink.heads:.1%} of the heads of {spec.name} is not one whole group", where="--heads",
            why=f"{attention.heads} heads share {attention.kv_heads} keys and values, and go with them",
            do=f"at least {1 / attention.kv_heads:.1%}" if attention.kv_heads > 1 else "leave heads out",
        )  # fmt: skip
    kv_heads = attention.kv_heads - gone
    ffn = round((1 - shrink.channels) * mlp.ffn / shrink.multiple) * shrink.multiple
    if shrink.channels and not 0 < ffn < mlp.ffn:
        raise UsageError(
            f"{shrink.channels:.1%} of {mlp.ffn} channels leaves {ffn}", where="--channels",
            why=f"it is rounded to a multiple of {shrink.multiple}",
            do="another share, or a smaller --multiple",
        )  # fmt: skip
    if shrink.layers >= spec.layers:
        raise UsageError(
            f"{shrink.layers} layers of {spec.layers}: none is left", where="--layers",
            do=f"at most {spec.layers - 1}",
        )  # fmt: skip
    return Sizes(
        heads=attention.heads // attention.kv_heads * kv_heads,
        kv_heads=kv_heads,
        ffn=ffn if shrink.channels else mlp.ffn,
        layers=spec.layers - shrink.layers,
    )


def shrunk_config(
    config: dict[str, Any], spec: ModelSpec, sizes: Sizes, kept: Sequence[int]
) -> dict[str, Any]:
    """The transformers config of the smaller model; `kept`: the blocks that stay, in order."""
    made = dict(config)
    attention, mlp = spec.blocks[0].attention, spec.blocks[0].mlp
    made[_key(config, _LAYER_KEYS)] = sizes.layers
    for key in _PER_LAYER:
        if isinstance(config.get(key), list):
            made[key] = [config[key][i] for i in kept]
    if sizes.ffn != mlp.ffn:
        made[_key(config, _FFN_KEYS, "n_inner" if spec.family == "gpt2" else None)] = sizes.ffn
    if sizes.heads != attention.heads:
        made[_key(config, _HEAD_KEYS)] = sizes.heads
        made["num_key_value_heads"] = sizes.kv_heads
        made["head_dim"] = attention.head_dim
        if spec.family == "llama" and spec.hidden % sizes.heads:
            fits = [n for n in range(1, attention.kv_heads) if not spec.hidden % (
                attention.heads // attention.kv_heads * n)]  # fmt: skip
            raise UsageError(
                f"{sizes.heads} heads do not divide the hidden size {spec.hidden}", where="--heads",
                why="transformers refuses such a config of this family",
                do="one of these shares: "
                + ", ".join(f"{1 - n / attention.kv_heads:.1%}" for n in reversed(fits)),
            )  # fmt: skip
    return made


def _check_family(spec: ModelSpec, shrink: Shrink) -> None:
    if spec.family not in SHRINKS:
        raise UsageError(
            f"{spec.name} is a {spec.family}, whose matrices are not cut yet", where="--model",
            do=f"one of {', '.join(SHRINKS)}",
        )  # fmt: skip
    if shrink.heads and spec.family in HEADS_FIXED:
        raise UsageError(
            f"the heads of {spec.family} cannot become fewer", where="--heads",
            why=HEADS_FIXED[spec.family],
            do="prune channels or layers",
        )  # fmt: skip


def _key(config: dict[str, Any], names: Sequence[str], default: str | None = None) -> str:
    found = next((name for name in names if config.get(name) is not None), default)
    if found is None:
        raise FileError(f"the config has none of {', '.join(names)}")
    return found

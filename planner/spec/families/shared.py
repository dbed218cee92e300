"""What the readers of several families do alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from outlay.planner.spec.families.reader import Reader
from outlay.planner.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers."""

    read: Callable[[Reader, str], ModelSpec]
    module: str = "AutoModelForCausalLM"
    """The class of transformers whose `from_config` builds the model that is counted."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Key → the other name that transformers' attribute_map gives it."""


def head_width(
    reader: Reader,
    hidden: int,
    heads: int,
    *,
    heads_key: str = "num_attention_heads",
    hidden_key: str = "hidden_size",
) -> int:
    """hidden / heads, for the families that have no head_dim of their own."""
    if hidden % heads:
        reader.refuse(
            heads_key,
            f"{heads} heads do not divide {hidden_key} {hidden}",
            why=f"{hidden} = {hidden // heads}·{heads} + {hidden % heads}",
        )
    return hidden // heads


def kv_heads_of(
    reader: Reader, heads: int, default: int | None, *, key: str = "num_key_value_heads"
) -> int:
    """Heads of k and v; null in the config, or as the default, means as many as heads.

    Every kv head serves the same number of query heads.
    """
    found = reader.optional_size(key, default)
    kv_heads = heads if found is None else found
    if heads % kv_heads:
        given = "" if reader.has(key) else " (transformers' default: the key is missing)"
        reader.refuse(key, f"{kv_heads} kv heads{given} do not divide {heads} attention heads")
    return kv_heads


def switched_window(reader: Reader, default: int | None) -> int | None:
    """sliding_window where use_sliding_window is on; transformers writes 0 where it is off."""
    on = reader.flag("use_sliding_window", False)
    window = reader.optional_size("sliding_window", default, at_least=1 if on else 0)
    return window if on else None


def layer_windows(
    reader: Reader,
    layers: int,
    *,
    window: int | None,
    default: Iterable[str],
    local: str = "sliding_attention",
    window_key: str = "sliding_window",
) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types`; `default` where the config has no list."""
    known = ("full_attention", local)
    types = reader.texts("layer_types", length=layers, known=known) or tuple(default)
    if window is None and local in types:
        reader.refuse(window_key, f"is null, but layer_types has {local}")
    return tuple(window if kind == local else None for kind in types)


def every(period: int, layers: int, *, local: str = "sliding_attention") -> list[str]:
    """Layer types where each period-th layer sees everything and the others a window."""
    return ["full_attention" if (i + 1) % period == 0 else local for i in range(layers)]

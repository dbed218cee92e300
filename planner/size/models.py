"""A model of a wanted size where nobody named one, and the largest that a budget trains."""

from __future__ import annotations

from typing import Any

from outlay.planner.estimate.parameters import parameter_counts
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import UsageError
from outlay.profiles.units import format_count

WIDTH_A_LAYER = 128
"""Hidden size over layers. Loss depends weakly on it between 50 and 200 (Kaplan et al. 2020, arXiv
2001.08361, figure 5)."""
HEAD_DIM = 128
VOCABULARY = 32_000
LEAST_PARAMETERS, MOST_PARAMETERS = 1e7, 1e13


def llama_of(parameters: float, *, seq_len: int) -> tuple[ModelSpec, dict[str, Any]]:
    """A Llama of about so many parameters: width 128 times the depth, gated MLP of 8/3 of the width.

    12·layers·hidden² without the vocabulary; the depth is chosen so that the exact count is nearest.
    """
    if not LEAST_PARAMETERS <= parameters <= MOST_PARAMETERS:
        raise UsageError(
            f"a model of {format_count(parameters)} parameters makes no sense here",
            do=f"between {format_count(LEAST_PARAMETERS)} and {format_count(MOST_PARAMETERS)}",
        )
    found: list[tuple[float, ModelSpec, dict[str, Any]]] = []
    guess = (parameters / (12 * WIDTH_A_LAYER**2)) ** (1 / 3)
    for layers in range(max(2, int(guess * 0.6)), int(guess * 1.3) + 3):
        per_block = (
            max(parameters - 2 * VOCABULARY * WIDTH_A_LAYER * layers, parameters / 4) / layers
        )
        exact = (per_block / 12) ** 0.5
        # Wide models get a number of heads that tensor parallelism can divide.
        step = HEAD_DIM * (8 if exact > 5000 else 4 if exact > 2000 else 1)
        hidden = max(HEAD_DIM, round(exact / step) * step)
        if not 0.4 <= hidden / (WIDTH_A_LAYER * layers) <= 2.5:
            continue
        config = _config(layers, hidden, seq_len)
        spec = spec_from_config(
            config, name=f"llama-like-{format_count(parameters).lower()}", source="sized"
        )
        off = abs(parameter_counts(spec).total / parameters - 1)
        shape = abs(hidden / (WIDTH_A_LAYER * layers) - 1)
        found.append((off + 0.1 * shape, spec, config))
    if not found:
        config = _config(2, HEAD_DIM, seq_len)
        return spec_from_config(config, name="llama-like-small", source="sized"), config
    best = min(found, key=lambda row: row[0])
    return best[1], best[2]


def _config(layers: int, hidden: int, seq_len: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": -(-8 * hidden // 3 // 256) * 256, "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM, "num_key_value_heads": hidden // HEAD_DIM,
        "max_position_embeddings": seq_len, "tie_word_embeddings": False,
    }  # fmt: skip

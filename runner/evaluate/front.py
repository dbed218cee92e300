"""Which models are worth having: those that no other beats in size, loss and cost together (the Pareto front)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a model is weighed by; less is better in each."""

    weights_bytes: int
    loss: float
    """Nats a token, on the text that all were read on."""
    training_usd: float | None
    """Of its own run; null = unknown."""

    def beats(self, other: Worth) -> bool:
        """No worse in anything that is known of both, and better in something."""
        pairs = [(self.weights_bytes, other.weights_bytes), (self.loss, other.loss)]
        if self.training_usd is not None and other.training_usd is not None:
            pairs.append((self.training_usd, other.training_usd))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def beaten_by(models: Sequence[Worth]) -> list[int | None]:
    """For each model the one of least loss that beats it; null = it is on the front."""
    found: list[int | None] = []
    for worth in models:
        better = [i for i, other in enumerate(models) if other.beats(worth)]
        found.append(min(better, key=lambda i: models[i].loss) if better else None)
    return found

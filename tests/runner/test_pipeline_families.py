"""The layers of a pipeline, run one after the other, are the transformers model: the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import ranks as r
from small_families import PECULIAR, plan_of

from outlay.profiles.errors import UsageError

pytest.importorskip("deepspeed")

VARIANTS = [
    *((family, changes) for family, changes in PECULIAR.items()),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma2", {"head_dim": 16, "tie_word_embeddings": False}),
    ("gpt2", {"tie_word_embeddings": False}),
]


def chained(stage: Any, plan: Any) -> list[Any]:
    """The layers as DeepSpeed builds and calls them; a tied layer once."""
    from deepspeed.pipe import TiedLayerSpec

    from outlay.runner.stage import layers_of

    tied: dict[str, Any] = {}
    calls: list[Any] = []
    for spec in layers_of(stage, plan)[0]:
        if not isinstance(spec, TiedLayerSpec):
            calls.append(spec.build())
            continue
        if spec.key not in tied:
            tied[spec.key] = spec.build()
        made = tied[spec.key]
        forward = spec.forward_fn
        calls.append(made if forward is None else lambda x, f=forward, m=made: f(m, x))
    return calls


@pytest.mark.parametrize(
    ("family", "changes"), VARIANTS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(VARIANTS)]
)
def test_the_same_logits(family: str, changes: dict[str, Any]) -> None:
    import torch

    from outlay.runner.model import build_model
    from outlay.runner.stage import Stage

    plan = plan_of(family, changes)
    job = plan.job
    model = build_model(plan.model, precision="fp32", attention=job.attention, seed=job.seed).eval()
    ids = r.global_batch(3)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = ids
        for layer in chained(Stage(plan), plan):
            found = layer(found.clone())
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_every_family_of_the_pipeline_is_tried() -> None:
    from outlay.runner.layouts import LAYOUTS

    assert set(PECULIAR) == set(LAYOUTS)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("bloom", {}, "a pipeline of 'bloom' is not known"),
        ("opt", {"layerdrop": 0.1}, "layerdrop 0.1 is not run in a pipeline"),
        ("phi", {"tie_word_embeddings": True}, "a head with a bias whose weight is tied"),
    ],
)
def test_what_no_pipeline_runs(family: str, changes: dict[str, Any], says: str) -> None:
    from outlay.runner.stage import Stage

    with pytest.raises(UsageError, match=says):
        Stage(plan_of(family, changes))

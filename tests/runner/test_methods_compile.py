"""torch.compile trains the same; and a run is repeated bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import ranks as r

from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy",
    [{"zero": 1}, {"zero": 2, "activation_checkpointing": "full"}, {"zero": 1, "dp": 1, "pp": 2}],
    ids=lambda v: "-".join(f"{k[:4]}{x}" for k, x in v.items()),
)
def test_compiled_blocks_train_the_same(ranks: RankPool, strategy: dict[str, Any]) -> None:
    """Needs g++; about a minute each to compile."""
    expected = ranks.call("ranks:reference", r.tiny_plan(), 20)[0]
    found = ranks.call("ranks:train", r.tiny_plan(job={"compile": True}, **strategy), 20)[0]
    r.compare(found, expected)


@pytest.mark.parametrize(
    "strategy",
    [{"zero": 2, "loss": "chunked"}, {"zero": 3}, {"zero": 1, "dp": 1, "pp": 2}],
    ids=lambda v: "-".join(f"{k[:4]}{x}" for k, x in v.items()),
)
def test_the_same_seed_is_the_same_run_to_the_bit(
    ranks: RankPool, strategy: dict[str, Any]
) -> None:
    """With dropout, whose random numbers are the seed's too; another seed is another run."""
    dropout = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    plan = r.tiny_plan("gpt2", config=dropout, **strategy)
    other = r.tiny_plan("gpt2", config=dropout, job={"seed": 8}, **strategy)
    first, again = (ranks.call("ranks:train", plan, 5)[0] for _ in range(2))
    assert first["losses"] == again["losses"]
    assert first["norms"] == again["norms"]
    assert all((first["weights"][k] == again["weights"][k]).all() for k in first["weights"])
    assert ranks.call("ranks:train", other, 5)[0]["losses"] != first["losses"]

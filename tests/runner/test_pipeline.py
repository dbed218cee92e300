"""Two stages do the mathematics of one process, for each family; stages are cut where the planner says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks as r

from outlay.planner.estimate.stages import partition
from outlay.planner.spec.families import spec_from_config
from outlay.profiles.errors import UsageError
from outlay.runner.pool import RankPool

pytestmark = pytest.mark.ranks
STEPS = 20
TWO_STAGES: dict[str, Any] = {"dp": 1, "pp": 2, "grad_accum": 4}


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", {"zero": 0}),
        ("llama", {"zero": 1, "activation_checkpointing": "full"}),
        ("gpt2", {"zero": 0}),
        ("gpt2", {"zero": 1}),
        ("qwen2", {"zero": 1}),
        ("qwen3", {"zero": 0}),
        ("mistral", {"zero": 1}),
        ("gpt_neox", {"zero": 1}),
        ("gemma", {"zero": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"zero{value['zero']}-{len(value)}",
)
def test_two_stages_are_one_process(ranks: RankPool, family: str, strategy: dict[str, Any]) -> None:
    """GPT-2, Gemma and this Qwen2 have tied embeddings, in the first stage and in the last."""
    expected = ranks.call("ranks:reference", r.tiny_plan(family), STEPS)[0]
    first, last = ranks.call("ranks:train", r.tiny_plan(family, **TWO_STAGES, **strategy), STEPS)
    r.compare(first, expected)
    assert last["losses"] == first["losses"]
    assert last["norms"] == pytest.approx(first["norms"])
    assert last["weights"] is None
    assert (first["dp_rank"], last["dp_rank"]) == (0, 0)
    assert (first["is_loss_rank"], last["is_loss_rank"], last["pipeline"]) == (False, True, True)


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_two_stages_follow_one_process_where_rounding_grows(ranks: RankPool, family: str) -> None:
    """OPT's ReLU and Mixtral's choice of experts jump: after some steps a rounding error is a difference."""
    expected = ranks.call("ranks:reference", r.tiny_plan(family), 6)[0]
    first = ranks.call("ranks:train", r.tiny_plan(family, zero=1, **TWO_STAGES), 6)[0]
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert first["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert list(first["weights"]) == list(expected["weights"])


@pytest.mark.processes
def test_two_stages_on_four_ranks_are_one_process(ranks: RankPool) -> None:
    with RankPool(4) as four:
        for family, zero in (("llama", 0), ("gpt2", 1)):
            expected = ranks.call("ranks:reference", r.tiny_plan(family), STEPS)[0]
            plan = r.tiny_plan(family, dp=2, pp=2, grad_accum=2, zero=zero)
            found = four.call("ranks:train", plan, STEPS)
            r.compare(found[0], expected)
            assert [rank["dp_rank"] for rank in found] == [0, 1, 0, 1]
            assert [rank["is_loss_rank"] for rank in found] == [False, False, True, True]


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.long), "gpt2", "opt"])
def test_an_export_of_stages_has_the_stages_logits(
    ranks: RankPool, family: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    plan = r.tiny_plan(family, zero=1, **TWO_STAGES)
    logits = ranks.call("ranks:exported_logits", plan, str(tmp_path / "export"))[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        again = model(input_ids=r.global_batch(900)[: plan.strategy.micro_batch]).logits
    assert abs(again.numpy() - logits).max() == 0.0


def test_stages_are_cut_where_the_planner_says(ranks: RankPool) -> None:
    config = {"num_hidden_layers": 6, "vocab_size": 2048}
    plan = r.tiny_plan(config=config, **TWO_STAGES)
    spec = spec_from_config(plan.model.config, name="tiny", source="test")
    expected = partition(spec, plan.job.seq_len, 2)
    assert expected == (0, 6, 8), "the head of 2048 words costs about three of these blocks"
    first, last = ranks.call("ranks:parallel_sizes", plan)
    assert first["parts"] == last["parts"] == [0, 6, 9]  # norm and head are two layers here
    assert first["layers"].count("DecoderBlock") == 5
    assert last["layers"].count("DecoderBlock") == 1


def test_each_stage_computes_its_share_of_the_blocks_again(ranks: RankPool) -> None:
    how = {"activation_checkpointing": "full", "recompute_layers": 3}
    plan = r.tiny_plan(config={"num_hidden_layers": 5}, **TWO_STAGES, **how)
    for stage in ranks.call("ranks:block_forwards", plan):
        # four micro-batches; two of the stage's blocks (half of three, rounded up) run twice in each
        assert stage["counts"] == [8, 8, *[4] * (len(stage["counts"]) - 2)]


def test_each_stage_fills_its_own_parts_only(ranks: RankPool) -> None:
    stages = ranks.call("ranks:parallel_sizes", r.tiny_plan(**TWO_STAGES))
    whole = r.tiny_plan()
    spec = spec_from_config(whole.model.config, name="tiny", source="test")
    from outlay.planner.estimate.parameters import parameter_counts

    assert sum(stage["parameters"] for stage in stages) == parameter_counts(spec).total
    tied = ranks.call("ranks:parallel_sizes", r.tiny_plan("gpt2", **TWO_STAGES))
    spec = spec_from_config(r.CONFIGS["gpt2"], name="tiny", source="test")
    copy = r.VOCAB * spec.hidden
    assert sum(stage["parameters"] for stage in tied) == parameter_counts(spec).total + copy


def test_more_stages_than_blocks(ranks: RankPool) -> None:
    plan = r.tiny_plan(config={"num_hidden_layers": 1}, **TWO_STAGES)
    with pytest.raises(UsageError, match="2 stages needs as many blocks, llama has 1"):
        ranks.call("ranks:block_forwards", plan)


def test_a_family_that_no_layout_knows(ranks: RankPool) -> None:
    import dataclasses

    plan = r.tiny_plan(**TWO_STAGES)
    other = {**plan.model.config, "model_type": "bloom"}
    unknown = dataclasses.replace(plan, model=dataclasses.replace(plan.model, config=other))
    with pytest.raises(UsageError, match="a pipeline of 'bloom' is not known") as caught:
        ranks.call("ranks:block_forwards", unknown)
    assert "gpt2, gpt_neox, granite, llama" in caught.value.do

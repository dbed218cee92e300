"""Emitting: what is left to the script is said, what no target writes is not planned, nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outlay.planner.check.mend import with_edits, written_texts
from outlay.planner.read.reader import read_configuration
from outlay.runner.cli import cli

PLAN = (
    "plan", "--model", "llama-3.2-1b", "--hardware", "h100-sxm:8", "--global-batch", "64", "--seq-len", "1024",
    "--steps", "10",
)  # fmt: skip


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def error(result: Result) -> str:
    assert result.exception is not None
    return f"{result.output} {result.exception}"


@pytest.mark.parametrize(
    ("target", "words", "rule"),
    [
        ("trainer", ("--optimizer", "adamw_8bit"), "json_names_the_optimizer"),
        ("deepspeed", ("--optimizer", "adamw_8bit"), "json_names_the_optimizer"),
        ("trainer", ("--optimizer", "muon"), "trainer_writes_adam"),
        ("trainer", ("--tp", "2"), "trainer_shares_by_zero_alone"),
        ("trainer", ("--activation-checkpointing", "selective"), "trainer_shares_by_zero_alone"),
        ("trainer", ("--prune", "0.5"), "trainer_writes_plain_jobs"),
        ("trainer", ("--finetune", "lora:r8", "--model", "gpt2"), "trainer_adapts_q_and_v"),
    ],
)
def test_what_no_target_writes_is_not_planned(
    target: str, words: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    out = tmp_path / "plan.yaml"
    result = run(*PLAN, "--for", target, "--out", str(out), *words)
    assert rule in getattr(result.exception, "why", ""), error(result)
    assert not out.exists()


def test_lora_for_a_trainer_names_the_target_that_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    result = run(*PLAN, "--for", "trainer", "--finetune", "lora:r8", "--out", str(out))
    assert "outlay emit axolotl" in " ".join(result.output.split()), error(result)
    words = ("--base-model", "some/weights", "--data", "text.jsonl")
    made = run("emit", "axolotl", str(out), *words, "--out", str(tmp_path / "job"))
    assert made.exit_code == 0, error(made)


def test_what_the_json_has_no_words_for_is_said(tmp_path: Path) -> None:
    plan, out = str(tmp_path / "plan.yaml"), str(tmp_path / "ds.json")
    words = ("--tp", "2", "--activation-checkpointing", "full")
    assert run(*PLAN, "--for", "deepspeed", *words, "--out", plan).exit_code == 0
    result = run("emit", "deepspeed", plan, "--out", out)
    assert result.exit_code == 0, error(result)
    assert "_init_tp_mesh_device(tensor_model_parallel_size=2)" in result.stderr
    assert "gradient_checkpointing_enable()" in result.stderr
    assert json.loads(run("emit", "deepspeed", plan).stdout) == json.loads(Path(out).read_text())


def test_a_configuration_that_is_there_is_left_alone(tmp_path: Path) -> None:
    plan, out = str(tmp_path / "plan.yaml"), tmp_path / "ds.json"
    assert run(*PLAN, "--for", "deepspeed", "--out", plan).exit_code == 0
    assert run("emit", "deepspeed", plan, "--out", str(out)).exit_code == 0
    assert run("emit", "deepspeed", plan, "--out", str(out)).exit_code == 0  # the same text
    out.write_text("{}")
    assert "another file already" in error(run("emit", "deepspeed", plan, "--out", str(out)))
    assert out.read_text() == "{}"
    given = tmp_path / "mine.json"
    given.write_text('{"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": "yes"}}')
    assert "another file already" in error(run("check", str(given), "--write", str(out)))


def test_the_mended_file_of_a_program_is_written_beside(tmp_path: Path) -> None:
    """Recomputation of Accelerate's loop is in loop.json, which only the program names."""
    plan, job = str(tmp_path / "plan.yaml"), tmp_path / "job"
    fixed = ("--zero", "3", "--activation-checkpointing", "none")
    assert run(*PLAN, "--for", "trainer", *fixed, "--out", plan).exit_code == 0
    assert run("emit", "accelerate", plan, "--out", str(job)).exit_code == 0
    before = read_configuration(job / "launch.sh")
    after = with_edits(before, before.set_value("checkpointing", True), before.framework)
    assert (before.said("checkpointing"), after.said("checkpointing")) == ("none", "full")
    texts = written_texts(before, after, str(tmp_path / "mended.sh"))
    assert set(texts) == {str(tmp_path / "mended.sh"), str(tmp_path / "mended.loop.json")}
    loop = json.loads(texts[str(tmp_path / "mended.loop.json")])
    assert loop == json.loads((job / "loop.json").read_text()) | {"gradient_checkpointing": True}

"""`outlay check`: each rule is named on a file that breaks it, its mend comes out clean, rubbish is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_files import golden, key_paths

from outlay.planner.read.document import parse_document
from outlay.planner.read.edits import edited, remove, rename, set_to
from outlay.planner.rules import RULES
from outlay.planner.rules.config import LEVELS, all_config_rules
from outlay.profiles.errors import UsageError
from outlay.runner.cli import cli

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0,
    "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
    "zero_optimization": {"stage": 2},
}  # fmt: skip
Z = "zero_optimization"
CPU = {"device": "cpu"}
BROKEN: dict[str, dict[str, Any]] = {
    "batch_closes": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
    "number_in_quotes": {"gradient_accumulation_steps": "8"},
    "batch_not_positive": {"train_micro_batch_size_per_gpu": 0},
    "one_precision": {"fp16": {"enabled": True}},
    "precision_block_without_enabled": {"fp16": {"loss_scale": 0}},
    "top_level_typo": {Z: None, "zero_optimisation": {"stage": 2}},
    "block_unknown_key": {Z: {"stage": 3, "aio": {"block_size": 262144}}},
    "wrong_type": {Z: {"stage": 3, "stage3_prefetch_bucket_size": 15099494.4}},
    "removed_key": {"elasticity": {"enabled": True}},
    "offload_param_below_stage_3": {Z: {"stage": 2, "offload_param": CPU}},
    "offload_needs_zero": {Z: {"stage": 0, "offload_optimizer": CPU}},
    "nvme_needs_stage_3": {Z: {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
    "nvme_needs_a_path": {Z: {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
    "partial_offload": {Z: {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
    "gradient_scaling_with_reduce_scatter": {"gradient_predivide_factor": 2.0},
    "allreduce_sum": {"gradient_allreduce_op": "sum", Z: {"stage": 3}},
    "allgather_bucket_is_even": {Z: {"stage": 1, "allgather_bucket_size": 500001}},
    "gradient_norm_is_needed": {Z: {"stage": 2, "compute_grad_norm": False}},
    "old_stage_1": {Z: {"stage": 1, "legacy_stage1": True}},
    "old_zero_format": {Z: True},
    "bf16_optimizer_instead": {Z: {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "gradients_at_stage_0": {Z: {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}},
    "param_dtype_conflicts": {"data_types": {"param_dtype": "fp16"}},
    "clipping_in_the_optimizer": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "max_grad_norm": 1.0}}},
    "optimizer_unknown": {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-5}}},
    "optimizer_untested_with_zero": {"optimizer": {"type": "SGD", "params": {"lr": 1e-5}}},
    "scheduler_unknown": {"scheduler": {"type": "WarmupLinear", "params": {}}},
    "warmup_is_positive": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
    "pipeline_without_zero_2": {"pipeline": {"stages": 2}},
    "communication_dtype_unknown": {"communication_data_type": "float16"},
    "secondary_partition_divides": {Z: {"stage": 3, "zero_hpz_partition_size": 3}},
    "zero_plus_plus_below_stage_3": {Z: {"stage": 2, "zero_quantized_weights": True}},
    "zenflow": {Z: {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
}  # fmt: skip
"""One change each of a sound file; null takes a key away."""


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["check", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def checked(path: Path, *args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        CliRunner().invoke(cli, ["check", str(path), "--format", "json", *args]).stdout
    )
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_named_and_its_mend_is_clean(name: str, tmp_path: Path) -> None:
    value = {k: v for k, v in (GOOD | BROKEN[name]).items() if v is not None}
    path, out = tmp_path / "ds.json", tmp_path / "out.json"
    path.write_text(json.dumps(value, indent=2))
    faults = {
        f["rule"]: f
        for f in checked(path, "--hardware", "h100-sxm:8", "--write", str(out))["findings"]
    }
    assert name in faults
    assert faults[name]["where"].startswith(f"{path}:")
    left = [
        f for f in checked(out, "--hardware", "h100-sxm:8")["findings"] if f["level"] != "advice"
    ]
    assert left == []


def test_a_sound_file_raises_no_alarm(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD, indent=2))
    assert [
        f for f in checked(path, "--hardware", "h100-sxm:8")["findings"] if f["level"] != "advice"
    ] == []


def test_a_file_that_does_not_fit_is_made_to_fit(tmp_path: Path) -> None:
    path, out = tmp_path / "ds.json", tmp_path / "out.json"
    path.write_text(json.dumps(GOOD | {"train_micro_batch_size_per_gpu": 4}, indent=2))
    flags = ("--hardware", "h100-sxm:8", "--model", "llama-3-8b", "--seq-len", "4096")
    assert run(str(path), *flags)[0] == 3
    assert run(str(path), *flags, "--fix", "--write", str(out))[0] == 0
    assert checked(out, *flags)["state"] == "fits"


FITTED = {
    "a.yml": "base_model: llama-3-8b\nsequence_len: 8192\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\n"
    "adapter: qlora\nload_in_4bit: true\nlora_r: 16\nbf16: true\ngradient_checkpointing: true\n",
    "a.yaml": "model_name_or_path: llama-3-8b\nstage: sft\ntemplate: llama3\nfinetuning_type: lora\n"
    "quantization_bit: 4\ncutoff_len: 8192\nper_device_train_batch_size: 2\nbf16: true\n",
    "a.sh": "torchrun --nproc_per_node 1 train.py --model_name_or_path llama-3-8b --output_dir out --bf16 true "
    "\\\n  --per_device_train_batch_size 2 --max_seq_length 8192 --load_in_4bit true --lora_r 16 "
    "--gradient_checkpointing true\n",
}


@pytest.mark.parametrize("name", FITTED)
def test_the_nearest_fit_is_the_cheapest_change(name: str, tmp_path: Path) -> None:
    """Logits are most of it: a fused loss costs nothing, and half a micro-batch more than that."""
    path, out = tmp_path / name, tmp_path / f"out{Path(name).suffix}"
    path.write_text(FITTED[name])
    flags = ("--hardware", "rtx-4090:1")
    before = checked(path, *flags, "--fix", "--write", str(out))
    assert before["state"] == "does not fit"
    assert [c.partition(" (")[0] for c in before["taken"]["changes"]] == ["a fused loss"]
    after = checked(out, *flags)
    assert (after["state"], after["estimate"]["strategy"]["loss"]) == ("fits", "fused")
    assert after["estimate"]["strategy"] == before["taken"]["strategy"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "", "empty"),
        ("a.json", '{"a": 1,,}', ":1"),
        ("a.json", '{\n "bf16": {"enabled": True}}', ":2"),
        ("a.json", "[1, 2]", "a list"),
        ("a.yaml", "a: [1\nb: 2", "not valid YAML"),
        ("a.yaml", "x: 1\ny: 2\n", "no format"),
        ("a.yaml", "a: &a [*a]\n", "too deep"),
        ("a.json", "{" * 5000, ":1"),
        ("a.sh", "echo hello\n", "no launch command"),
    ],
)
def test_rubbish_is_one_clear_error(name: str, text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    result = CliRunner().invoke(cli, ["check", str(path)])
    assert isinstance(result.exception, UsageError)
    assert says in result.exception.message()


@pytest.mark.parametrize(
    ("name", "text", "where", "says"),
    [
        ("a.yml", "base_model: gpt2\nmicro_batch_size: two\ngradient_accumulation_steps: 1\n",
         "a.yml:2: micro_batch_size", "a whole number"),
        ("a.yml", "base_model: gpt2\nmicro_batch_size: 1\ngradient_accumulation_steps: 1\nbf16: maybe\n",
         "a.yml:4: bf16", "one of true, false"),
        ("a.yaml", "distributed_type: DEEPSPEED\nnum_processes: eight\n", "a.yaml:2: num_processes", "a whole number"),
        ("a.yaml", "stage: sft\ntemplate: x\nfinetuning_type: lorra\n", "a.yaml:3: finetuning_type", "write lora"),
        ("a.json", '{"output_dir": "x",\n"per_device_train_batch_size": "4"}',
         "a.json:2: per_device_train_batch_size", "without quotes"),
        ("a.sh", "torchrun train.py --output_dir x \\\n --per_device_train_batch_size many\n",
         "a.sh:2: args.per_device_train_batch_size", "a whole number"),
        ("a.json", '{"train_batch_size": 8,\n"optimizer": "AdamW"}', "a.json:2: optimizer", '{"type": "AdamW"}'),
        ("a.json", '{"train_batch_size": 8,\n"zero_optimization": {"stage": 9}}',
         "a.json:2: zero_optimization.stage", "stages 0, 1, 2 and 3"),
    ],
)  # fmt: skip
def test_a_wrong_type_has_its_line_and_key(
    name: str, text: str, where: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    value = checked(path)
    (found,) = [f for f in value["findings"] if f["where"].endswith(where)]
    assert found["level"] == "illegal"
    assert says in found["what"] + found["do"]


def test_what_a_person_must_mend_leaves_the_estimate_open(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("base_model: gpt2\nmicro_batch_size: two\ngradient_accumulation_steps: 1\n")
    value = checked(path, "--hardware", "rtx-4090:1")
    assert (value["state"], value["estimate"]) == ("illegal", None)
    assert "argument_wrong_type" in value["unknown"]


def test_keys_of_the_answer(tmp_path: Path) -> None:
    """The published keys of outlay/check@1; those of `estimate` are estimate.keys."""
    path = tmp_path / "ds.json"
    keys: set[str] = set()
    for change in (
        {},
        {"train_micro_batch_size_per_gpu": 4},
        {Z: {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    ):
        path.write_text(json.dumps(GOOD | change))
        for more in ((), ("--fix",), ("--hardware", "h100-sxm:16", "--inter-node-gbps", "400")):
            flags = (
                "--hardware",
                "h100-sxm:8",
                "--model",
                "llama-3-8b",
                "--seq-len",
                "4096",
                *more,
            )
            value = checked(path, *flags)
            assert value["schema"] == "outlay/check@1"
            keys |= key_paths(value | {"estimate": None})
    golden("check", keys)


def test_a_binary_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\x80\x02\x00\xff")
    assert isinstance(CliRunner().invoke(cli, ["check", str(path)]).exception, UsageError)


def test_edits_leave_comments_and_order() -> None:
    text = "# head\na: 1  # one\nb:\n  c: 2\n  d: 3  # three\n"
    document = parse_document(text, Path("x.yaml"), "x.yaml")
    assert edited(
        document, [set_to("a", value=5), remove("b", "c"), set_to("b", "e", value=True)]
    ).text == ("# head\na: 5  # one\nb:\n  d: 3  # three\n  e: true\n")
    assert edited(document, [rename("b", "d", key="z")]).value == {"a": 1, "b": {"c": 2, "z": 3}}


def test_rules_have_names_levels_and_evidence() -> None:
    rules = all_config_rules()
    assert len({r.name for r in rules}) == len(rules)
    assert all(r.level in LEVELS and len(r.evidence) > 10 and r.summary for r in rules)
    assert {
        "nvme_needs_stage_3",
        "sequence_parallel_divides_kv_heads",
        "expert_parallel_at_stage_3_alone",
    } <= {r.name for r in RULES}


def test_exit_codes_of_strict_and_of_what_is_written(tmp_path: Path) -> None:
    path, out = tmp_path / "ds.json", tmp_path / "out.json"
    typo = GOOD | BROKEN["top_level_typo"]
    path.write_text(json.dumps({k: v for k, v in typo.items() if v is not None}))
    assert [run(str(path))[0], run(str(path), "--strict")[0]] == [0, 2]
    path.write_text(json.dumps(GOOD | {"fp16": {"enabled": True}}))
    assert run(str(path))[0] == 2
    assert run(str(path), "--write", str(out))[0] == 0
    assert isinstance(
        CliRunner().invoke(cli, ["check", str(path), "--write", str(path)]).exception, UsageError
    )


def test_what_is_clearly_faster_is_taken_on_request(tmp_path: Path) -> None:
    path, out = tmp_path / "ds.json", tmp_path / "out.json"
    path.write_text(json.dumps(GOOD | {"gradient_accumulation_steps": 32}, indent=2))
    flags = ("--hardware", "h100-sxm:8", "--model", "gpt2", "--seq-len", "1024")
    plain = checked(path, *flags)
    assert (plain["state"], plain["taken"]) == ("fits", None)
    better = checked(path, *flags, "--better", "--write", str(out))["taken"]
    again = checked(out, *flags)["estimate"]
    assert again["strategy"] == better["strategy"]
    assert again["step"]["time_s"] < plain["estimate"]["step"]["time_s"] / 1.1


@pytest.mark.parametrize("reference", ["$CONFIG", "ds.json"])
def test_a_file_that_only_the_shell_knows_is_no_fault(reference: str, tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    written = "" if reference.startswith("$") else "cat <<EOT > ds.json\n{}\nEOT\n"
    path.write_text(
        f"{written}torchrun --nproc_per_node 2 train.py --model_name_or_path gpt2 --output_dir out "
        f"--deepspeed {reference}\n"
    )
    value = checked(path, "--hardware", "rtx-4090:2")
    assert (value["state"], value["estimate"]) == ("unknown", None)
    assert [f["level"] for f in value["findings"]] == ["advice"]


@pytest.mark.parametrize(("targets", "said"), [("all", True), ("q_proj,v_proj", False)])
def test_adapters_that_are_not_estimated_are_named(
    targets: str, said: bool, tmp_path: Path
) -> None:
    path = tmp_path / "lf.yaml"
    path.write_text(
        "model_name_or_path: meta-llama/Meta-Llama-3-8B\nfinetuning_type: lora\nstage: sft\n"
        f"lora_target: {targets}\ncutoff_len: 512\nbf16: true\n"
    )
    value = checked(path, "--hardware", "a100-sxm-80gb:1")
    rows = [a for a in value["estimate"]["assumptions"] if a["what"] == "adapters"]
    assert [f"lora_target: {targets}" in row["source"] for row in rows] == [True] * said

"""`estimate --cases`: rows in, predictions out, in order."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from outlay.planner.cases import (
    COLUMNS_IN,
    COLUMNS_OUT,
    evaluate_case,
    express,
    predict,
    predict_file,
)
from outlay.profiles.errors import FileError, UsageError

LLAMA = {
    "id": "a", "model": "m", "arch": "llama", "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8",
    "ffn": "14336", "vocab": "128256", "seq_len": "4096", "gpu": "h100-sxm", "gpus": "8", "zero": "3",
    "micro_batch": "1", "activation_checkpointing": "full", "precision": "bf16", "framework": "deepspeed",
}  # fmt: skip


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS_IN, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_one_row_out_for_each_in(tmp_path: Path) -> None:
    bad = {"id": "b", "gpu": "no-such-gpu", "hidden": "64", "layers": "2"}
    source = _write(
        tmp_path / "in.csv", [LLAMA, bad, LLAMA | {"id": "c", "memory_kind": "allocated"}]
    )
    assert predict_file(source, tmp_path / "out.csv") == (3, 1)
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        reader = csv.DictReader(file)
        out = list(reader)
    assert tuple(reader.fieldnames or ()) == COLUMNS_OUT
    assert [r["id"] for r in out] == ["a", "b", "c"]
    assert "no-such-gpu" in out[1]["error"]
    assert out[1]["predicted_memory_gib"] == ""
    assert out[0]["error"] == ""
    low, high = (
        float(out[0]["predicted_memory_low_gib"]),
        float(out[0]["predicted_memory_high_gib"]),
    )
    assert low < float(out[0]["predicted_memory_gib"]) < high
    assert float(out[2]["predicted_memory_gib"]) < float(out[0]["predicted_memory_gib"])


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,colour\na,red\n", encoding="utf-8")
    with pytest.raises(FileError, match="colour"):
        predict_file(path, tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers": "-3"}, "layers"),
        ({"layers": "0"}, "layers"),
        ({"hidden": "many"}, "hidden"),
        ({"heads": "7"}, "heads"),
        ({"gpu": ""}, "gpu"),
        ({"zero": "x"}, "zero"),
        ({"activation_checkpointing": "some"}, "activation_checkpointing"),
        ({"tp": "3"}, "tp"),
        ({"seq_len": "nan"}, "seq_len"),
        ({"optimizer": "foo"}, "optimizer: 'foo' is none of adamw"),
        ({"precision": "int4"}, "precision: 'int4'"),
        ({"quant": "junk"}, "quant: 'junk'"),
        ({"attention": "linear"}, "attention: 'linear'"),
        ({"memory_kind": "resident"}, "memory_kind: 'resident'"),
        ({"dp": "8", "global_batch": "12"}, "does not divide global_batch 12"),
        ({"dp": "4"}, "not gpus 8"),
    ],
)
def test_nonsense_is_named(change: dict[str, str], word: str) -> None:
    assert word in predict(LLAMA | change)["error"]


@pytest.mark.parametrize(
    ("column", "text", "same"),
    [
        ("optimizer", "fused Adam", "adamw"),
        ("optimizer", "Adam8bit", "adamw_8bit"),
        ("precision", "bf16-mixed", "bf16"),
        ("precision", "float8", "fp8"),
        ("attention", "flash-attention-2", "flash"),
        ("quant", "BNB.NF4", "nf4"),
        ("activation_checkpointing", "FULL", "full"),
    ],
)
def test_words_as_people_write_them(column: str, text: str, same: str) -> None:
    assert predict(LLAMA | {column: text}) == predict(LLAMA | {column: same})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("id,model\na,b,c,d\n", "2 cells more"),
        ("id,model,model\na,b,c\n", "given twice"),
        ('id,model\na,"b\n', "not a CSV file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=word):
        predict_file(path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_unstated_checkpointing_is_the_least_that_fits() -> None:
    row = LLAMA | {"activation_checkpointing": "", "micro_batch": "16", "framework": "megatron"}
    assert express(row).strategy.activation_checkpointing == "full"
    assert (
        express(row | {"micro_batch": "1", "gpu": "b200"}).strategy.activation_checkpointing
        == "none"
    )
    assert (
        express(row | {"activation_checkpointing": "none"}).strategy.activation_checkpointing
        == "none"
    )


def test_adapters_and_quantization() -> None:
    row = LLAMA | {
        "zero": "0",
        "gpus": "1",
        "framework": "litgpt(fabric)",
        "activation_checkpointing": "none",
    }
    full = evaluate_case(express(row)).memory.allocated[0]
    lora = evaluate_case(express(row | {"lora_rank": "8"})).memory.allocated[0]
    qlora = evaluate_case(express(row | {"lora_rank": "8", "quant": "bnb.nf4"})).memory.allocated[0]
    assert qlora < lora < full / 1.5
    assert express(row | {"quant": "bnb.nf4"}).job.finetune is not None


def test_layers_follow_from_the_size_and_the_pipeline() -> None:
    row = LLAMA | {"layers": "", "n_params": "8030261248", "pp": "4", "zero": "1"}
    layers = express(row).spec.layers
    assert layers % 4 == 0
    assert layers == 32


def test_a_row_without_sizes_must_name_a_preset() -> None:
    with pytest.raises(UsageError, match="no preset"):
        express(LLAMA | {"hidden": "", "model": "nobody-knows"})


def test_the_predictions_never_replace_the_cases(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("id,model,gpu,gpus\n1,gpt2,h100-sxm,1\n")
    with pytest.raises(UsageError, match="is the file of the cases"):
        predict_file(path, tmp_path / "." / "cases.csv")
    assert path.read_text().startswith("id,model")


def test_huge_numbers_are_that_rows_error(tmp_path: Path) -> None:
    out = predict(LLAMA | {"seq_len": "99999999999999999999"})
    assert "seq_len: 1e+20 is more than the largest that makes sense" in out["error"]


def test_the_stated_size_tells_a_t5_with_gated_mlps() -> None:
    """T5 of 2.8e9 (v1.1 XL, arXiv 2002.05202: 24 and 24 blocks of 2048, MLPs of 5120, gated) and of 737e6
    (the first T5 large, arXiv 1910.10683, section 3.7: 1024, 4096, plain)."""
    row = {"id": "t", "model": "t", "arch": "t5", "seq_len": "512", "gpu": "a100-sxm-80gb", "gpus": "8",
           "micro_batch": "1", "precision": "bf16", "framework": "megatron"}  # fmt: skip
    sizes = {"layers": "24", "hidden": "2048", "heads": "32", "ffn": "5120", "n_params": "2.8e9"}
    for layers in ("24", "48"):
        xl = express(row | sizes | {"layers": layers}).spec
        assert [(b.count, b.mlp.gated) for b in xl.blocks] == [(24, True), (24, True)]
    sizes = {"layers": "24", "hidden": "1024", "heads": "16", "ffn": "4096", "n_params": "737e6"}
    large = express(row | sizes).spec
    assert [(b.count, b.mlp.gated) for b in large.blocks] == [(24, False), (24, False)]
    stated = express(row | sizes | {"notes": "swiglu=true", "n_params": ""}).spec
    assert all(b.mlp.gated for b in stated.blocks)

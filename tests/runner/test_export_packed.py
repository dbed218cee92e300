"""`outlay export`: dense, packed and mixed folders load in a fresh process and answer as they should."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as r
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.planner.estimate.compression import exported_bytes
from outlay.planner.spec.compress import Qat
from outlay.planner.spec.families import spec_from_config
from outlay.planner.spec.packing import Packing
from outlay.profiles.errors import NotFeasible, OutlayError, UsageError
from outlay.runner.cli import cli
from outlay.runner.compress.post_training import Option, choose, steps_of
from outlay.runner.data.prepare import prepare
from outlay.runner.exported import card
from outlay.runner.exported.matrices import Linear
from outlay.runner.exported.packed import dequantized
from outlay.runner.pool import RankPool

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(40).reshape(2, 20) * 7 % 512


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    with torch.no_grad():
        # half of it pruned: zeros must stay zeros in every packing
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(folder)
    return folder


def export(source: Path, out: Path, *args: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["export", str(source), "--out", str(out), *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    made: dict[str, Any] = json.loads((out / "outlay.json").read_text())
    return made


FRESH = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
ids = torch.from_numpy(numpy.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        numpy.save(folder + ".npy", model(input_ids=ids).logits.numpy())
assert not any(name.split(".")[0] == "outlay" for name in sys.modules)
"""


def expected_logits(dense: Path, packing: Packing | None) -> np.ndarray[Any, Any]:
    """The dense model with every matrix of its blocks rounded as packed ones are."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for name, module in model.named_modules():
            if packing is not None and "_proj" in name:
                module.weight.copy_(dequantized(module.weight, packing))
                zeros = model.model.layers[0].mlp.up_proj.weight[:, ::2]
        if packing is not None:
            assert not zeros.any()
        logits: np.ndarray[Any, Any] = model(input_ids=IDS).logits.numpy()
    return logits


@pytest.mark.processes
def test_every_packing_loads_in_a_fresh_process(dense: Path, tmp_path: Path) -> None:
    """transformers (with torchao or compressed-tensors) alone: the same logits; sizes as planned."""
    words = ("none", "int8", "int8-dynamic", "int4:g32", "int4:g64")
    folders = {word: tmp_path / word.replace(":", "-") for word in words}
    np.save(tmp_path / "ids.npy", IDS.numpy())
    spec = spec_from_config({**CONFIG, "model_type": "llama"}, name="m", source="test")
    for word, folder in folders.items():
        record = export(dense, folder, "--quantize", word)
        packing = None if word == "none" else Packing.parse(word)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        assert record["weights_bytes"] == size
        assert record["planned_bytes"] == exported_bytes(spec, 4, packing)
        assert size == pytest.approx(record["planned_bytes"], rel=0.02), word
        assert record["zeros"] == 320 * 64
        assert {m["stored"] for m in record["matrices"]} == {"dense" if word == "none" else word}
        assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "ids.npy"), *map(str, folders.values())],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    for word, folder in folders.items():
        logits = np.load(f"{folder}.npy")
        packing = None if word == "none" else Packing.parse(word)
        wanted = expected_logits(dense, packing)
        # inputs in 8 bits are another rounding; all else is the same arithmetic
        atol = 0.02 if packing is not None and packing.dynamic else 1e-5
        np.testing.assert_allclose(logits, wanted, atol=atol, rtol=0, err_msg=word)
        if packing is not None:
            assert np.abs(wanted - expected_logits(dense, None)).max() > 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for i in range(12):
        (root / f"{i}.py").write_text(f"def f{i}(x):\n    return x * {i}\n" * 20)
    prepare(sorted(root.glob("*.py")), root / "data", seed=0, vocab_size=300, heldout_fraction=0.5)
    return root / "data"


def test_a_mixture_under_a_size_limit(dense: Path, data: Path, tmp_path: Path) -> None:
    """Within the limit, better than 4 bits everywhere; what cannot be is refused before it is measured."""
    shutil.copytree(dense, tmp_path / "source")
    text = ["--data", str(data), "--seq-len", "32", "--calibration", "4"]
    limit = 1_140_000
    record = export(tmp_path / "source", tmp_path / "mixed", "--at-most", f"{limit}B", *text)
    size = sum(p.stat().st_size for p in (tmp_path / "mixed").iterdir())
    assert size <= limit and record["quantize"] == "mixed"
    assert record["weights_bytes"] == pytest.approx(record["planned_bytes"], rel=0.02)
    kinds = {m["stored"] for m in record["matrices"]}
    assert kinds <= {"dense", "int8", "int4:g32"} and "int4:g32" in kinds
    options = record["sensitivity"]["options"]
    assert len(options) == 15 and all(len(each) == 2 for each in options.values())
    with pytest.raises(NotFeasible, match="the smallest mixture takes"):
        export(tmp_path / "source", tmp_path / "no", "--at-most", "300kB", *text)
    assert not (tmp_path / "no").exists()
    assert (
        export(tmp_path / "source", tmp_path / "all", "--at-most", "1GB", *text)["quantize"]
        == "none"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.floats(-0.01, 0.2), st.floats(-0.01, 0.5)),
        min_size=1, max_size=8,
    ),
    st.floats(0.3, 0.6),
)  # fmt: skip
def test_greedy_holds_the_limit_at_the_least_price_first(
    sizes: list[tuple[int, float, float]], share: float
) -> None:
    """The size holds, and what was not taken was no cheaper a byte than what was."""
    linears, steps = [], []
    for i, (rows, eight, four) in enumerate(sizes):
        m = Linear(name=f"m{i}", outputs=32 * rows, inputs=256, is_head=False)
        pairs = zip((Packing(bits=8), Packing(bits=4, group=32)), (eight, four), strict=True)
        options = [
            Option(packing=p, stored_bytes=m.bytes_as(p, 4, mixed=True), loss=x) for p, x in pairs
        ]
        own = steps_of(m, options, 4)
        assert [s.price for s in own] == sorted(s.price for s in own), "later steps are dearer"
        linears.append(m)
        steps += own
    total = sum(m.bytes_as(None, 4) for m in linears)
    chosen = choose(steps, total, int(total * share))
    size = sum(m.bytes_as(chosen.get(m.name), 4, mixed=True) for m in linears)
    assert size <= total * share
    taken = {(s.name, s.packing) for s in steps if chosen.get(s.name) == s.packing}
    worst = max(s.price for s in steps if (s.name, s.packing) in taken)
    left = [s for s in steps if s.name not in chosen]
    assert all(s.price >= worst - 1e-12 for s in left)


def test_keys_of_the_record() -> None:
    """The published keys of `outlay.json`; a change is deliberate."""
    keys = {f.name for f in dataclasses.fields(card.Record)}
    for name, kind in (
        ("matrices[].", card.Matrix),
        ("data.", card.Data),
        ("training.", card.Training),
    ):
        keys |= {name + f.name for f in dataclasses.fields(kind)}
    assert keys == set((GOLDEN / "export.keys").read_text().split())


def test_what_packings_are_called() -> None:
    for word in ("int8", "int8-dynamic", "int4:g64"):
        assert Packing.parse(word).name == word
    assert Packing.parse("int4").group == 32
    for bad in ("int3", "int8:g32", "int4:32", "int4:g12"):
        with pytest.raises(UsageError):
            Packing.parse(bad)
    assert Packing.of_training(Qat(bits=8, activation_bits=8)).name == "int8-dynamic"
    assert Packing.of_training(Qat(bits=8)).name == "int8"
    assert Packing.of_training(Qat(bits=4, group=64)).name == "int4:g64"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["{dense}", "--out", "{dense}"], "not an empty folder"),
        (["{dense}/none", "--out", "{out}"], "no such folder"),
        (["{dense}", "--out", "{out}", "--quantize", "int4:g256"], "do not divide"),
        (["{dense}", "--out", "{out}", "--quantize", "int8", "--at-most", "1GB"], "chooses the packing"),
        (["{dense}", "--out", "{out}", "--at-most", "1MB"], "on what text"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(dense: Path, tmp_path: Path, args: list[str], says: str) -> None:
    names = {"dense": dense, "out": tmp_path / "out"}
    result = CliRunner().invoke(cli, ["export", *(arg.format(**names) for arg in args)])
    assert isinstance(result.exception, OutlayError) and says in result.exception.message()
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_absent_is_named(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlay.runner.evaluate import load

    monkeypatch.setitem(load.PACKERS, "torchao", "no_such_package")
    args = ["export", str(dense), "--out", str(tmp_path / "out"), "--quantize", "int8"]
    result = CliRunner().invoke(cli, args)
    assert isinstance(result.exception, OutlayError)
    assert "pip install 'outlay[compress]'" in result.exception.message()


@pytest.mark.ranks
@pytest.mark.parametrize(
    "strategy", [{"zero": 3}, {"zero": 1, "dp": 1, "pp": 2, "grad_accum": 4}], ids=["zero3", "pp2"]
)
def test_a_checkpoint_is_gathered(
    ranks: RankPool, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    """The same bytes as the engine's own weights, whatever wrote the checkpoint."""
    from safetensors.torch import load_file

    plan = r.tiny_plan(**strategy)
    saved = ranks.call("ranks_saved:train_save_train", plan, str(tmp_path / "c"), 2, 0)[0]["folder"]
    (root,) = {Path(saved)}
    ranks.call(
        "outlay.runner.exported.gather:in_rank", plan, str(root), None, str(tmp_path / "out")
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    weights = next(
        x["weights"] for x in ranks.call("ranks:train", plan, 2) if x["weights"] is not None
    )
    assert set(found) == set(weights)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), weights[name], err_msg=name)

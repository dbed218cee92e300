"""File formats: round trips, keys, and complaints with file, line and key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.planner.jobs import JobFile, read_job_file
from outlay.planner.planning import make_plan, read_plan
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import (
    check_schema,
    parse,
    plain,
    read_mapping,
    to_json,
    to_yaml,
    write_text,
)
from outlay.planner.spec.job import Job
from outlay.planner.spec.measurement import Event, Measurement, Outcome
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.errors import FileError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden"


def key_paths(value: Any, prefix: str = "") -> set[str]:
    """`a.b`, `a.c[].d`: every key that a file has, values left out."""
    if isinstance(value, dict):
        found: set[str] = set()
        for key, inner in value.items():
            found |= {f"{prefix}{key}"} | key_paths(inner, f"{prefix}{key}.")
        return found
    if isinstance(value, list):
        return set().union(*(key_paths(inner, f"{prefix[:-1]}[].") for inner in value))
    return set()


def golden(name: str, keys: set[str]) -> None:
    """The published keys of a format. A change is deliberate: write the file anew and say so."""
    expected = set((GOLDEN / f"{name}.keys").read_text().split())
    assert keys == expected, f"gone: {sorted(expected - keys)}; new: {sorted(keys - expected)}"


def test_keys_of_plan_and_estimate(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster
) -> None:
    plan = plain(make_plan(tiny_spec, {"model_type": "llama"}, tiny_job, cpu_cluster))
    golden("estimate", key_paths(plan["estimate"]))
    plan["estimate"] = plan["deepspeed"] = None
    golden("plan", key_paths(plan))


@pytest.mark.parametrize("kind", [Outcome, Event, Measurement, JobFile])
def test_keys_of_flat_formats(kind: type) -> None:
    name = {"JobFile": "job"}.get(kind.__name__, kind.__name__.lower())
    golden(name, {f.name for f in dataclasses.fields(kind)})


def test_a_plan_survives_the_file(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster, tmp_path: Path
) -> None:
    plan = make_plan(tiny_spec, {"model_type": "llama"}, tiny_job, cpu_cluster)
    for name, text in (("plan.yaml", to_yaml(plan)), ("plan.json", to_json(plan))):
        (tmp_path / name).write_text(text)
        assert read_plan(tmp_path / name) == plan


@pytest.mark.parametrize(
    ("change", "line_key", "says"),
    [
        (("seq_len: 64", "seq_len: many"), "job.seq_len", "valid integer"),
        (("zero: 0", "zero: 0\n  zerro: 1"), "strategy.zerro", "Unexpected keyword"),
        (("schema: outlay/plan@1", "schema: outlay/plan@9"), "", "schema is 'outlay/plan@9'"),
        (("precision: fp32", "precision: fp31"), "job.precision", "fp31"),
    ],
)
def test_complaints_name_file_line_and_key(
    tiny_spec: ModelSpec, tiny_job: Job, cpu_cluster: Cluster, tmp_path: Path,
    change: tuple[str, str], line_key: str, says: str,
) -> None:  # fmt: skip
    text = to_yaml(make_plan(tiny_spec, {"model_type": "llama"}, tiny_job, cpu_cluster))
    assert change[0] in text
    broken = text.replace(*change, 1)
    path = tmp_path / "plan.yaml"
    path.write_text(broken)
    with pytest.raises(FileError) as caught:
        read_plan(path)
    message = str(caught.value)
    wrong = change[1].splitlines()[-1].strip()
    line = next(i for i, row in enumerate(broken.splitlines(), 1) if row.strip() == wrong)
    assert f"{path}:{line}" in message
    assert line_key in message
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found nothing"),
        ("- a\n- b\n", "found list"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(FileError, match=says):
        read_mapping(path)


def test_broken_json_missing_folder_and_binary(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1,}\n')
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FileError, match=r"x\.json:1: not valid JSON"):
        read_mapping(tmp_path / "x.json")
    with pytest.raises(FileError, match="no such file"):
        read_mapping(tmp_path / "none.yaml")
    with pytest.raises(FileError, match="folder"):
        read_mapping(tmp_path)
    with pytest.raises(FileError, match="not a text file"):
        read_mapping(tmp_path / "b.yaml")


def test_schema_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="schema is None, expected 'outlay/plan@1'"):
        check_schema({}, "outlay/plan@1", tmp_path / "x.yaml")


def test_a_job_file_gives_tokens_or_steps_not_both(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: gpt2\ntokens: 1B\nsteps: 5\n")
    with pytest.raises(FileError, match="not both"):
        read_job_file(path)


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.txt"
    write_text(path, "one\n")
    write_text(path, "two\n")
    assert path.read_text() == "two\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]
    with pytest.raises(FileError, match="cannot be written"):
        write_text(path / "below-a-file", "x")


def test_nan_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("nan")})


@given(
    zero=st.integers(0, 3), dp=st.integers(1, 64), micro=st.integers(1, 64), accum=st.integers(1, 64),
    word=st.sampled_from(["none", "selective", "full"]), layers=st.none() | st.integers(0, 99),
)  # fmt: skip
def test_strategies_round_trip(
    zero: int, dp: int, micro: int, accum: int, word: Any, layers: int | None
) -> None:
    from outlay.planner.estimate.candidates import Candidates

    s = Strategy(
        zero=zero, dp=dp, micro_batch=micro, grad_accum=accum, activation_checkpointing=word,
        recompute_layers=layers,
    )  # fmt: skip
    assert parse(Strategy, json.loads(to_json(s)), path="x") == s
    assert Candidates.of([s]).strategy(0) == s


@pytest.mark.parametrize(
    "text", ["5000", "-5usd", "0usd", "0h", "abc", "5 parsecs", "nanusd", "1,5usd"]
)
def test_nonsense_budgets(text: str) -> None:
    from outlay.planner.spec.job import Budget

    with pytest.raises(UsageError):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("5000usd", "money", 5000), ("72h", "hours", 72), ("30min", "hours", 0.5), ("2d", "hours", 48),
     ("100gpuh", "gpu_hours", 100), ("20kWh", "energy", 20), ("5kgCO2e", "carbon", 5)],
)  # fmt: skip
def test_budgets(text: str, kind: str, amount: float) -> None:
    from outlay.planner.spec.job import Budget

    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert Budget.parse(str(budget)) == budget

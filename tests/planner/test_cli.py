"""The commands as a person types them: output, exit codes, help and its documentation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from outlay.planner.planning import read_plan
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import to_yaml
from outlay.runner.cli import COMMANDS, cli, main

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Invoke:
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["outlay", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        assert "Traceback" not in err
        return (code if isinstance(code, int) else 0), out, err

    return call


@pytest.fixture
def files(tmp_path: Path, tiny_config: Path, cpu_cluster: Cluster) -> tuple[str, str]:
    """(model, hardware) to plan for."""
    path = tmp_path / "cluster.yaml"
    path.write_text(to_yaml(cpu_cluster))
    return str(tiny_config), str(path)


def commands(
    group: click.Command, prefix: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], click.Command]]:
    found = [(prefix, group)]
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            inner = group.get_command(context, name)
            assert inner is not None
            found += commands(inner, (*prefix, name))
    return found


def test_every_command_has_help_and_the_table_repeats_it() -> None:
    for path, command in commands(cli):
        assert command.help, path
        if len(path) == 1:
            first = command.help.splitlines()[0]
            assert COMMANDS[path[0]][1] == first, f"{path[0]}: the lazy table says something else"


def test_every_option_and_command_is_documented() -> None:
    reference = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text()
    for path, command in commands(cli):
        assert f"outlay {' '.join(path)}".strip() in reference
        for option in command.params:
            for name in option.opts:
                if name.startswith("--"):
                    assert name in reference, f"{' '.join(path)} {name}"


def test_unknown_commands_come_with_near_ones(invoke: Invoke) -> None:
    code, _, err = invoke("estimat")
    assert code == 2
    assert "estimate" in err


def test_estimate_prints_the_documented_json(invoke: Invoke, files: tuple[str, str]) -> None:
    code, out, _ = invoke(
        "estimate", "--model", files[0], "--hardware", files[1], "--seq-len", "64", "--global-batch", "8",
        "--steps", "5", "--zero", "1", "--format", "json",
    )  # fmt: skip
    assert code == 0
    value = json.loads(out)
    assert value["schema"] == "outlay/estimate@1"
    assert sum(value["memory"]["parts"].values()) == pytest.approx(
        value["memory"]["device_bytes"], abs=len(value["memory"]["parts"])
    )
    assert sum(value["step"]["parts"].values()) == pytest.approx(value["step"]["time_s"])
    assert (
        value["memory"]["low_bytes"]
        < value["memory"]["device_bytes"]
        < value["memory"]["high_bytes"]
    )
    assert value["run"]["cost_usd"]["low"] < value["run"]["cost_usd"]["high"]
    assert value["strategy"]["zero"] == 1
    assert any("micro_batch" in row["what"] for row in value["assumptions"])


def test_what_does_not_fit_is_a_result(invoke: Invoke) -> None:
    code, out, _ = invoke(
        "estimate",
        "--model",
        "llama-3-70b",
        "--hardware",
        "rtx-4090:1",
        "--steps",
        "1",
        "--format",
        "json",
    )
    assert code == 0
    value = json.loads(out)
    assert (value["fits"], value["verdict"]) == (False, "no")
    assert value["headroom_bytes"] < 0


def test_estimate_as_a_table(invoke: Invoke, files: tuple[str, str]) -> None:
    code, out, _ = invoke("estimate", "--model", files[0], "--hardware", files[1], "--steps", "5")
    assert code == 0
    for word in ("memory a rank", "step time", "cost", "assumed", "optimizer states"):
        assert word in out


def test_plan_writes_a_file_that_reads_back(
    invoke: Invoke, files: tuple[str, str], tmp_path: Path
) -> None:
    code, out, _ = invoke(
        "plan", "--model", files[0], "--hardware", files[1], "--seq-len", "64", "--global-batch", "8",
        "--steps", "5", "--budget", "1h", "--out", "my.yaml",
    )  # fmt: skip
    assert code == 0
    assert "Next: outlay run my.yaml" in out
    plan = read_plan(tmp_path / "my.yaml")
    assert plan.job.budget[0].kind == "hours"
    assert plan.deepspeed["train_batch_size"] == 8
    code, out, _ = invoke("emit", "deepspeed", "my.yaml")
    assert code == 0
    assert json.loads(out) == plan.deepspeed


def test_a_dry_run_writes_nothing(invoke: Invoke, files: tuple[str, str], tmp_path: Path) -> None:
    code, _, _ = invoke(
        "plan", "--model", files[0], "--hardware", files[1], "--steps", "5", "--dry-run"
    )
    assert code == 0
    assert not (tmp_path / "plan.yaml").exists()


def test_an_edited_plan_that_breaks_a_rule_is_refused(
    invoke: Invoke, files: tuple[str, str], tmp_path: Path
) -> None:
    invoke(
        "plan",
        "--model",
        files[0],
        "--hardware",
        files[1],
        "--global-batch",
        "8",
        "--steps",
        "5",
        "--zero",
        "1",
    )
    path = tmp_path / "plan.yaml"
    path.write_text(path.read_text().replace("micro_batch: ", "micro_batch: 1", 1))
    code, _, err = invoke("emit", "deepspeed", "plan.yaml")
    assert code == 2
    assert "batch_closes" in err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("estimate",), 2, "no model"),
        (("estimate", "--model", "nope"), 2, "unknown model"),
        (("estimate", "--model", "./nope.json"), 2, "no such file"),
        (("estimate", "--model", "gpt2", "--hardware", "h100-sxm:0"), 2, "at least one"),
        (
            ("estimate", "--model", "gpt2", "--hardware", "h100-sxm:8", "--tp", "3"),
            2,
            "does not divide",
        ),
        (
            ("estimate", "--model", "gpt2", "--hardware", "h100-sxm:8", "--micro-batch", "7"),
            2,
            "does not divide",
        ),
        (
            ("estimate", "--model", "gpt2", "--hardware", "h100-sxm:8", "--tokens", "-5"),
            2,
            "negative",
        ),
        (
            ("estimate", "--model", "gpt2", "--hardware", "h100-sxm:8", "--budget", "5"),
            2,
            "has no unit",
        ),
        (("estimate", "--zero", "4"), 2, "--zero"),
        (("estimate", "--cases", "nope.csv", "--out", "x.csv"), 2, "cannot be read"),
        (("estimate", "--cases", "nope.csv"), 2, "--out"),
        (
            ("plan", "--model", "llama-3.1-405b", "--hardware", "rtx-4090:1", "--steps", "1"),
            3,
            "fits",
        ),
        (("plan", "nope.yaml"), 2, "no such file"),
        (("emit", "deepspeed", "nope.yaml"), 2, "no such file"),
        (("run", "nope.yaml"), 2, "no such file"),
        (("resume", "nope"), 2, "nope"),
        (("verify", "nope"), 2, "no such folder"),
        (("status", "nope"), 2, "nope"),
        (("compare", "nope"), 2, "nope"),
        (("catalog", "show", "h100"), 2, "h100-sxm"),
        (("data", "inspect", "nope"), 2, "no such file"),
        (("data", "prepare", "nope", "--out", "x", "--vocab-size", "300"), 2, "nope"),
        (("data", "prepare", "stdlib", "--out", "x"), 2, "either"),
    ],
)
def test_errors_are_one_message_with_their_code(
    invoke: Invoke, args: tuple[str, ...], code: int, says: str
) -> None:
    found, out, err = invoke(*args)
    assert says in err
    assert found == code
    assert out == ""


def test_the_catalog_lists_and_shows(invoke: Invoke) -> None:
    code, out, _ = invoke("catalog", "list")
    assert code == 0
    assert "h100-sxm" in out.split()
    code, out, _ = invoke("catalog", "show", "a100-sxm-80gb")
    assert code == 0
    assert "sources:" in out

"""`outlay size`: pruning that loses nothing, reasons that are true, formats that hold."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from outlay.planner.cost import Range
from outlay.planner.estimate.interval import TIGHT_RISK
from outlay.planner.search import search
from outlay.planner.size.asked import Sizing, asked
from outlay.planner.size.choose import Limits, Option, explore, front
from outlay.planner.size.engine import Ask, Sizer, Timed, points_of
from outlay.planner.size.losers import _rank, _time_best
from outlay.planner.size.money import kept
from outlay.planner.size.offers import offers_of
from outlay.planner.space import TARGETS
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.files import parse
from outlay.planner.spec.job import Job
from outlay.runner.cli import cli

GOLDEN = Path(__file__).parent.parent / "golden"
EIGHT_B = ["--model", "llama-3-8b", "--tokens", "2B", "--seq-len", "4096", "--most", "64"]


def run(args: list[str], folder: Path) -> Result:
    with contextlib.chdir(folder):
        return CliRunner().invoke(cli, args)


def keyed(option: Option) -> tuple[Any, ...]:
    return (option.offer.name, option.nodes, option.total.terms, option.timed.strategy)


@pytest.mark.parametrize(
    ("model", "target", "references"),
    [
        ("llama-3-8b", "runner", ["h100-sxm", "a100-sxm-80gb", "rtx-4090", "l40s"]),
        ("llama-3-8b", "deepspeed", ["aws", "vast"]),
        ("qwen3-30b-a3b", "megatron", ["h100-sxm", "mi300x", "a100-sxm-80gb"]),
    ],
)
def test_bounds_lose_nothing(model: str, target: str, references: list[str]) -> None:
    """With and without pruning: the same front of time and money for each kind of price."""
    spec, _ = resolve_model(model)
    job = Job(model=model, seq_len=4096, global_batch=64, steps=4000, precision="bf16")
    ask = Ask(spec=spec, job=job, target=TARGETS[target], most_ranks=64)
    offers = offers_of(references, gbps=None, price_usd_per_h=None)
    limits = Limits(hours=90 * 24.0)
    fronts = []
    for prune in (True, False):
        sizer = Sizer(ask)
        points, _ = points_of(sizer, offers)
        found = explore(sizer, points, limits, prune=prune)
        fronts.append([
            {keyed(o) for o in front([o for o in found.options if o.steady == steady])}
            for steady in (True, False)
        ])  # fmt: skip
        if not prune:
            timed = [sizer.best(p.cluster, p.job) for p in points]
            slower = [
                t.step_s * t.job.steps - p.bound_s
                for p, t in zip(points, timed, strict=True)
                if isinstance(t, Timed)
            ]
            assert min(slower) >= 0
    assert fronts[0] == fronts[1]
    assert fronts[0][0]


@pytest.mark.parametrize("objective", ["balanced", "cheapest", "fastest"])
@pytest.mark.parametrize("limits", [Limits(hours=9000.0), Limits(hours=10.0, usd=50.0)])
def test_a_loser_is_its_best(objective: str, limits: Limits) -> None:
    """What the bounds leave untimed ranks behind what was found: the same as timing all of it."""
    spec, _ = resolve_model("llama-3.2-1b")
    job = Job(model="m", seq_len=2048, global_batch=64, steps=4000, precision="bf16")
    for name in ("a100-sxm-80gb", "l40s", "t4"):
        sizer = Sizer(Ask(spec=spec, job=job, target=TARGETS["runner"], most_ranks=64))
        points, _ = points_of(sizer, offers_of([name], gbps=None, price_usd_per_h=None))
        (found, *_), _ = _time_best(sizer, points, limits, objective)
        everything = explore(sizer, points, Limits(), prune=False).options
        steady = [o for o in everything if o.steady] or everything
        assert _rank(found, limits, objective) == min(_rank(o, limits, objective) for o in steady)


def test_each_point_is_what_search_says(tiny_spec: Any) -> None:
    """The shared memory tables give what a search of its own gives."""
    job = Job(model="tiny", seq_len=512, global_batch=64, steps=10, precision="bf16")
    sizer = Sizer(Ask(spec=tiny_spec, job=job, target=TARGETS["runner"], most_ranks=32))
    points, _ = points_of(sizer, offers_of(["h100-sxm", "t4"], gbps=None, price_usd_per_h=None))
    for p in points:
        mine = sizer.best(p.cluster, p.job)
        assert isinstance(mine, Timed)
        own = search(tiny_spec, p.job, p.cluster)
        assert own.estimates.step is not None
        assert mine.strategy == own.best
        assert mine.step_s == float(own.estimates.step.time_s[own.best_index])
        assert mine.risk <= TIGHT_RISK


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("size")
    result = run(["size", *EIGHT_B, "--budget", "2000usd"], folder)
    assert result.exit_code == 0, result.output
    return folder, json.loads((folder / "size.json").read_text()), result.output


def test_keys_of_size(answered: tuple[Path, dict[str, Any], str]) -> None:
    from test_files import key_paths

    value = copy.deepcopy(answered[1])
    for option in value["options"]:
        option["cluster"] = option["strategy"] = None
    value["job"] = None
    value["losers"] = value["losers"][:1]
    keys = {k for k in key_paths(value) if "parts." not in k}
    expected = set((GOLDEN / "size.keys").read_text().split())
    assert keys == expected, f"gone: {sorted(expected - keys)}; new: {sorted(keys - expected)}"


def test_limits_and_risk_arekept(answered: tuple[Path, dict[str, Any], str]) -> None:
    for option in answered[1]["options"]:
        assert option["usd"]["expected"] <= 2000
        assert option["oom_probability"] <= TIGHT_RISK
        assert option["usd"]["low"] < option["usd"]["expected"] < option["usd"]["high"]


def test_how_sure_a_limit_iskept() -> None:
    """At the expected value one half, at the ends of the 90 % interval 5 and 95 %; unknown stays unknown."""
    value = Range(low=50.0, expected=100.0, high=300.0)
    assert kept(value, 100.0) == pytest.approx(0.5, abs=1e-3)
    assert kept(value, 300.0) == pytest.approx(0.95, abs=1e-3)
    assert kept(value, 50.0) == pytest.approx(0.05, abs=1e-3)
    assert kept(value, None) is None and kept(None, 5.0) is None
    flat = Range(low=7.0, expected=7.0, high=7.0)
    assert (kept(flat, 7.0), kept(flat, 6.9)) == (1.0, 0.0)


def test_cheapest_and_fastest_are(answered: tuple[Path, dict[str, Any], str]) -> None:
    value = answered[1]
    by_letter = {o["option"]: o for o in value["options"]}
    assert by_letter[value["cheapest"]]["usd"]["expected"] == min(
        [o["usd"]["expected"] for o in value["options"]] + [p["usd"] for p in value["pareto"]]
    )
    assert by_letter[value["fastest"]]["hours"]["expected"] == min(
        [o["hours"]["expected"] for o in value["options"]] + [p["hours"] for p in value["pareto"]]
    )
    assert value["recommended"] == "A"


def test_losers_have_true_reasons(tmp_path: Path) -> None:
    """What is said not to fit does not fit in a search of its own. Without offload, so that some do not."""
    from outlay.planner.hardware import resolve_hardware
    from outlay.planner.space import TARGETS
    from outlay.profiles.errors import NotFeasible

    result = run(["size", *EIGHT_B, "--budget", "2000usd", "--for", "megatron"], tmp_path)
    assert result.exit_code == 0, result.output
    value = json.loads((tmp_path / "size.json").read_text())
    assert all(row["why"] for row in value["losers"])
    spec, _ = resolve_model("llama-3-8b")
    job: Job = parse(Job, value["job"], path="size.json")
    small = [r for r in value["losers"] if r["constraint"] == "memory"]
    assert small
    for row in small[:4]:
        count = row["accelerators"]
        cluster = resolve_hardware(
            f"{row['accelerator']}:{count}/{min(count, 8)}", inter_node_gbps=100
        )
        own = dataclasses.replace(
            job, precision="bf16" if "bf16" in cluster.accelerator.flops else "fp16"
        )
        with pytest.raises(NotFeasible):
            search(spec, own, cluster, target=TARGETS["megatron"])
    beaten = [r for r in value["losers"] if r["constraint"] == "beaten"]
    for row in beaten:
        assert "times" in row["why"]


def test_a_plan_from_an_option(answered: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, text = answered
    assert "outlay plan A" in text
    result = run(["plan", "A", "--out", "plan.yaml", "--format", "json"], folder)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["strategy"] == value["options"][0]["strategy"]
    assert plan["cluster"]["price_usd_per_h"] == value["options"][0]["usd_per_h"]
    assert plan["estimate"]["step"]["time_s"] == pytest.approx(
        value["options"][0]["step_s"]["expected"]
    )
    parse(Cluster, plan["cluster"], path="plan")
    assert "no option Z" in str(run(["plan", "Z"], folder).exception)
    assert "--steps given too" in str(run(["plan", "A", "--steps", "7"], folder).exception)


def test_plans_side_by_side(answered: tuple[Path, dict[str, Any], str]) -> None:
    folder = answered[0]
    for letter in "AC":
        assert run(["plan", letter, "--out", f"{letter}.yaml"], folder).exit_code == 0
    sgd = ["plan", "--model", "llama-3-8b", "--hardware", "h100-sxm:8", "--optimizer", "sgd"]
    assert run([*sgd, "--out", "sgd.yaml"], folder).exit_code == 0
    result = run(["compare", "A.yaml", "C.yaml", "sgd.yaml", "--format", "json"], folder)
    value = json.loads(result.stdout)
    assert [row["plan"] for row in value["plans"]] == ["A.yaml", "C.yaml", "sgd.yaml"]
    assert set(value["questions_differ"]["optimizer"].values()) == {"adamw", "sgd"}
    text = run(["compare", "A.yaml", "sgd.yaml"], folder).output
    assert "Not the same question: optimizer" in text
    assert "give two or more" in str(run(["compare", "A.yaml"], folder).exception)


def test_other_formats(tmp_path: Path) -> None:
    args = ["size", *EIGHT_B, "--hardware", "h100-sxm", "--dry-run"]
    table = csv.DictReader(io.StringIO(run([*args, "--format", "csv"], tmp_path).stdout))
    rows = list(table)
    assert rows[0]["option"] == "A"
    assert {r["accelerator"] for r in rows} == {"h100-sxm"}
    md = run([*args, "--format", "md"], tmp_path).stdout
    assert "| A | " in md
    assert not (tmp_path / "size.json").exists()


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_stay_within_the_width(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run(["size", *EIGHT_B, "--hardware", "nebius", "--hardware", "vast"], tmp_path)
    assert result.exit_code == 0
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= columns
    assert "…" not in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "nothing to size one by"),
        (["--budget", "0usd"], 2, "nothing to run with"),
        (["--budget", "5000xyz"], 2, "unknown unit"),
        ([*EIGHT_B, "--deadline", "0d"], 2, "has passed"),
        ([*EIGHT_B, "--deadline", "14"], 2, "not a unit of time"),
        ([*EIGHT_B, "--hardware", "h900"], 2, "h900"),
        ([*EIGHT_B, "--hardware", "h100-sxm", "--price-usd-per-h", "3"], 2, "give a count"),
        ([*EIGHT_B, "--most", "0"], 2, "make no sense"),
        ([*EIGHT_B, "--parameters", "7B"], 2, "--model names one"),
        (["--parameters", "3"], 2, "makes no sense"),
        (["--reach-loss", "1.5"], 2, "out of reach"),
        (["--budget", "10usd", "--overtrain", "-1"], 2, "makes no sense"),
        ([*EIGHT_B, "--budget", "0.01usd"], 3, "keeps"),
        ([*EIGHT_B, "--hardware", "t4:1", "--for", "megatron"], 3, "fits"),
    ],
)
def test_nonsense(args: list[str], code: int, says: str, tmp_path: Path) -> None:
    from outlay.profiles.errors import OutlayError

    result = run(["size", *args], tmp_path)
    assert isinstance(result.exception, OutlayError | SystemExit), result.exception
    if isinstance(result.exception, OutlayError):
        assert result.exception.exit_code == code
        assert says in str(result.exception)
    else:
        assert result.exit_code == code


def test_what_a_budget_trains(tmp_path: Path) -> None:
    """The model it names costs what was given, and more money trains a better one."""
    losses = []
    for budget in ("100usd", "1000usd"):
        result = run(
            ["size", "--budget", budget, "--deadline", "30d", "--hardware", "nebius"], tmp_path
        )
        assert result.exit_code == 0, result.output
        value = json.loads((tmp_path / "size.json").read_text())
        limit = float(budget.removesuffix("usd"))
        assert 0.9 * limit <= value["options"][0]["usd"]["expected"] <= limit
        losses.append(value["scaling"]["loss"])
    assert losses[1] < losses[0]
    assert run(["plan", "A", "--dry-run"], tmp_path).exit_code == 0


def test_the_reverse(tmp_path: Path) -> None:
    result = run(
        ["size", "--reach-loss", "2.4", "--hardware", "nebius", "--format", "json"], tmp_path
    )
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["scaling"]["loss"] == pytest.approx(2.4, abs=1e-6)
    assert value["options"][0]["usd"]["expected"] > 0


@pytest.mark.parametrize("objective", ["energy", "carbon"])
def test_other_objectives(objective: str, tmp_path: Path) -> None:
    """A is the least of everything that was looked at, unpruned."""
    result = run(
        ["size", *EIGHT_B, "--hardware", "gcp", "--objective", objective, "--format", "json"],
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    key = {"energy": "energy_kwh", "carbon": "co2e_kg"}[objective]
    steady = [o[key] for o in value["options"] if o["terms"] != "spot" and o[key] is not None]
    assert value["options"][0][key] == min(steady)
    shown = run(["size", *EIGHT_B, "--hardware", "gcp", "--objective", objective], tmp_path).output
    assert "kWh, server and cooling included" in " ".join(shown.split())


def test_a_region_is_of_its_own_cloud(tmp_path: Path) -> None:
    """Nebius and Google both call a region us-central1; only the latter's electricity is known by that name."""
    args = [
        "size",
        *EIGHT_B,
        "--most",
        "8",
        "--hardware",
        "nebius",
        "--format",
        "json",
        "--dry-run",
    ]
    unknown = json.loads(run(args, tmp_path).stdout)["options"]
    assert all(o["co2e_kg"] is None and o["energy_kwh"] > 0 for o in unknown)
    known = json.loads(run([*args, "--region", "us-central1"], tmp_path).stdout)["options"]
    assert all(o["co2e_low_kg"] < o["co2e_kg"] < o["co2e_high_kg"] for o in known)
    assert all("us-central1, operational" in o["co2e_of"] for o in known)


def test_spot_alone_keeps_the_limits(tmp_path: Path) -> None:
    """Then it is shown, and said to be one."""
    args = [
        "size",
        "--model",
        "llama-3-8b",
        "--tokens",
        "2B",
        "--hardware",
        "nebius",
        "--deadline",
        "6h",
    ]
    told = run([*args, "--budget", "150usd", "--dry-run"], tmp_path)
    assert told.exit_code == 0, told.output
    assert "at a spot price: no steady price keeps the limits" in " ".join(told.output.split())
    assert "A keeps the deadline of 6.0 h with" in told.output


def test_trillions_of_tokens_need_no_batch_to_be_sized() -> None:
    flags = {"model": "llama-3-70b", "tokens": "15T"}
    got = asked(None, flags, {}, Sizing(hardware=("h100-sxm",))).ask.job
    assert got.seq_len == 2048 and got.tokens >= 15e12 and got.global_batch > 1_000


def test_a_network_of_one_node_is_said_to_change_nothing() -> None:
    flags = {"model": "llama-3-8b", "tokens": "1B"}
    stated = Sizing(hardware=("h100-sxm:8",), price_usd_per_h=24.0, inter_node_gbps=400.0)
    said = {n["what"]: n["source"] for n in asked(None, flags, {}, stated).assumptions}
    assert "changes nothing" in said["inter_node_gbps"]
    two = dataclasses.replace(stated, hardware=("h100-sxm:16",))
    assert "inter_node_gbps" not in {n["what"] for n in asked(None, flags, {}, two).assumptions}

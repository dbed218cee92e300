"""`outlay catalog list|show|check|import`: one's own prices beside ours, and what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from outlay.planner.commands.catalog import catalog
from outlay.profiles.errors import UsageError

HEAD = "provider,name,accelerator,count,on_demand_usd_per_h,price_date"
GOOD = "acme,box8,h100-sxm,8,16,2026-11-01"


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalog"
    monkeypatch.setenv("OUTLAY_CATALOG", str(folder))
    return folder


def outlay(*args: str) -> Result:
    return CliRunner().invoke(catalog, list(args))


def quotes(folder: Path, *rows: str) -> str:
    path = folder / "quotes.csv"
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    return str(path)


def test_imported_prices_are_listed_shown_searched_with_their_origin(
    layer: Path, tmp_path: Path
) -> None:
    path = quotes(tmp_path, GOOD, "acme,bare,l4,1,0.5,")
    got = outlay("import", path)
    assert got.exit_code == 0 and "2 rows" in got.output
    assert "1 have no price_date" in got.output and "2 have no inter_node_gbps" in got.output
    own = outlay("list", "instances", "--own").output.splitlines()
    assert len(own) == 2 and all(line.endswith("quotes.csv") for line in own)
    assert "16.00 USD/h 2026-11-01" in own[0] and "undated !" in own[1]
    shown = yaml.safe_load(outlay("show", "Acme/box8").output)
    assert shown["origin"] == "quotes.csv" and shown["on_demand_usd_per_h"] == 16
    assert "[quotes.csv]" in outlay("search", "box8").output
    assert "2 instances of one's own" in outlay("check").output


def test_a_dry_run_writes_nothing(layer: Path, tmp_path: Path) -> None:
    got = outlay("import", quotes(tmp_path, GOOD), "--dry-run")
    assert got.exit_code == 0 and "1 rows" in got.output
    assert not layer.exists()


def test_a_node_of_ones_own_under_a_provider_of_the_catalog_is_told(
    layer: Path, tmp_path: Path
) -> None:
    rows = ("nebius,my-own-box,h100-sxm,8,16,2026-11-01", GOOD)
    got = outlay("import", quotes(tmp_path, *rows), "--dry-run")
    assert "1 bear a provider's name of the catalog" in got.output


def test_off_means_nowhere_to_import_to(tmp_path: Path) -> None:
    got = outlay("import", quotes(tmp_path, GOOD))
    assert isinstance(got.exception, UsageError) and "is off" in str(got.exception)


def test_the_csv_of_list_is_what_import_reads(layer: Path, tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(outlay("list", "instances", "--csv").output)
    assert outlay("import", str(tmp_path / "all.csv")).exit_code == 0
    assert outlay("check").exit_code == 0


def test_size_sees_a_price_of_ones_own(layer: Path, tmp_path: Path) -> None:
    from outlay.planner.size.offers import offers_of

    outlay("import", quotes(tmp_path, GOOD))
    (offer,) = offers_of(["acme"], gbps=None, price_usd_per_h=None)
    assert offer.name == "acme/box8" and offer.usd_per_h == {"on_demand": 16}
    assert offer.dates == {"on_demand": "2026-11-01"}


def test_check_lists_every_fault_of_the_layer_with_its_place(layer: Path) -> None:
    layer.mkdir()
    bad = GOOD.replace("box8", "box9").replace(",16,", ",0,")
    (layer / "a.csv").write_text("\n".join([HEAD, GOOD, bad, GOOD.replace("h100-sxm", "h1")]))
    (layer / "b.csv").write_text("\n".join([HEAD, GOOD]))
    (layer / "c.csv").write_text("provider\nacme\n")
    got = outlay("check")
    assert isinstance(got.exception, UsageError) and got.exception.exit_code == 2
    for place in ("a.csv:3: on_demand_usd_per_h", "a.csv:4: accelerator", "c.csv:1", "b.csv:2"):
        assert place in got.output
    assert "4 of the catalog's entries" in str(got.exception)


def test_a_broken_layer_is_one_error_in_any_command(layer: Path) -> None:
    layer.mkdir()
    (layer / "a.csv").write_text("\n".join([HEAD, GOOD.replace(",16,", ",x,")]))
    for args in (["list", "instances"], ["search", "h100"], ["show", "acme/box8"]):
        got = outlay(*args)
        assert isinstance(got.exception, UsageError) and "a.csv:2" in str(got.exception)


@pytest.mark.parametrize(
    ("name", "key"), [("h100-sxm", "nvml_names"), ("AWS/p5.48xlarge", "region"), ("llama-3-8b", "spec")]
)  # fmt: skip
def test_show_knows_accelerators_nodes_and_models(name: str, key: str) -> None:
    assert key in yaml.safe_load(outlay("show", name).output)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["show", "h1000-sxm"], "nearest: h100-sxm"),
        (["show", "aws/p5.49xlarge"], "aws/p5.48xlarge"),
        (["show", ""], "unknown"),
        (["show", "/"], "unknown instance"),
        (["list", "models", "--csv"], "are of instances"),
        (["list", "instances", "--own"], "no price of one's own"),
        (["import", "absent.csv", "--dry-run"], "cannot be read"),
        (["import", ".", "--dry-run"], "folder"),
    ],
)
def test_nonsense(args: list[str], says: str) -> None:
    got = outlay(*args)
    assert isinstance(got.exception, UsageError) and says in str(got.exception)


@pytest.mark.parametrize("args", [["list", "cats"], ["import"], ["show"], ["check", "x"]])
def test_usage(args: list[str]) -> None:
    assert outlay(*args).exit_code == 2


def test_the_guide_shows_what_its_commands_print(
    layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/catalog.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", guide, re.M | re.S)
    rows = next(block for block in blocks if block.startswith("provider,"))
    monkeypatch.chdir(tmp_path)
    Path("quotes.csv").write_text(rows)
    Path("bad.csv").write_text(rows.replace("17.60", "0"))
    told = outlay("import", "quotes.csv").output.partition("\n")[2]
    assert told and told in guide
    assert outlay("list", "instances", "--own").output in guide
    assert f"error: {outlay('import', 'bad.csv').exception}" in guide

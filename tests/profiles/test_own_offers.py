"""One's own layer over the catalog: what it replaces, fills in, refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlay.profiles.errors import UsageError
from outlay.profiles.loader import instance, instances
from outlay.profiles.offers import OURS, shipped_instances
from outlay.profiles.own_offers import (
    import_file,
    layer_folder,
    layer_text,
    read_own,
)

HEAD = "provider,name,accelerator,count,on_demand_usd_per_h,price_date"
GOOD = "acme,box8,h100-sxm,8,16,2026-11-01"


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalog"
    monkeypatch.setenv("OUTLAY_CATALOG", str(folder))
    return folder


def table(path: Path, *rows: str, head: str = HEAD) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_off_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLAY_CATALOG", "OFF")
    assert layer_folder() is None
    assert instances() is shipped_instances()
    assert {node.origin for node in instances()} == {OURS}


def test_the_folder_is_under_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTLAY_CATALOG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/some/where")
    assert layer_folder() == Path("/some/where/outlay/catalog")


def test_a_machine_of_ones_own_is_added(layer: Path, tmp_path: Path) -> None:
    import_file(table(tmp_path / "My Quotes.csv", GOOD.replace("h100-sxm", "H100-SXM")))
    node = instance("acme", "box8")
    assert (node.accelerator, node.on_demand_usd_per_h, node.origin) == (
        "h100-sxm", 16, "my-quotes.csv",
    )  # fmt: skip
    assert len(instances()) == len(shipped_instances()) + 1


def test_the_same_provider_name_and_region_replaces_and_keeps_the_shape(
    layer: Path, tmp_path: Path
) -> None:
    ours = instance("aws", "p5.48xlarge")
    row = "AWS,P5.48xlarge,us-east-1,h100-sxm,8,30,2026-11-20"
    head = HEAD.replace("name,", "name,region,")
    import_file(table(tmp_path / "q.csv", row, head=head))
    node = instance("aws", "p5.48xlarge")
    assert node.on_demand_usd_per_h == 30 and node.spot_usd_per_h is None
    assert (node.ram_bytes, node.interconnect) == (ours.ram_bytes, ours.interconnect)
    assert node.inter_node_bytes_per_s == ours.inter_node_bytes_per_s
    assert len(instances()) == len(shipped_instances())


def test_without_a_region_it_replaces_ours_in_every_region(layer: Path, tmp_path: Path) -> None:
    import_file(table(tmp_path / "q.csv", "aws,p5.48xlarge,h100-sxm,8,30,2026-11-20"))
    assert [n.on_demand_usd_per_h for n in instances() if n.name == "p5.48xlarge"] == [30]


def test_another_shape_under_the_same_name_is_not_filled_in(layer: Path, tmp_path: Path) -> None:
    import_file(table(tmp_path / "q.csv", "aws,p5.48xlarge,h100-sxm,4,30,2026-11-20"))
    assert instance("aws", "p5.48xlarge").ram_bytes is None


def test_what_was_written_beats_what_was_fetched(layer: Path) -> None:
    layer.mkdir()
    table(layer / "refreshed-acme.csv", GOOD.replace(",16,", ",18,"))
    table(layer / "aaa.csv", GOOD)
    assert instance("acme", "box8").on_demand_usd_per_h == 16


def test_a_change_of_the_layer_is_seen(layer: Path, tmp_path: Path) -> None:
    import_file(table(tmp_path / "q.csv", GOOD))
    import_file(table(tmp_path / "q.csv", GOOD.replace(",16,", ",17.5,")))
    assert instance("acme", "box8").on_demand_usd_per_h == 17.5


def test_two_files_may_not_price_the_same_node(layer: Path, tmp_path: Path) -> None:
    import_file(table(tmp_path / "q.csv", GOOD))
    with pytest.raises(UsageError, match=r"p\.csv:2: acme/box8 is in q\.csv already"):
        import_file(table(tmp_path / "p.csv", GOOD))


def test_yaml_as_a_list_or_under_instances(tmp_path: Path) -> None:
    text = (
        "- provider: acme\n  name: b200-x8\n  accelerator: b200\n  count: 8\n"
        "  on_demand_usd_per_h: 28.5\n  price_date: 2026-11-01\n  spot_usd_per_h: ~\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yml").write_text("instances:\n" + text)
    (one,), (other,) = read_own(tmp_path / "a.yaml"), read_own(tmp_path / "b.yml")
    assert one.on_demand_usd_per_h == 28.5 and one.price_date == "2026-11-01"
    assert one.spot_usd_per_h is None and other.key == one.key


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (GOOD.replace(",16,", ",0,"), r"q.csv:2: on_demand_usd_per_h: a price of 0"),
        (GOOD.replace(",16,", ",-4,"), r"q.csv:2: on_demand_usd_per_h: '-4'"),
        (GOOD.replace(",16,", ",nan,"), r"q.csv:2: on_demand_usd_per_h: 'nan'"),
        (GOOD.replace(",16,", ",1e400,"), r"q.csv:2: on_demand_usd_per_h: '1e400'"),
        (GOOD.replace(",16,", ",16 USD,"), r"q.csv:2: on_demand_usd_per_h: '16 USD'"),
        (GOOD.replace(",16,", ",99999,"), r"q.csv:2: on_demand_usd_per_h: 99999 .*no plausible"),
        (GOOD.replace(",16,", ",0.016,"), r"q.csv:2: on_demand_usd_per_h: 0.016 .*no plausible"),
        (GOOD.replace(",16,", ",1,200,"), r"q.csv:2: more cells than the 6 columns"),
        (GOOD.replace("h100-sxm", "h100"), r"q.csv:2: accelerator: unknown accelerator 'h100'"),
        (GOOD.replace(",8,", ",0,"), r"q.csv:2: count: '0'"),
        (GOOD.replace(",8,", ",2.5,"), r"q.csv:2: count: '2.5'"),
        (GOOD.replace(",8,", ",80000,"), r"q.csv:2: count: 80000"),
        (GOOD.replace(",8,", ",eight,"), r"q.csv:2: count: 'eight'"),
        (GOOD.replace(",8,", ",,"), r"q.csv:2: count: is empty"),
        (GOOD.replace("2026-11-01", "01.11.2026"), r"q.csv:2: price_date: '01.11.2026'"),
        (GOOD.replace("2026-11-01", "20261101"), r"q.csv:2: price_date: '20261101'"),
        (GOOD.replace("2026-11-01", "2026-02-30"), r"q.csv:2: price_date: '2026-02-30'"),
        (GOOD.replace("2026-11-01", "2999-01-01"), r"q.csv:2: price_date: 2999-01-01 is in the fut"),
        (GOOD.replace("2026-11-01", "0206-11-01"), r"q.csv:2: price_date: 0206-11-01 is before"),
        (GOOD.replace(",16,", ",,"), r"q.csv:2: price_date: dates a price that is not there"),
        (GOOD.replace("acme", ""), r"q.csv:2: provider: is empty"),
        (GOOD.replace("acme", "ac me"), r"q.csv:2: provider: 'ac me'"),
        (GOOD.replace("box8", "box/8"), r"q.csv:2: name: 'box/8'"),
        (f"{GOOD}\n{GOOD.replace('box8', 'BOX8')}", r"q.csv:3: .*twice[\s\S]*q.csv:2"),
    ],
)  # fmt: skip
def test_nonsense_rows_are_one_error_with_line_and_column(
    tmp_path: Path, rows: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        read_own(table(tmp_path / "q.csv", rows))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("q.csv", "", "there is no row"),
        ("q.csv", "# nothing\n", "there is no row"),
        ("q.csv", HEAD + "\n", "there is no row"),
        ("q.csv", HEAD.replace("count", "cuont") + "\n" + GOOD, r"q.csv:1: unknown column 'cuont'"),
        ("q.csv", HEAD + ",name\n" + GOOD + ",x", r"q.csv:1: the column name is there twice"),
        ("q.csv", HEAD.replace(",", ";") + "\n", r"q.csv:1: the columns are not separated"),
        ("q.csv", "provider,name\na,b\n", r"q.csv:1: there is no column accelerator"),
        ("q.txt", HEAD, "neither .csv nor .yaml"),
        ("q.yaml", "a: [", r"q.yaml:\d: not valid YAML"),
        ("q.yaml", "just text", "a list of machines was expected"),
        ("q.yaml", "[" * 1500, "nested too deep"),
        ("q.yaml", "- {? [x] : 3}", r"q.yaml:1: unknown column"),
        ("q.yaml", "- 3", r"q.yaml:1: a mapping of columns"),
        ("q.yaml", "- {provider: [a], name: b, accelerator: l4, count: 1}", "one value was expected"),
        ("q.yaml", "- provider: a\n  name: b\n  accelerator: l4\n", r"q.yaml:1: there is no column c"),
    ],
)  # fmt: skip
def test_nonsense_files_are_one_error(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        read_own(tmp_path / name)


def test_what_is_no_text_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(b"\xff\xfe\x00p")
    (tmp_path / "f.csv").mkdir()
    for name, says in (("q", "UTF-8"), ("f", "folder"), ("absent", "cannot be read")):
        with pytest.raises(UsageError, match=says):
            read_own(tmp_path / f"{name}.csv")


def test_a_spot_price_is_below_the_price_on_demand(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q.csv:2: spot_usd_per_h: 16 USD/h is not below"):
        read_own(table(tmp_path / "q.csv", GOOD + ",16", head=HEAD + ",spot_usd_per_h"))


def test_one_accelerator_is_joined_by_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q.csv:2: interconnect: 'none' cannot join 8"):
        read_own(table(tmp_path / "q.csv", GOOD + ",none", head=HEAD + ",interconnect"))


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "Quotes", "refreshed-aws"])
def test_a_name_that_is_none(layer: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        import_file(table(tmp_path / "q.csv", GOOD), name)
    assert not layer.exists()


def test_a_layer_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUTLAY_CATALOG", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="not a folder"):
        instances()


def test_nothing_half_written_is_left_where_writing_fails(layer: Path, tmp_path: Path) -> None:
    (layer / "q.csv").mkdir(parents=True)
    with pytest.raises(UsageError):
        import_file(table(tmp_path / "q.csv", GOOD))
    assert not [f for f in layer.iterdir() if "partial" in f.name]


def test_the_shipped_rows_come_back_the_same_through_the_layers_format(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(layer_text(shipped_instances()), encoding="utf-8")
    assert read_own(tmp_path / "all.csv", OURS) == shipped_instances()


@given(note=st.text(max_size=60), usd=st.floats(0.08, 1600), gib=st.floats(1, 4096))
def test_a_row_comes_back_the_same_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, note: str, usd: float, gib: float
) -> None:
    folder = tmp_path_factory.mktemp("t")
    row = {
        "provider": "acme", "name": "box8", "accelerator": "h100-sxm", "count": 8,
        "on_demand_usd_per_h": round(usd, 4), "ram_gib": round(gib, 2), "note": note,
    }  # fmt: skip
    (folder / "q.yaml").write_text(json.dumps([row]))
    try:
        nodes = read_own(folder / "q.yaml", "x")
    except UsageError as error:
        assert "note" in str(error) or "YAML" in str(error)
        return
    (folder / "q.csv").write_text(layer_text(nodes), encoding="utf-8")
    assert read_own(folder / "q.csv", "x") == nodes


def test_a_text_of_several_lines_becomes_one(tmp_path: Path) -> None:
    row = GOOD + ',"two\r\nlines, one\u2028cell"\n' + GOOD.replace("box8", "box9") + ","
    first, second = read_own(table(tmp_path / "q.csv", row, head=HEAD + ",note"))
    assert first.note == "two lines, one cell" and second.name == "box9"


@given(st.text(max_size=200))
def test_no_text_is_more_than_one_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("t") / "q.csv"
    path.write_text(HEAD + "\n" + text, encoding="utf-8", errors="replace")
    try:
        nodes = read_own(path)
    except UsageError:
        return
    assert all(node.count >= 1 and node.provider and node.name for node in nodes)

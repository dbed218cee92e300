"""`catalog refresh` against a server of our own that speaks what gpuhunt expects. No network."""

from __future__ import annotations

import csv
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from outlay.planner.commands.catalog import catalog
from outlay.profiles.errors import MissingExtra, OutlayError, UsageError
from outlay.profiles.loader import accelerator, instance
from outlay.profiles.refresh import ASKED, PUBLISHED, refresh

TODAY = date.today().isoformat()
COLUMNS = (
    "instance_name", "location", "price", "cpu", "memory", "gpu_count", "gpu_name", "gpu_memory",
    "spot", "disk_size", "gpu_vendor", "flags", "cpu_arch", "provider_data",
)  # fmt: skip


def offer(
    name: str, where: str, usd: object, count: int, gpu: str, gb: float, spot: bool = False
) -> list[str]:
    """A row of a published catalog."""
    cells = (name, where, usd, 96, 1024, count, gpu, gb, spot, "", "nvidia", "", "x86", "{}")
    return [str(cell) for cell in cells]


P5 = offer("p5.48xlarge", "us-east-1", 44.5, 8, "H100", 80)
P5_SPOT = offer("p5.48xlarge", "us-east-1", 18.25, 8, "H100", 80, spot=True)
P5_FAR = offer("p5.48xlarge", "eu-north-1", 40.0, 8, "H100", 80)


def published(provider: str, *rows: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr(f"{provider}.csv", text.getvalue())
    return packed.getvalue()


class Server(ThreadingHTTPServer):
    """Path → (status, body); a path that is not there is 404."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}
    url = ""

    def publish(self, provider: str, *rows: list[str], version: str = "20261120") -> None:
        self.answers[f"/{provider}/version"] = 200, f"{version}\n".encode()
        self.answers[f"/{provider}/{version}/catalog.zip"] = 200, published(provider, *rows)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = Server.answers.get(self.path, (404, b"nothing"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("gpuhunt")
    Server.answers.clear()
    found = Server(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", found.url)
    monkeypatch.setattr("gpuhunt.providers.vultr.API_URL", found.url + "/vultr")
    monkeypatch.setenv("OUTLAY_CATALOG", str(tmp_path / "catalog"))
    for key in ("VULTR_API_KEY", "CRUSOE_ACCESS_KEY", "DIGITAL_OCEAN_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def outlay(*args: str) -> Result:
    return CliRunner().invoke(catalog, list(args))


def test_new_prices_replace_ours_with_their_date(server: Server) -> None:
    ours = instance("aws", "p5.48xlarge")
    server.publish("aws", P5, P5_SPOT, P5_FAR)
    got = outlay("refresh", "--provider", "aws")
    assert got.exit_code == 0
    assert (
        "aws: refreshed: 1 prices of 2026-11-20, 0 of nodes that were not known, 1 changed"
        in got.output
    )
    node = instance("aws", "p5.48xlarge")
    assert (node.region, node.on_demand_usd_per_h, node.price_date) == (
        "us-east-1",
        44.5,
        "2026-11-20",
    )
    assert (node.spot_usd_per_h, node.spot_date) == (18.25, "2026-11-20")
    assert (node.ram_bytes, node.vcpus) == (ours.ram_bytes, ours.vcpus)
    assert (
        node.inter_node_bytes_per_s == ours.inter_node_bytes_per_s
        and node.interconnect == ours.interconnect
    )
    assert node.origin == "refreshed-aws.csv" and "gpuhunt" in node.source
    assert outlay("check").exit_code == 0


def test_a_spot_price_that_was_not_offered_stays_with_its_date(server: Server) -> None:
    ours = instance("aws", "p5.48xlarge")
    server.publish("aws", P5)
    outlay("refresh", "--provider", "aws")
    node = instance("aws", "p5.48xlarge")
    assert node.on_demand_usd_per_h == 44.5
    assert (node.spot_usd_per_h, node.spot_date) == (ours.spot_usd_per_h, ours.spot_date)


def test_a_spot_price_that_repeats_the_list_price_is_dropped(server: Server) -> None:
    listed = offer("p9.new", "us-east-1", 9, 1, "L4", 24)
    server.publish("aws", listed, offer("p9.new", "us-east-1", 9, 1, "L4", 24, True))
    outlay("refresh", "--provider", "aws")
    assert instance("aws", "p9.new").spot_usd_per_h is None


def test_a_node_not_known_is_where_it_is_cheapest(server: Server) -> None:
    server.publish(
        "gcp",
        offer("g9-standard-8", "us-central1-a", 9, 1, "L4", 24),
        offer("g9-standard-8", "asia-east1-b", 8, 1, "L4", 24),
        offer("g9-standard-8", "asia-east1-c", 2, 1, "L4", 24, True),
        offer("g9-standard-8", "asia-east1-b", 4, 1, "L4", 24, True),
    )
    assert outlay("refresh", "--provider", "gcp").exit_code == 0
    node = instance("gcp", "g9-standard-8")
    assert (node.region, node.on_demand_usd_per_h) == ("asia-east1", 8)
    assert (node.spot_usd_per_h, node.spot_least_usd_per_h) == (3, 2)
    assert (node.accelerator, node.interconnect, node.vcpus) == ("l4", "none", 96)


def test_which_accelerator_it_is_comes_from_the_name_or_is_left_out(server: Server) -> None:
    server.publish(
        "runpod",
        offer("NVIDIA H100 80GB HBM3", "US", 2.7, 1, "H100", 80),
        offer("NVIDIA H100 80GB HBM3", "US", 21, 8, "H100", 80),
        offer("who knows", "US", 1.5, 1, "A100", 80),
        offer("toaster", "US", 1.5, 1, "RTX1", 4),
        offer("box a100 SXM4", "US", 1.5, 1, "A100", 80),
    )
    got = outlay("refresh", "--provider", "runpod")
    assert "2 offers left out, which accelerator is not clear (A100 80 GB, RTX1 4 GB)" in got.output
    assert instance("runpod", "8x_NVIDIA_H100_80GB_HBM3").accelerator == "h100-sxm"
    assert instance("runpod", "1x_NVIDIA_H100_80GB_HBM3").on_demand_usd_per_h == 2.7
    assert instance("runpod", "box_a100_SXM4").accelerator == "a100-sxm-80gb"


def test_parts_of_a_gpu_and_confidential_machines_stay_out(server: Server) -> None:
    server.publish(
        "azure",
        offer("Standard_NC8ads_A10_v4", "westus3", 1.1, 1, "A10", 24),
        offer("Standard_NCC40ads_H100_v5", "eastus2", 8.8, 1, "H100NVL", 94),
        offer("Standard_NC40ads_H100_v5", "eastus2", 6.5, 1, "H100NVL", 94),
    )
    got = outlay("refresh", "--provider", "azure")
    assert "1 prices of" in got.output and "2 offers left out" in got.output


def test_one_machine_with_one_of_several_gpus_is_several_nodes(server: Server) -> None:
    server.publish(
        "gcp",
        offer("n1-standard-8", "us-central1-a", 0.9, 1, "T4", 16),
        offer("n1-standard-8", "us-central1-a", 0.8, 1, "L4", 24),
        offer("n1-standard-8", "us-central1-a", 1.8, 2, "T4", 16),
    )
    assert outlay("refresh", "--provider", "gcp").exit_code == 0
    for name in ("1x_t4_n1-standard-8", "1x_l4_n1-standard-8", "2x_n1-standard-8"):
        assert instance("gcp", name).accelerator in name or name == "2x_n1-standard-8"


def test_prices_that_cannot_be_meant_are_left_out(server: Server) -> None:
    server.publish(
        "aws", P5,
        offer("zero", "us-east-1", 0, 1, "L4", 24), offer("minus", "us-east-1", -3, 1, "L4", 24),
        offer("sentinel", "us-east-1", 700, 1, "L4", 24), offer("nan", "us-east-1", "nan", 1, "L4", 24),
        offer("words", "us-east-1", "free", 1, "L4", 24), offer("cpu", "us-east-1", 1, 0, "", 0),
    )  # fmt: skip
    got = outlay("refresh", "--provider", "aws")
    assert got.exit_code == 0 and "1 prices of" in got.output and "4 nodes left out" in got.output
    assert outlay("check").exit_code == 0


BAD = {
    "500": {"/aws/version": (500, b"oops")},
    "a version and no catalog": {"/aws/version": (200, b"20261120")},
    "rubbish for a catalog": {
        "/aws/version": (200, b"20261120"),
        "/aws/20261120/catalog.zip": (200, b"<html>sorry</html>"),
    },
    "nothing for a catalog": {
        "/aws/version": (200, b"20261120"),
        "/aws/20261120/catalog.zip": (200, b""),
    },
    "another provider's catalog": {
        "/aws/version": (200, b"20261120"),
        "/aws/20261120/catalog.zip": (200, published("gcp", P5)),
    },
    "a catalog without rows": {
        "/aws/version": (200, b"20261120"),
        "/aws/20261120/catalog.zip": (200, published("aws")),
    },
    "nothing at all": {},
}


@pytest.mark.parametrize("case", BAD)
def test_a_provider_that_fails_keeps_its_price_and_says_so(server: Server, case: str) -> None:
    before = instance("aws", "p5.48xlarge")
    server.answers.update(BAD[case])
    got = outlay("refresh", "--provider", "aws")
    assert isinstance(got.exception, OutlayError) and got.exception.exit_code == 1
    assert got.output.count("\n") == 1 and "Traceback" not in got.output
    assert "aws: failed: " in got.output and "prices of 2026-07-20 stay" in got.output
    assert instance("aws", "p5.48xlarge") == before


def test_what_was_fetched_before_stays_where_the_next_time_fails(server: Server) -> None:
    server.publish("aws", P5, P5_SPOT)
    outlay("refresh", "--provider", "aws")
    server.publish("aws", version="20261121")
    assert outlay("refresh", "--provider", "aws").exit_code == 1
    node = instance("aws", "p5.48xlarge")
    assert (node.on_demand_usd_per_h, node.price_date) == (44.5, "2026-11-20")


def test_one_that_fails_does_not_hold_up_the_others(server: Server) -> None:
    server.publish("aws", P5, P5_SPOT)
    got = {o.provider: o for o in refresh([], date.today())}
    assert set(got) == {*PUBLISHED, *ASKED, "vast", "cudo", "hyperstack", "oblivus"}
    assert got["aws"].state == "refreshed" and got["gcp"].state == "failed"
    assert got["crusoe"].state == "skipped" and "CRUSOE_ACCESS_KEY" in got["crusoe"].text
    assert "stay" in got["gcp"].text
    assert outlay("refresh").exit_code == 0


VULTR = {
    "id": "vbm-256c-2048gb-8-mi300x-gpu", "cpu_threads": 256, "ram": 2097152, "disk": 480,
    "hourly_cost": 15.92, "locations": ["ord"], "type": "SSD",
}  # fmt: skip


def test_a_provider_that_is_asked_itself(server: Server) -> None:
    server.answers["/vultr/plans-metal?per_page=500"] = 200, json.dumps({"plans_metal": [VULTR]}).encode()  # fmt: skip
    server.answers["/vultr/plans?type=all&per_page=500"] = 200, b'{"plans": []}'
    assert outlay("refresh", "--provider", "Vultr").exit_code == 0
    node = instance("vultr", VULTR["id"])  # type: ignore[arg-type]
    assert (node.accelerator, node.count, node.on_demand_usd_per_h) == ("mi300x", 8, 15.92)
    assert node.price_date == TODAY and node.region == "ord"


@pytest.mark.parametrize("answer", [(500, b"{}"), (200, b"rubbish"), (200, b"{}"), (200, b"[]")])
def test_a_provider_that_is_asked_and_answers_badly(
    server: Server, answer: tuple[int, bytes]
) -> None:
    server.answers["/vultr/plans-metal?per_page=500"] = answer
    got = outlay("refresh", "--provider", "vultr")
    assert isinstance(got.exception, OutlayError) and got.exception.exit_code == 1
    assert "vultr: failed" in got.output and "the catalog has no price of it" in got.output


def test_without_the_extra_the_install_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTLAY_CATALOG", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "gpuhunt", None)
    got = outlay("refresh")
    assert isinstance(got.exception, MissingExtra) and got.exception.exit_code == 2
    assert "pip install 'outlay[prices]'" in str(got.exception)


def test_a_provider_that_gpuhunt_cannot_price_says_what_stays() -> None:
    with pytest.raises(
        UsageError, match=r"no prices of vast[\s\S]*its 6 prices of 2025-03-03 stay"
    ):
        refresh(["vast"], date.today())


@pytest.mark.parametrize("name", ["awz", "", "lambdalabs", "all"])
def test_a_provider_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="unknown provider of prices"):
        refresh([name], date.today())


def test_off_means_nowhere_to_write_to() -> None:
    with pytest.raises(UsageError, match="is off"):
        refresh(["aws"], date.today())


def test_every_name_of_the_table_is_an_accelerator() -> None:
    from outlay.profiles.fetched import _names

    assert _names()
    for name in _names():
        assert accelerator(name.accelerator).name == name.accelerator
        size = accelerator(name.accelerator).memory_bytes
        assert size is not None and abs(name.memory_gb * 1e9 / size - 1) < 0.08, name.accelerator

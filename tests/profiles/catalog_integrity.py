"""What must hold of any catalog: a subclass names the data, and inherits the checks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date
from itertools import pairwise
from typing import ClassVar

from outlay.profiles.loader import Accelerator, Instance, match_nvml
from outlay.profiles.offers import INTERCONNECTS

NUMBERS = (
    "memory_bytes",
    "usable_bytes",
    "memory_bytes_per_s",
    "sm_count",
    "tdp_w",
    "pcie_bytes_per_s",
    "nvlink_bytes_per_s",
    "nvlink_domain",
)
PRECISIONS = ("fp32", "tf32", "bf16", "fp8", "fp4")
"""Each at least as fast as the one before; fp16 is compared on its own."""

GIB_OVER_GB = 1.074
"""80 GB as marketed may be 80 GiB to the driver."""

DEAREST_USD_PER_H = 200.0
"""For one accelerator; catalogs write 700 and the like where there is no price."""


def faults(found: Iterable[str]) -> str:
    return "\n".join(found)


class AcceleratorIntegrity:
    """Of the catalog of accelerators."""

    catalog: ClassVar[Mapping[str, Accelerator]]

    def test_names_are_lower_case_with_dashes(self) -> None:
        assert self.catalog
        bad = [
            name
            for name, a in self.catalog.items()
            if name != a.name or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        ]
        assert not bad, faults(bad)

    def test_every_number_has_a_source_or_is_null_with_a_reason(self) -> None:
        bad = []
        for a in self.catalog.values():
            for field in NUMBERS:
                if getattr(a, field) is None:
                    told = field in a.unknown and field not in a.sources
                else:
                    told = field in a.sources and field not in a.unknown
                if not told:
                    bad.append(f"{a.name}: {field}")
        assert not bad, faults(bad)

    def test_every_rate_has_a_source(self) -> None:
        bad = [
            f"{a.name}: {precision}"
            for a in self.catalog.values()
            for precision in a.flops
            if not a.sources.get(f"flops.{precision}") or f"flops.{precision}" in a.unknown
        ]
        assert not bad, faults(bad)

    def test_sources_and_reasons_speak_of_fields_that_there_are(self) -> None:
        fields = {*NUMBERS, "nvlink_pair_bytes_per_s", "compute_capability", "flops"}
        fields |= {f"flops.{precision}" for precision in (*PRECISIONS, "fp16")}
        bad = [
            f"{a.name}: {field}: {text!r}"
            for a in self.catalog.values()
            for field, text in (*a.sources.items(), *a.unknown.items())
            if field not in fields or not text.strip()
        ]
        assert not bad, faults(bad)

    def test_numbers_are_positive(self) -> None:
        bad = []
        for a in self.catalog.values():
            values = {field: getattr(a, field) for field in NUMBERS} | a.flops
            for field, value in values.items():
                none = field == "nvlink_bytes_per_s" and value == 0
                if value is not None and value <= 0 and not none:
                    bad.append(f"{a.name}: {field} = {value}")
        assert not bad, faults(bad)

    def test_usable_memory_is_near_what_is_marketed(self) -> None:
        bad = [
            f"{a.name}: {a.usable_bytes} of {a.memory_bytes}"
            for a in self.catalog.values()
            if a.usable_bytes is not None
            and a.memory_bytes is not None
            and not 0.9 * a.memory_bytes <= a.usable_bytes <= GIB_OVER_GB * a.memory_bytes
        ]
        assert not bad, faults(bad)

    def test_narrower_numbers_are_not_slower(self) -> None:
        bad = []
        for a in self.catalog.values():
            given = [(p, a.flops[p]) for p in PRECISIONS if p in a.flops]
            for (wide, slow), (narrow, fast) in pairwise(given):
                if fast < slow:
                    bad.append(f"{a.name}: {narrow} {fast} below {wide} {slow}")
            if a.flops.get("fp16", 0) < a.flops.get("fp32", 0) and "fp16" in a.flops:
                bad.append(f"{a.name}: fp16 below fp32")
        assert not bad, faults(bad)

    def test_matrix_rates_are_dense(self) -> None:
        """8-bit is at most twice 16-bit, but for rounding; more would be the rate with sparsity."""
        bad = [
            f"{a.name}: fp8 {a.flops['fp8']} over bf16 {a.flops['bf16']}"
            for a in self.catalog.values()
            if "fp8" in a.flops and a.flops["fp8"] > 2.03 * a.flops["bf16"]
        ]
        assert not bad, faults(bad)

    def test_a_pair_has_no_more_than_the_whole_link(self) -> None:
        bad = [
            a.name
            for a in self.catalog.values()
            if a.nvlink_pair_bytes_per_s is not None
            and a.nvlink_bytes_per_s is not None
            and a.nvlink_pair_bytes_per_s > a.nvlink_bytes_per_s
        ]
        assert not bad, faults(bad)

    def test_nvml_names_are_unique_and_lead_back(self) -> None:
        named = [(nvml, a) for a in self.catalog.values() for nvml in a.nvml_names]
        twice = [nvml for nvml, n in Counter(nvml for nvml, _ in named).items() if n > 1]
        assert named
        assert not twice, faults(twice)
        for nvml, a in named:
            total = a.usable_bytes or a.memory_bytes
            assert total is not None
            assert match_nvml(nvml, total) is a


class InstanceIntegrity:
    """Of a list of nodes for rent."""

    offers: ClassVar[tuple[Instance, ...]]
    known: ClassVar[Mapping[str, Accelerator]]

    def test_accelerators_exist(self) -> None:
        assert self.offers
        bad = [
            f"{o.provider}/{o.name}: {o.accelerator}"
            for o in self.offers
            if o.accelerator not in self.known
        ]
        assert not bad, faults(bad)

    def test_each_is_there_once(self) -> None:
        seen = Counter((o.provider, o.name.lower(), o.region) for o in self.offers)
        bad = [str(key) for key, n in seen.items() if n > 1]
        assert not bad, faults(bad)

    def test_names_can_be_typed(self) -> None:
        """`--hardware PROVIDER/INSTANCE:COUNT` takes these letters."""
        bad = [
            f"{o.provider}/{o.name}"
            for o in self.offers
            if not re.fullmatch(r"[a-z0-9-]+", o.provider)
            or not re.fullmatch(r"[A-Za-z0-9._-]+", o.name)
        ]
        assert not bad, faults(bad)

    def test_prices_are_positive_and_no_sentinels(self) -> None:
        bad = [
            f"{o.provider}/{o.name}: {price}"
            for o in self.offers
            for price in prices(o)
            if not 0 < price < DEAREST_USD_PER_H * o.count
        ]
        assert not bad, faults(bad)

    def test_spot_and_reserved_are_below_on_demand(self) -> None:
        bad = [
            f"{o.provider}/{o.name}"
            for o in self.offers
            if o.on_demand_usd_per_h is not None
            and any(price >= o.on_demand_usd_per_h for price in prices(o)[1:])
        ]
        assert not bad, faults(bad)

    def test_the_least_spot_price_is_not_above_the_median(self) -> None:
        bad = [
            f"{o.provider}/{o.name}"
            for o in self.offers
            if o.spot_least_usd_per_h is not None
            and (o.spot_usd_per_h is None or o.spot_least_usd_per_h > o.spot_usd_per_h)
        ]
        assert not bad, faults(bad)

    def test_dates_are_iso_and_belong_to_a_price(self) -> None:
        for o in self.offers:
            dated = (
                (o.price_date, o.on_demand_usd_per_h),
                (o.spot_date, o.spot_usd_per_h),
                (o.reserved_date, o.reserved_1y_usd_per_h),
            )
            for day, price in dated:
                if day is not None:
                    assert date.fromisoformat(day).isoformat() == day
                    assert price is not None, (
                        f"{o.provider}/{o.name} dates a price that is not there"
                    )

    def test_a_price_without_a_date_says_so(self) -> None:
        bad = [
            f"{o.provider}/{o.name}"
            for o in self.offers
            if o.on_demand_usd_per_h is not None
            and o.price_date is None
            and "undated" not in o.note
        ]
        assert not bad, faults(bad)

    def test_one_accelerator_needs_no_interconnect(self) -> None:
        bad = [
            f"{o.provider}/{o.name}: {o.count} by {o.interconnect}"
            for o in self.offers
            if o.interconnect not in (None, *INTERCONNECTS)
            or (o.interconnect is not None and (o.interconnect == "none") != (o.count == 1))
        ]
        assert not bad, faults(bad)


def prices(offer: Instance) -> list[float]:
    """Those that are known; on demand first where it is."""
    given = (
        offer.on_demand_usd_per_h,
        offer.spot_usd_per_h,
        offer.spot_least_usd_per_h,
        offer.reserved_1y_usd_per_h,
    )
    return [price for price in given if price is not None]

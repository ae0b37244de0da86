"""moe/cost/rates.py against the page that has its sources: every figure, and which of them nobody confirmed."""

import re
from pathlib import Path

import pytest

from moe.config.schema import Cost
from moe.cost.charges import planned_joules, rates_of
from moe.cost.rates import GRID, PRICES, UNCONFIRMED, WATTS, grid_source
from moe_triton.chips import find

PAGE = (Path(__file__).parents[1] / "docs/rates.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
DEVICES = {name: rest for name, *rest in ROWS if name not in ("device", "---")}


def test_the_page_has_every_device_with_its_figures_and_sources():
    assert set(DEVICES) == set(WATTS) | set(PRICES)
    for name, (watts, source, price, listed) in DEVICES.items():
        assert (float(watts) if watts else None) == WATTS.get(name), name
        assert ((float(price), listed) if price else None) == PRICES.get(name), name
        assert source.startswith("not confirmed") == (name in UNCONFIRMED), name


def test_every_device_of_the_table_is_one_that_torch_can_name():
    assert {chip.name for name in DEVICES if (chip := find(name)) is not None} == set(DEVICES)


@pytest.mark.parametrize(
    "device, source", [("NVIDIA H100 PCIe", "350 W board limit"), ("NVIDIA L40", "300 W board limit, not confirmed")]
)
def test_a_plan_says_where_its_watts_are_from(device, source):
    assert planned_joules(device, 2, 10.0).source == source


def test_regions_are_grams_of_a_grid_and_say_their_year():
    assert all(re.fullmatch("[A-Z]{3}|WORLD", region) and 10 < grams < 1000 for region, grams in GRID.items())
    assert sum("2022" in grid_source(region) for region in GRID) == 7
    # known from elsewhere: France is nuclear, Norway hydro, Poland coal; the world between
    assert GRID["NOR"] < GRID["FRA"] < 100 < GRID["DEU"] < GRID["WORLD"] < GRID["POL"]
    assert rates_of(Cost(region="FRA"), "cpu").grid.source == "FRA, Our World in Data 2023 (CC-BY 4.0)"

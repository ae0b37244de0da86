"""The page of a report against report.json, figure by figure, and in a browser: console, switches, slider, widths, paper."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import fake_runs
import pytest
from matplotlib.figure import Figure

from moe.analysis.report import build_report

SMALL: dict[str, Any] = {"steps": 40, "rows": 64}
PREFIXES = {"": 1.0, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
CONSTANTS = re.compile(r"1/E|CO2e")
"""Digits of the page's own words, which are no figures."""
needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison with ledgers and forecasts, and its report; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"no picture"))
        directory = fake_runs.write_comparison(tmp_path_factory.mktemp("page"), **SMALL)
        for run in sorted(directory.glob("*-seed*")):
            fake_runs.write_ledger(run)
        for run in sorted(directory.glob("sparse-seed*")):
            fake_runs.write_forecast(run)
        build_report(directory)
    return directory


# ----------------------------------------------------------------------------------------------------------- figures


class Figures(HTMLParser):
    """The figures of a page (pointer, value, text), and all text outside of them, element by element."""

    def __init__(self, source):
        super().__init__()
        self.found, self.words, self.open, self.pointer, self.scripts = [], [], [], None, {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "data":
            self.pointer = attrs["data-from"]
            self.found.append([self.pointer, json.loads(attrs["value"]), ""])
        elif tag == "script":
            self.open.append(attrs.get("id", "page"))
        elif tag == "style":
            self.open.append(tag)
        self.words += [attrs[name] for name in ("title", "aria-label") if name in attrs]

    def handle_endtag(self, tag):
        self.pointer = None if tag == "data" else self.pointer
        if tag in ("script", "style"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.scripts[self.open[-1]] = self.scripts.get(self.open[-1], "") + data
        elif self.pointer is not None:
            self.found[-1][2] += data
        else:
            self.words.append(data)


def look_up(report, pointer):
    """The value of a JSON pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        report = report[int(key)] if isinstance(report, list) else report[key]
    return report


def read_number(shown):
    """(value, half a unit of its last digit) of a rounded number with its sign, prefix or per cent."""
    sign, digits, unit = re.fullmatch(
        r"(?:± )?([+−]?)([\d,.]+(?:e[+−-]?\d+)?)\s?(.*)", shown.replace("\u00a0", " ")
    ).groups()
    prefix, base = re.fullmatch(r"([µmkMGTP]?)(%|Wh|FLOPs?|gCO2e|USD|J|B|s|h|)", unit).groups()
    factor = PREFIXES[prefix] * {"%": 0.01, "Wh": 1e-3}.get(base, 1.0)  # report.json has shares and kWh
    digits = digits.replace(",", "").replace("−", "-")
    mantissa, _, exponent = digits.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return (-1 if sign == "−" else 1) * float(digits) * factor, 0.5000001 * last * factor


def strings(value):
    """Every string in a JSON value, keys included."""
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in strings(item))]
    return (
        [text for item in value for text in strings(item)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )


def check_figures(folder: Path) -> Figures:
    """Every number on the page is a figure of report.json as rounded, or stands in one of its sentences; returns the page."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    page = Figures((folder / "report.html").read_text("utf-8"))
    for pointer, value, shown in page.found:
        assert look_up(report, pointer) == value, pointer
        number, half = read_number(shown)
        assert abs(number - value) <= half * max(1.0, 1 + 1e-9), f"{pointer}: {value} is shown as {shown}"
    said = " ".join(" ".join(strings(report)).split())
    for words in page.words:
        plain = " ".join(words.replace("\u00a0", " ").split())
        for part in re.findall(r"\S*\d\S*", CONSTANTS.sub("", plain)):
            assert part.strip(".,;:()") in said, f"{part!r} of {plain!r} is no figure of report.json"
    assert json.loads(page.scripts["figures"]) == report["charts"]
    return page


def test_every_number_of_a_comparisons_page_is_one_of_its_json(folder):
    page = check_figures(folder)
    pointers = {pointer for pointer, _, _ in page.found}
    assert len(pointers) > 100
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert any("at equal loss dense costs" in line for line in report["prices"])
    assert set(report["prices"]) <= {" ".join(words.split()) for words in page.words}
    assert {"/gain/mean", "/arms/0/parameters_total", "/ledger/total/kwh/value", "/routing/2/max_vio/0"} <= pointers


def test_a_figure_that_is_not_in_the_json_is_found(folder, tmp_path):
    for name in ("report.json", "report.html"):
        (tmp_path / name).write_text((folder / name).read_text("utf-8"), "utf-8")
    report = json.loads((tmp_path / "report.json").read_text())
    report["gain"]["mean"] += 0.001
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(AssertionError, match="/gain/mean"):
        check_figures(tmp_path)


# ----------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def page(folder):
    """The page in a browser, drawn."""
    with browser.chromium() as window:
        window.open(folder / "report.html", ready="document.documentElement.dataset.drawn")
        yield window


def traces(page, chart):
    """Name, x and y of what a chart shows."""
    return page.run(
        f"document.getElementById('chart-{chart}').data.map(t => ({{name: t.name || '', x: [...t.x], y: [...t.y]}}))"
    )


@needs_browser
def test_every_switch_redraws_its_charts_without_an_error(folder, page):
    drawn = json.loads((folder / "report.json").read_text())["charts"]
    assert [axis["missing"] for axis in drawn["axes"]] == [None] * 5
    for axis in drawn["axes"]:
        page.click(f"[name=axis][value={axis['name']}]")
        title = page.run("document.getElementById('chart-loss').layout.xaxis.title.text")
        assert title == axis["label"]
        (mean,) = (
            t for t in traces(page, "loss") if t["name"] == "sparse" and t["y"] == drawn["arms"][0]["mean"]["bits"]
        )
        assert mean["x"] == drawn["arms"][0]["mean"]["x"][axis["name"]]
        gain = drawn["gains"][0]["axes"][axis["name"]]
        assert any(t["x"] == gain["x"] and t["y"] == gain["mean"] for t in traces(page, "gain"))
    page.click("[name=loss][value=training]")
    assert traces(page, "loss")[0]["y"] == drawn["arms"][0]["runs"][0]["train"]["nats"]
    for measure in drawn["heat"][0]["balance"]:
        page.click(f"[name=balance][value={measure['name']}]")
        assert traces(page, "balance")[1]["y"] == measure["lines"][1]
    assert [t["y"] for t in traces(page, "forecast")][1] == drawn["forecasts"][0]["looks"]["high"]
    assert page.errors == []


@needs_browser
def test_the_slider_moves_through_the_moments_and_the_layers(folder, page):
    heat = json.loads((folder / "report.json").read_text())["charts"]["heat"][0]
    shown = "document.getElementById('chart-heat').data[0].z"
    assert page.run(shown) == heat["percent"][-1]
    page.run("document.querySelector('[name=moment]').focus()")
    page.press("ArrowLeft")
    assert page.run(shown) == heat["percent"][-2]
    assert page.run("document.getElementById('heat-at').textContent") == str(heat["steps"][-2])
    page.click("[name=heat][value=layer]")
    assert page.run(shown) == [[moment[0][e] for moment in heat["percent"]] for e in range(heat["experts"])]
    page.click("[name=heat][value=moment]")
    assert page.errors == []


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_nothing_leaves_the_window(folder, page, width, dark):
    page.open(folder / "report.html", width, dark=dark, ready="document.documentElement.dataset.drawn")
    wide = page.run("document.documentElement.scrollWidth")
    assert wide <= width
    cut = page.run(
        "[...document.querySelectorAll('p, li, figcaption, h1, h2, h3, td, th, label')]"
        ".filter(item => item.scrollWidth > item.clientWidth + 1 && item.clientWidth).map(item => item.textContent)"
    )
    assert cut == []
    colours = page.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    ink, paper = (int(re.findall(r"\d+", colour)[0]) for colour in colours)
    assert (ink < paper) != dark
    assert page.errors == []


@needs_browser
def test_it_prints(folder, page, tmp_path):
    page.open(folder / "report.html", ready="document.documentElement.dataset.drawn")
    printed = page.pdf(tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 9
    assert page.run("document.getElementById('chart-loss').layout.width") in (None, 660)
    assert page.errors == []

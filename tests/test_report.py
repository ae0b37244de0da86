"""report.json and report.html of synthetic directories against sums done by hand and an HTML parser; plots against overlap."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import combinations
from typing import Any

import fake_runs
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from moe.analysis.paired import t_interval
from moe.analysis.plots import plot_balance, plot_routing
from moe.analysis.report import build_report
from moe.analysis.report.words import verdict_sentence
from moe.analysis.rows import read_run
from moe.errors import UserError

SMALL: dict[str, Any] = {"steps": 40, "rows": 64}
VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison directory with its report; tests only read it."""
    directory = fake_runs.write_comparison(tmp_path_factory.mktemp("comparison"), **SMALL)
    build_report(directory)
    return directory


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are empty files, for tests of words and numbers."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"no picture"))


@pytest.fixture
def no_overlap(monkeypatch):
    """Draw every figure and check that no text lies over another or outside; returns the figures' paths."""
    checked, drawn = [], []

    def draw(text, renderer, *rest):
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))
        return draw_text(text, renderer, *rest)

    def check(figure, path, **options):
        drawn.clear()
        FigureCanvasAgg(figure).draw()
        inside = figure.bbox.padded(1)
        for name, box in drawn:
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            assert fits, f"{path.name}: {name!r} is cut off"
        for (a, left), (b, right) in combinations(drawn, 2):
            apart = left.x1 <= right.x0 or right.x1 <= left.x0 or left.y1 <= right.y0 or right.y1 <= left.y0
            assert apart, f"{path.name}: {a!r} overlaps {b!r}"
        path.write_bytes(b"no picture")
        checked.append(path)

    draw_text = Text.draw
    monkeypatch.setattr(Text, "draw", draw)
    monkeypatch.setattr(Figure, "savefig", check)
    return checked


class Page(HTMLParser):
    """Tags and attributes of a page; asserts that tags nest."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th", "p", "h1", "h2") else ""

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data


def page_of(directory):
    return Page((directory / "report.html").read_text("utf-8"))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ----------------------------------------------------------------------------------------------------------- content


def test_report_json_holds_the_paired_gain(comparison):
    report = json.loads((comparison / "report.json").read_text())
    # Gains .081, .092, .068: mean .0803333, deviation .0120139, t(2) = 4.30265, half width .0298444.
    gain = report["gain"]
    assert gain["values"] == pytest.approx([0.081, 0.092, 0.068], abs=1e-9)
    assert [gain["mean"], gain["low"], gain["high"]] == pytest.approx([0.0803333, 0.0504889, 0.1101777], abs=1e-6)
    assert gain["verdict"] == report["verdict"]["name"] == "ahead"
    assert report["arms"][0]["final_bits_per_byte"] == pytest.approx([2.686, 2.662, 2.753])
    noise = report["evaluation_noise"]
    assert [entry["gain"] for entry in noise] == pytest.approx(gain["values"])


def test_page_states_verdict_tables_and_captions(comparison):
    page = page_of(comparison)
    text = re.sub(r"\s+", " ", page.text.replace("\u00a0", " "))
    for words in (
        "At equal active FLOPs per token, the sparse model is ahead of its dense twin by 0.080 bits per byte",
        "95 % interval over 3 paired seeds is [+0.050, +0.110].",
        "Parameters, total 1.94 M 394 k",
        "2.400 MFLOP 2.403 MFLOP",
        "8,192 bytes that no run trained on",
        "nothing about other seeds, and takes no part in the verdict",
        "Experts below 1 % of their ideal load at the end: layer 2 (up to 1 of 8)",
        "model.moe.num_experts 8 –",
        "moe compare recipes/quickstart.py --seeds 3 --jobs 2",
        "torch 2.13.0",
        "0.001: 2.8530, 0.003: 2.7670, 0.01: diverged",
    ):
        assert words in text, words


def test_page_needs_no_network(comparison):
    page = page_of(comparison)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "form", "img"}
    assert not {name for _, attrs in page.tags for name in attrs} & {"src", "href", "srcset"}
    source = (comparison / "report.html").read_text("utf-8")
    assert not re.findall(r"https?://|url\(|@import|\bon\w+=", source)
    assert "default-src 'none'" in source


def test_interval_with_zero_names_no_winner(tmp_path, undrawn):
    directory = fake_runs.write_comparison(tmp_path, gains=(0.08, 0.3, 0.02), **SMALL)
    build_report(directory)
    report = json.loads((directory / "report.json").read_text())
    assert report["verdict"]["name"] == "undecided"
    assert "no winner is named" in report["verdict"]["sentence"]
    assert "contains zero" in report["verdict"]["sentence"]
    assert not re.search(r"\b(ahead|behind|better than)\b", page_of(directory).text)


def test_sparse_model_that_loses_is_said_to_be_behind(tmp_path, undrawn):
    directory = fake_runs.write_comparison(tmp_path, gains=(-0.08, -0.09, -0.07), **SMALL)
    build_report(directory)
    sentence = json.loads((directory / "report.json").read_text())["verdict"]["sentence"]
    assert "is behind its dense twin by 0.080 bits per byte" in sentence
    assert "[−0.105, −0.055]" in sentence


def test_one_seed_names_no_winner():
    assert "one seed gives no interval" in verdict_sentence("equal x", t_interval([0.08]))


def test_small_gains_are_shown_with_enough_digits():
    sentence = verdict_sentence("equal x", t_interval([0.00101, 0.00102, 0.00103]))
    assert "by 0.00102 bits" in sentence
    low = float(re.findall(r"\[\+(.*?),", sentence)[0])
    assert low > 0


def test_speed_comes_from_the_interleaved_timing_only(comparison, tmp_path, undrawn):
    text = page_of(comparison).text
    assert re.search(r"Sparse trains 0\.\d\d times as many tokens per second as dense: median of 15 rounds", text)
    directory = fake_runs.write_comparison(tmp_path, timing=False, **SMALL)
    build_report(directory)
    report, text = json.loads((directory / "report.json").read_text()), page_of(directory).text
    notes = {axis["name"]: axis["note"] for axis in report["charts"]["axes"]}
    assert report["timing"] is None
    assert [arm["tokens_per_second"] for arm in report["arms"]] == [None, None]
    assert "Not measured: there is no timing.json" in text
    assert "2 runs shared the machine" in notes["time"]


def test_markup_in_names_is_escaped(tmp_path, undrawn):
    directory = fake_runs.write_comparison(tmp_path, **SMALL)
    attack = '<script>alert("1")</script>'
    edit(directory / "compare.json", lambda value: value.update(recipe=attack, command=attack))
    edit(directory / "sparse-seed0" / "run.json", lambda value: value["run"]["model"]["moe"].update(note=attack))
    build_report(directory)
    page = page_of(directory)
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # the figures, plotly, and the page's own
    assert page.text.count(attack) == 4  # title, heading, command, difference


def test_rebuilding_from_a_copy_of_the_files_gives_the_same_report(comparison, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(comparison, copy, ignore=shutil.ignore_patterns("report.*", "plots"))
    build_report(copy)
    for name in ("report.json", "report.html"):
        assert (copy / name).read_bytes() == (comparison / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------- cautions


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("dense-seed1/run.json", lambda v: v["run"]["train"]["optimizer"].update(lr=0.1), "train.optimizer.lr"),
        ("dense-seed1/run.json", lambda v: v["meta"].update(threads=7), "ran with different threads"),
        ("dense-seed0/summary.json", lambda v: v.update(tokens=5), "different numbers of tokens"),
        ("sparse-seed0/summary.json", lambda v: v.update(train_flops_per_token=9e6), "FLOPs per token differ by +"),
        ("sparse-seed2/summary.json", lambda v: v.update(skipped_steps=3), "sparse arm skipped 3 steps"),
        ("compare.json", lambda v: v["learning_rate"].update(value=0.001), "edge of the grid"),
    ],
)
def test_unfair_comparisons_are_marked(comparison, tmp_path, undrawn, file, change, says):
    directory = tmp_path / "copy"
    shutil.copytree(comparison, directory)
    edit(directory / file, change)
    build_report(directory)
    assert any(says in caution for caution in json.loads((directory / "report.json").read_text())["cautions"])


def test_fair_comparison_has_no_caution(comparison):
    assert json.loads((comparison / "report.json").read_text())["cautions"] == []
    assert "Read with care" not in page_of(comparison).text


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("sparse-seed1/summary.json", lambda v: v.update(status="interrupted", step=7), "interrupted at step 7"),
        ("sparse-seed1/run.json", lambda v: v["run"].update(seed=5), "has seed 5"),
        ("compare.json", lambda v: v["arms"].update(dense=["dense-seed0"]), "for each of the seeds"),
        ("compare.json", lambda v: v["arms"].update(dense=["a", "b", "c"]), "a is not a directory"),
        ("compare.json", lambda v: v.update(schema_version=2), "schema_version is 2"),
        ("timing.json", lambda v: v.update(sparse=[1.0]), "as many rounds"),
    ],
)
def test_broken_comparisons_are_refused(comparison, tmp_path, undrawn, file, change, says):
    directory = tmp_path / "copy"
    shutil.copytree(comparison, directory)
    edit(directory / file, change)
    with pytest.raises(UserError, match=re.escape(says)):
        build_report(directory)


def test_arms_evaluated_on_different_text_are_refused(tmp_path, undrawn):
    directory = fake_runs.write_comparison(tmp_path, **SMALL)
    shutil.rmtree(directory / "dense-seed1")
    run = fake_runs.config(sparse=False, seed=1, steps=40)
    fake_runs.write_run(directory / "dense-seed1", run, bits=2.75, rows=32)
    with pytest.raises(UserError, match="different"):
        build_report(directory)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither compare\.json nor run\.json"):
        build_report(tmp_path)


# ------------------------------------------------------------------------------------------------------- single runs


@pytest.mark.parametrize("sparse", [True, False])
def test_single_run_has_a_report(tmp_path, no_overlap, sparse):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(sparse=sparse, steps=40), bits=2.7, rows=64)
    page = build_report(run)
    assert page == run / "report.html"
    assert "The run finished after 40 steps and 163,840 tokens: 2.7000 bits per byte" in page_of(run).text
    assert len(no_overlap) == (6 if sparse else 4)
    assert ("Routing" in page_of(run).text) == sparse


def test_interrupted_run_reports_its_last_evaluation(tmp_path, undrawn):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(steps=40), bits=2.7, rows=64)
    lines = [line for line in (run / "evals.jsonl").read_text().splitlines() if '"final": false' in line]
    (run / "evals.jsonl").write_text("\n".join(lines) + "\n")
    edit(run / "summary.json", lambda value: value.update(status="interrupted", reason="SIGTERM"))
    build_report(run)
    text = page_of(run).text
    assert "was interrupted" in text
    assert "in the last evaluation during training" in text


def test_losses_that_are_not_finite_do_not_break_the_report(tmp_path):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(steps=40), bits=2.7, rows=64)
    step = {"step": 20, "loss": None, "tokens": 1, "step_seconds": 1.0}
    fake_runs.write_lines(run / "metrics.jsonl", [step], attempt=2)
    final = {"step": 40, "final": True, "rows": 8, "tokens": 8, "bytes": 8, "loss": None, "bits_per_byte": None}
    fake_runs.write_lines(run / "evals.jsonl", [final], attempt=2)
    build_report(run)
    report = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["arms"][0]["final_bits_per_byte"] == [None]


# ------------------------------------------------------------------------------------------------------------- plots


def test_no_text_of_a_comparisons_plots_overlaps_or_is_cut_off(tmp_path, no_overlap):
    build_report(fake_runs.write_comparison(tmp_path))
    assert len(no_overlap) == 6


@pytest.mark.parametrize(("experts", "layers", "seeds"), [(64, 24, 1), (128, 9, 2), (4, 1, 3), (16, 6, 4)])
def test_routing_plots_of_other_shapes_stay_readable(tmp_path, no_overlap, experts, layers, seeds):
    runs = []
    for seed in range(seeds):
        run = fake_runs.config(seed=seed, steps=40)
        run["model"]["moe"] |= {"num_experts": experts, "top_k": 2}
        path = fake_runs.write_run(tmp_path / str(seed), run, bits=2.72, rows=64, layers=layers)
        runs.append(read_run(path))
    plot_routing(runs, tmp_path / "load.png")
    plot_balance(runs, tmp_path / "balance.png")
    assert len(no_overlap) == 2


def test_runs_evaluated_only_at_the_end_have_plots(tmp_path, no_overlap):
    directory = fake_runs.write_comparison(tmp_path, **SMALL)
    for path in directory.glob("*/evals.jsonl"):
        path.write_text("\n".join(line for line in path.read_text().splitlines() if '"final": true' in line) + "\n")
    build_report(directory)
    assert len(no_overlap) == 6


def test_interval_of_the_fakes_is_what_the_comments_say():
    gains = fake_runs.GAINS
    assert 4.30265 * np.std(gains, ddof=1) / math.sqrt(3) == pytest.approx(0.0298444, abs=1e-6)

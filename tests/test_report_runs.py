"""Reports of runs that are unfinished, broken, large, oddly named or several at once, against what was written into them."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import curve_files
import fake_runs
import pytest
from matplotlib.figure import Figure
from test_report_page import check_figures

from moe import cost
from moe.analysis.gain_watch import forecast_folder
from moe.analysis.report import build_report, runs
from moe.analysis.report.loads import MOST_CELLS
from moe.config.load import dump
from moe.config.schema import Forecast
from moe.errors import UserError
from recipes.smoke import run as smoke


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """PNG plots are empty files."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"no picture"))


def write(folder: Path, bits: float = 2.7, *, layers: int = 3, every: int = 5, **config: Any) -> Path:
    """A small finished run."""
    return fake_runs.write_run(
        folder, fake_runs.config(**{"steps": 40} | config), bits=bits, rows=64, layers=layers, every=every
    )


def report_of(folder: Path) -> Any:
    """report.json, after every number of the page was found in it."""
    check_figures(folder)
    return json.loads((folder / "report.json").read_text("utf-8"), parse_constant=pytest.fail)


def cut_last_line(path: Path) -> None:
    """What a kill leaves: half of the last line, no newline."""
    text = path.read_text("utf-8").rstrip("\n")
    path.write_text(text[: text.rindex("\n") + 20], "utf-8")


# --------------------------------------------------------------------------------------------------- unfinished, broken


def test_a_run_that_was_killed_before_its_first_evaluation(tmp_path):
    config = dump(smoke())
    folder = fake_runs.write_run(tmp_path / "killed", config, bits=3.0, rows=64, layers=2)
    for name in ("evals.jsonl", "summary.json", "final_rows.npz"):
        (folder / name).unlink()
    for name in ("metrics", "routing"):
        cut_last_line(folder / f"{name}.jsonl")
    build_report(folder)
    report = report_of(folder)
    said = report["verdict"]["sentence"]
    assert re.search(
        r"is going on or was killed, after 39 steps and [\d,]+ tokens and has not been evaluated; the loss", said
    )
    assert report["arms"][0]["parameters_total"] == cost.parameters(smoke().model).total
    assert report["arms"][0]["final_bits_per_byte"] == [None]
    assert len(report["charts"]["arms"][0]["runs"][0]["train"]["nats"]) == 39
    assert 'value="validation" disabled' in (folder / "report.html").read_text()


def test_a_run_whose_summary_is_of_an_earlier_attempt_is_going_on(tmp_path):
    folder = write(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted", "step": 7}))
    build_report(folder)
    report = report_of(folder)
    assert "is going on or was killed, after 40 steps" in report["verdict"]["sentence"]
    assert report["arms"][0]["parameters_total"] is None  # settings of another version: nothing is made up
    axes = {axis["name"]: axis["missing"] for axis in report["charts"]["axes"]}
    assert axes == {"tokens": None, "flops": "no run's settings can be read", "time": None} | {
        name: axes[name] for name in ("energy", "money")
    }


@pytest.mark.parametrize("left", ["", "start", "start and half a line"])
def test_a_run_that_was_killed_in_its_set_up(tmp_path, left):
    folder = write(tmp_path / "run")
    fake_runs.write_ledger(folder)
    for name in ("metrics.jsonl", "routing.jsonl", "evals.jsonl", "summary.json"):
        (folder / name).unlink()
    start, work, *_ = (folder / "ledger.jsonl").read_text().splitlines()
    lines = {"": "", "start": f"{start}\n", "start and half a line": f"{start}\n{work[:30]}"}
    (folder / "ledger.jsonl").write_text(lines[left])
    build_report(folder)
    report = report_of(folder)
    assert "after 0 steps and 0 tokens and has not been evaluated" in report["verdict"]["sentence"]
    assert (report["ledger"] is None) == (left == "")
    assert report["prices"] == report["charts"]["heat"] == []


def test_losses_that_are_not_finite_are_gaps(tmp_path):
    folder = write(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    lost = [row | {"loss": None, "bits_per_byte": None} for row in rows[3:5]]
    fake_runs.write_lines(folder / "evals.jsonl", lost, attempt=2)
    steps = [json.loads(line) | {"loss": None} for line in (folder / "metrics.jsonl").read_text().splitlines()[9:12]]
    fake_runs.write_lines(folder / "metrics.jsonl", steps, attempt=2)
    build_report(folder)
    (run,) = report_of(folder)["charts"]["arms"][0]["runs"]
    assert [i for i, value in enumerate(run["bits"]) if value is None] == [3, 4]
    assert [i for i, value in enumerate(run["train"]["nats"]) if value is None] == [9, 10, 11]


def test_a_name_of_markup_is_text(tmp_path):
    config = fake_runs.config(steps=40)
    config["name"] = "</script><script>alert(1)</script>"
    folder = fake_runs.write_run(tmp_path / "<script>alert(2)<", config, bits=2.7, rows=64)
    fake_runs.write_forecast(folder)
    build_report(folder)
    report_of(folder)
    source = (folder / "report.html").read_text("utf-8")
    assert source.count("<script") == 3
    assert "alert(1)" in source
    assert "<script>alert" not in source


def test_64_layers_of_64_experts_keep_the_page_small(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "routing_pictures", lambda *_: None)  # 64 panels take seconds to lay out
    config = fake_runs.config(steps=60)
    config["model"]["moe"]["num_experts"] = 64
    folder = fake_runs.write_run(tmp_path / "run", config, bits=2.7, rows=64, layers=64, every=1)
    page = build_report(folder)
    (heat,) = report_of(folder)["charts"]["heat"]
    moments = len(heat["percent"])
    assert moments * 64 * 64 <= MOST_CELLS < (moments + 1) * 64 * 64
    assert heat["averaged"]
    assert page.stat().st_size < 4e6
    # a load in per cent of its ideal share averages to 100 over the experts, up to rounding
    assert all(abs(sum(layer) / 64 - 100) < 0.5 for layer in heat["percent"][-1])


# ------------------------------------------------------------------------------------------------------- several runs


def test_runs_that_differ_in_the_seed_only_are_one_arm(tmp_path):
    folders = [write(tmp_path / f"dense-seed{seed}", 2.8 + seed / 100, sparse=False, seed=seed) for seed in (0, 1)]
    folders += [write(tmp_path / f"sparse-seed{seed}", 2.7 + seed / 50, seed=seed) for seed in (0, 1, 2)]
    page = build_report(folders)
    assert page == tmp_path / "report" / "report.html"
    report = report_of(page.parent)
    assert [(arm["name"], arm["seeds"]) for arm in report["arms"]] == [("dense", [0, 1]), ("sparse", [0, 1, 2])]
    # Gains 2.80 − 2.70 and 2.81 − 2.72: mean .095, deviation .0070711, t(1) = 12.7062, half width .0635.
    assert (
        "sparse against dense: better, a gain of +0.095 [+0.031, +0.159] bits per byte over 2 paired seeds"
        in report["verdict"]["sentence"]
    )
    assert {"field": "model.moe.num_experts", "values": [None, 8]} in report["settings"]
    assert not [row for row in report["settings"] if row["field"] in ("seed", "name")]


def test_gain_at_equal_time_reads_the_other_curve_where_it_is_by_then(tmp_path):
    # bits = 8 − 0.5 ln(tokens) for dense, 0.2 lower for sparse, whose tokens take twice the time: dense has seen twice
    # as many by then, so that the gain is 0.2 at equal tokens and 0.2 − 0.5 ln 2 at equal time.
    for name, less, seconds in (("dense", 0.0, 0.1), ("sparse", 0.2, 0.2)):
        folder = write(tmp_path / name, sparse=name == "sparse")
        tokens = {}
        for file in ("metrics", "evals"):
            rows = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
            for row in rows:
                if file == "metrics":
                    tokens[row["step"]] = row["tokens"]
                    row["step_seconds"] = seconds
                else:
                    row["bits_per_byte"] = 8 - 0.5 * math.log(tokens[row["step"]]) - less
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report([tmp_path / "dense", tmp_path / "sparse"])
    (gain,) = report_of(page.parent)["charts"]["gains"]
    assert gain["axes"]["tokens"]["mean"] == pytest.approx([0.2] * 20, abs=1e-5)
    late = gain["axes"]["time"]
    assert late["mean"] == pytest.approx([0.2 - 0.5 * math.log(2)] * len(late["mean"]), abs=1e-5)
    assert late["steps"] == [
        step for step in gain["axes"]["tokens"]["steps"] if 2 * step <= 40
    ]  # dense ends at half the time


def test_a_forecast_that_no_run_logged_is_made_from_past_runs(tmp_path):
    past = curve_files.write(tmp_path / "past.csv", curve_files.rows(noise=0.001, shape=0.02, kind=(2, 1.0)))
    sparse = dump(smoke())
    dense = json.loads(json.dumps(sparse)) | {"model": sparse["model"] | {"moe": None}}
    folders = [
        fake_runs.write_run(tmp_path / "d", dense, bits=2.8, rows=64),
        fake_runs.write_run(tmp_path / "s", sparse, bits=2.7, rows=64, layers=2),
    ]
    report = report_of(build_report(folders, past=past).parent)
    (one,) = report["charts"]["forecasts"]
    made = forecast_folder(folders[1], folders[0], Forecast(past=str(past)))
    assert one["looks"]["low"] == pytest.approx([made["low"]] * (1 + len(made["looks"])), rel=1e-5)
    assert one["looks"]["share"][:2] == pytest.approx([0.08, made["looks"][0]["progress"]])
    assert one["final"] == pytest.approx(0.1 * math.log(2), abs=1e-4)
    assert "at 8% of training its final gain was forecast in [" in one["sentence"]
    assert build_report(folders).exists()
    assert report_of(tmp_path / "report")["charts"]["forecasts"] == []


def test_runs_that_cannot_be_compared_say_so(tmp_path):
    one, other = write(tmp_path / "a"), write(tmp_path / "b", seed=5, lr=0.1)
    (other / "evals.jsonl").unlink()
    (other / "summary.json").unlink()
    report = report_of(build_report([one, other], tmp_path / "out").parent)
    assert report["verdict"]["sentence"] == "b against a: they share no seed that both have evaluated."
    assert report["charts"]["gains"] == []
    assert "train.optimizer.lr" in {row["field"] for row in report["settings"]}


def test_the_runs_of_comparisons_can_be_taken_apart(tmp_path):
    first = fake_runs.write_comparison(tmp_path / "one", steps=40, rows=64)
    second = tmp_path / "two"
    shutil.copytree(first, second)
    report = report_of(build_report([first, second], tmp_path / "out").parent)
    # the same seeds twice are no six seeds of one arm
    assert {arm["name"]: arm["seeds"] for arm in report["arms"]} == {
        name: [0, 1, 2] for name in ("dense", "two/dense", "sparse", "two/sparse")
    }
    labels = [heat["run"] for heat in report["charts"]["heat"]]
    assert labels == [f"{arm}, seed {seed}" for arm in ("sparse", "two/sparse") for seed in range(3)]


def test_a_gain_is_not_held_against_a_twin_of_another_length(tmp_path):
    for name, steps in (("short", 40), ("long", 80)):
        write(tmp_path / name / "dense", 2.8, sparse=False, steps=steps)
        fake_runs.write_forecast(write(tmp_path / name / "sparse", 2.7, steps=steps))
    folders = [tmp_path / name / arm for arm in ("dense", "sparse") for name in ("short", "long")]
    forecasts = report_of(build_report(folders, tmp_path / "out").parent)["charts"]["forecasts"]
    assert [one["final"] for one in forecasts] == pytest.approx([0.1 * math.log(2)] * 2, abs=1e-4)


@pytest.mark.parametrize(
    ("names", "out", "says"),
    [
        (["a", "nothing"], None, "holds no run.json, nor does a folder in it"),
        (["a", "b"], "a", "has a report of its own: choose another folder with --out"),
        (["empty"], None, "holds neither compare.json nor run.json"),
    ],
)
def test_folders_that_cannot_be_reported_are_refused(tmp_path, names, out, says):
    for name in ("a", "b"):
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(says)):
        build_report([tmp_path / name for name in names], None if out is None else tmp_path / out)

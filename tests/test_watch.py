"""The forecast inside the trainer, against dense twins that are planted so that the gain is known at every evaluation.

A run's losses do not depend on who watches: it is trained once, and its twin's losses are its own plus the gain that is wanted.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from curve_files import rows, write
from tiny_runs import tiny_run

from moe.analysis.curves import gains, read_curves
from moe.analysis.forecast import fit_forecaster
from moe.analysis.forecast_run import subject_of
from moe.cli import main
from moe.config.load import dump, load
from moe.errors import UserError
from moe.experiments.planned import Planned
from moe.experiments.planned import watched as watched_plans
from moe.train import resume, train

STEPS, ANCHOR = 25, 0.2
SETTINGS = (
    f"train.steps={STEPS}", "data.sequence_length=8", "evaluation.every_steps=1", "evaluation.fresh_rows=2",
    "evaluation.probe_rows=0", "checkpoint.every_steps=15", "logging.console=plain", f"forecast.anchor={ANCHOR}",
)  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A sparse run that nobody watches, its folder, and a file of past runs."""
    home = tmp_path_factory.mktemp("plain")
    run = tiny_run(home, *SETTINGS)
    train(run, home / "plain")
    return run, home, write(home / "past.csv", rows(noise=0.001, shape=0.02, kind=(2, 1.0)))


def plant(plain, name, gain_S, until=STEPS):
    """A dense twin whose losses, row for row, are the sparse run's plus a gain at each step."""
    run, home, _ = plain
    folder = home / name
    folder.mkdir()
    twin = load(dump(run), ["model.moe=null", "forecast.anchor=0.08"])
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "run": dump(twin), "meta": {}}))
    for file, change in (("evals", lambda row, gain: {"loss": row["loss"] + gain}),
                         ("fresh", lambda row, gain: {"nats": [x + gain for x in row["nats"]]})):  # fmt: skip
        kept = [row for row in lines(home / "plain" / f"{file}.jsonl") if row["step"] <= until]
        text = "".join(json.dumps({**row, **change(row, float(gain_S[row["step"] - 1]))}) + "\n" for row in kept)
        (folder / f"{file}.jsonl").write_text(text)
    return folder


def expected(plain):
    """The gain at each step that the past runs foretell after 0.1 nats at the anchor."""
    run, _, past = plain
    curves = read_curves(past, top_k=2, routing_frequency=1.0)
    subject = subject_of(run)
    forecaster = fit_forecaster(gains(curves, ANCHOR), subject.size)
    path_S = np.exp(forecaster.paths(np.array([0.1]), np.array([subject.size]), np.array([4.0]))[0][0])
    share_S = np.arange(1, STEPS + 1) / STEPS
    return np.interp(share_S, np.append(ANCHOR, forecaster.progress_S), np.append(0.1, path_S)), path_S[-1]


def watched(plain, name, *settings):
    run, home, past = plain
    known = () if any(setting.startswith("forecast.promise") for setting in settings) else (f"forecast.past={past}",)
    return load(dump(run), [f"forecast.dense={home / name}", *known, *settings])


def test_a_healthy_run_says_and_logs_its_forecast_at_every_evaluation(plain, capsys):
    gain_S, final = expected(plain)
    plant(plain, "healthy", gain_S)
    out = train(watched(plain, "healthy"), plain[1] / "watched")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forecast: final gain")]
    found = lines(out / "forecast.jsonl")
    assert [row["step"] for row in found] == list(range(5, STEPS + 1)) and len(said) == len(found)
    assert [row["gain"] for row in found] == pytest.approx(gain_S[4:])
    assert [row["forecast"] for row in found] == pytest.approx([final] * len(found), rel=1e-6)
    assert all(row["low"] < final < row["high"] and row["alarm"] is None for row in found)
    assert said[0].endswith("nats at share 0.200; no alarm") and f"{final:.4f} [" in said[0]
    assert not [row for row in lines(out / "alarms.jsonl") if row["cause"] == "gain_behind"]
    assert lines(out / "evals.jsonl")[-2]["loss"] == lines(plain[1] / "plain" / "evals.jsonl")[-2]["loss"]


def test_a_lost_gain_is_alarmed_once_also_when_the_run_is_resumed(plain, capsys):
    gain_S = expected(plain)[0] * np.where(np.arange(1, STEPS + 1) > 10, 0.1, 1.0)
    plant(plain, "lost", gain_S)
    run = watched(plain, "lost", "train.steps=25")
    out = train(run, plain[1] / "resumed")
    whole = lines(out / "forecast.jsonl")
    alarms = [row for row in lines(out / "alarms.jsonl") if row["cause"] == "gain_behind"]
    assert [(row["step"], row["since"], row["layers"]) for row in alarms] == [(11, 11, [])]
    assert capsys.readouterr().out.count("ALARM at step 11: gain_behind") == 1
    assert (
        main(["forecast", "run", str(out), "--anchor", str(ANCHOR), "--json"]) == 1
    )  # twin and past are the run's own
    offline = json.loads(capsys.readouterr().out)
    assert offline["alarm"] == pytest.approx(11 / STEPS) and offline["forecast"] == pytest.approx(whole[-1]["forecast"])
    # killed after step 20, with half a line written: the checkpoint of step 15 is the newest
    for path in out.glob("checkpoints/step_*25"):
        path.rename(out / "gone")
    (out / "summary.json").unlink()
    with (out / "forecast.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "st')
    resume(out)
    again = lines(out / "forecast.jsonl")
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert [{**row, "attempt": 0} for row in again] == [{**row, "attempt": 0} for row in whole]
    assert [row["attempt"] for row in again] == [1] * 11 + [2] * 10
    assert len([row for row in lines(out / "alarms.jsonl") if row["cause"] == "gain_behind"]) == 1


def test_a_missing_and_a_shorter_twin_are_said_once_and_end_nothing(plain, capsys):
    gain_S, _ = expected(plain)
    out = train(watched(plain, "nowhere"), plain[1] / "alone")
    assert capsys.readouterr().out.count("forecast: no forecast at step 5:") == 1
    found = lines(out / "forecast.jsonl")
    assert len(found) == 21 and all("nowhere/run.json does not exist" in row["note"] for row in found)
    plant(plain, "short", gain_S, until=12)
    out = train(watched(plain, "short"), plain[1] / "ahead")
    assert capsys.readouterr().out.count("the dense twin has been evaluated up to step 12 only") == 1
    assert [row["share"] for row in lines(out / "forecast.jsonl")][-3:] == [12 / STEPS] * 3


def test_without_past_runs_a_promise_is_tested_on_rows_that_are_looked_at_once(plain, capsys):
    _, home, _ = plain
    fresh = lines(home / "plain" / "fresh.jsonl")
    seen = [row["first"] + i for row in fresh for i in range(len(row["nats"]))]
    assert len(seen) == len(set(seen)) == 2 * STEPS
    plant(plain, "promising", np.where(np.arange(1, STEPS + 1) > 10, 0.0, 0.5))
    settings = ["forecast.promise=0.5", "forecast.bound=0.6"]
    out = train(watched(plain, "promising", *settings), home / "bet")
    found = lines(out / "forecast.jsonl")
    assert found[0]["wealth"] == pytest.approx(1) and found[-1]["fresh_rows"] == 2 * 21
    # after the promise ends every row falls 0.5 short: wealth by hand, as a mean over the stakes of betting.py
    from moe.analysis.betting import STAKES

    lost = 2 * (STEPS - 10)
    assert found[-1]["wealth"] == pytest.approx(np.mean((1 + STAKES * 0.5 / 0.6) ** lost), rel=1e-6)
    first = next(n for n in range(1, lost) if np.mean((1 + STAKES * 0.5 / 0.6) ** n) >= 20)
    alarm = [row for row in lines(out / "alarms.jsonl") if row["cause"] == "gain_behind"]
    assert [row["step"] for row in alarm] == [10 + -(-first // 2)]
    assert "evidence against it" in capsys.readouterr().out
    plant(plain, "too good", np.full(STEPS, 3.0))
    out = train(watched(plain, "too good", *settings), home / "good")
    assert "choose the bound before the run" in lines(out / "forecast.jsonl")[-1]["note"]


def test_what_cannot_be_watched_is_refused_before_anything_is_written(plain, tmp_path):
    run, home, past = plain
    with pytest.raises(UserError, match=r"model\.moe is null: drop it"):
        load(dump(run), ["model.moe=null", "forecast.promise=1.0"])
    with pytest.raises(UserError, match=r"evaluation\.every_steps=1"):
        load(dump(run), ["forecast.dense=x", "evaluation.every_steps=0"])
    with pytest.raises(UserError, match=r"evaluation\.fresh_rows=32"):
        load(dump(run), ["forecast.promise=1.0", "evaluation.fresh_rows=0"])
    for settings, words in (
        ([f"forecast.past={home / 'none.csv'}"], "does not exist"),
        ([f"forecast.past={past}", "model.moe.top_k=3"], "has no sparse run with k=3"),
        ([f"forecast.dense={home / 'plain'}"], "must be a sparse run"),
    ):
        with pytest.raises(UserError, match=words):
            train(load(dump(run), settings), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert Path(run.forecast.dense) == Path()


def test_fresh_rows_that_run_out_are_said_and_not_looked_at_again(tmp_path, capsys):
    run = tiny_run(
        tmp_path, "train.steps=4", "evaluation.every_steps=1", "evaluation.fresh_rows=5", "logging.console=plain"
    )
    out = train(run, tmp_path / "run")
    found = lines(out / "fresh.jsonl")
    assert [row["first"] for row in found] == [12, 7, 2]  # 17 validation rows
    assert capsys.readouterr().out.count("no fresh rows are left") == 1


def test_a_comparison_gives_its_sparse_runs_the_dense_twin_of_their_seed(plain, tmp_path):
    run = load(dump(plain[0]), ["forecast.promise=0.1"])
    twin = load(dump(plain[0]), ["model.moe=null"])
    arms = {
        arm: [Planned(tmp_path / f"{arm}{seed}", replace(base, seed=seed)) for seed in (3, 4)]
        for arm, base in (("sparse", run), ("dense", twin), ("hash", plain[0]))
    }
    found = {arm: [planned.run.forecast.dense for planned in plans] for arm, plans in watched_plans(arms).items()}
    assert found == {
        "sparse": [str(tmp_path / "dense3"), str(tmp_path / "dense4")],
        "dense": ["", ""],
        "hash": ["", ""],
    }

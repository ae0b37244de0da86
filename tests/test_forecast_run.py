"""`moe forecast run` on planted run folders: a healthy one, one whose gain is lost midway, and folders that do not fit."""

import json

import numpy as np
import pytest
from curve_files import rows, write
from tiny_runs import tiny_dict

from moe import cost
from moe.analysis.curves import gains, read_curves
from moe.analysis.forecast import fit_forecaster
from moe.cli import main
from moe.config.load import dump, load

STEPS = 200


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    return write(tmp_path_factory.mktemp("past") / "c.csv", rows(noise=0.001, shape=0.02))


def folder(path, run, step_S, loss_S):
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"schema_version": 1, "run": dump(run), "meta": {}}))
    fields = {"schema_version": 1, "attempt": 1, "final": False, "tokens": 1, "bytes": 1, "bits_per_byte": 1.0}
    lines = [json.dumps({**fields, "step": int(s), "loss": float(x)}) for s, x in zip(step_S, loss_S, strict=True)]
    (path / "evals.jsonl").write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def planted(tmp_path, past):
    """(arguments of the command, its forecaster) for gains that follow the forecast, less `lost` of it from 40 % on."""
    sparse = load(tiny_dict(tmp_path), [f"train.steps={STEPS}"])
    dense = load(dump(sparse), ["model.moe=null"])
    size = float(cost.parameters(sparse.model).active)
    forecaster = fit_forecaster(gains(read_curves(past), 0.08), size)

    def make(lost=0.0, until=1.0):
        step_S = np.array(
            [s for s in range(5, STEPS + 1, 5) if s <= until * STEPS]
        )  # 2.5 %; the past's interval is 4 %
        one = np.array([0.1]), np.array([size]), np.array([float(sparse.model.moe.num_experts)])
        path_S = np.exp(forecaster.paths(*one)[0][0])
        gain_S = np.interp(step_S / STEPS, np.append(0.08, forecaster.progress_S), np.append(0.1, path_S))
        gain_S *= np.where(step_S / STEPS > 0.4, 1 - lost, 1.0)
        names = (
            folder(tmp_path / "s", sparse, step_S, 3 - gain_S),
            folder(tmp_path / "d", dense, step_S, 3 + 0 * gain_S),
        )
        return [
            "forecast",
            "run",
            names[0],
            "--dense",
            names[1],
            "--past",
            str(past),
            "--top-k",
            "1",
            "--routing-frequency",
            "0.5",
        ], float(path_S[-1])

    return make


def test_a_run_that_follows_its_forecast_raises_no_alarm(planted, capsys):
    command, final = planted(until=0.5)
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["forecast"] == pytest.approx(final, rel=0.01)  # the anchor lies between two evaluations
    assert result["low"] < final < result["high"]
    assert [look["progress"] for look in result["looks"]] == pytest.approx(np.arange(12, 51, 4) / 100)
    assert result["progress"] == 0.5 and result["alarm"] is None and result["beyond_past_sizes"]
    assert main(command) == 0
    assert "no alarm in 10 looks" in capsys.readouterr().out


def test_a_gain_that_is_lost_midway_raises_the_alarm_soon(planted, capsys):
    command, _ = planted(lost=0.9)
    assert main([*command, "--json"]) == 1
    assert 0.4 < json.loads(capsys.readouterr().out)["alarm"] <= 0.48
    assert main(command) == 1
    assert "ALARM at 4" in capsys.readouterr().out


def test_folders_that_do_not_fit_are_refused(planted, capsys):
    command, _ = planted(until=0.05)
    assert main(command) == 2
    assert "evaluated from 2.5% to 5.0% of training, the anchor is at 8.0%" in capsys.readouterr().err
    swapped = [*command[:2], command[4], "--dense", command[2], *command[5:]]
    assert main(swapped) == 2
    assert "must be a sparse run" in capsys.readouterr().err

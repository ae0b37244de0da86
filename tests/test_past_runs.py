"""`moe forecast collect` and `moe forecast run` on planted comparisons, whose losses are those of curve_files.py.

What is read back from the collected file is compared with what was planted in the folders.
"""

import csv
import json

import numpy as np
import pytest
from curve_files import dense_loss, gain
from tiny_runs import tiny_dict

from moe.analysis.curves import gains, read_curves
from moe.cli import main
from moe.config.load import dump, load
from moe.cost import dense_twin, parameters

WIDTHS, EXPERTS, SEEDS = (32, 48, 64), (4, 8, 16), (0, 1, 2)


def write_run(folder, run, loss_S, steps, status="finished"):
    """A run folder with losses at the given steps, and a final evaluation on other rows that must not be mixed in."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "run": dump(run), "meta": {}}))
    fields = {"schema_version": 1, "attempt": 1, "tokens": 1, "bytes": 1, "bits_per_byte": 1.0}
    rows = [{"step": int(s), "final": False, "loss": float(x)} for s, x in zip(steps, loss_S, strict=True)]
    rows.append({"step": int(steps[-1]), "final": True, "loss": 99.0})
    (folder / "evals.jsonl").write_text("".join(json.dumps({**fields, **row}) + "\n" for row in rows))
    totals = {"tokens": 1, "seconds": 1, "parameters_total": 1, "parameters_active": 1, "train_flops_per_token": 1}
    summary = {"schema_version": 1, "status": status, "step": int(steps[-1]), **totals}
    (folder / "summary.json").write_text(json.dumps(summary))


def hidden(base, width, experts):
    """An expert width at which the dense twin of equal FLOPs exists."""
    for found in range(width + 8, 4, -1):
        settings = [f"model.dim={width}", f"model.moe.num_experts={experts}", f"model.moe.expert_hidden={found}"]
        run = load(base, settings)
        try:
            return run, dense_twin(run)
        except ValueError:
            continue
    raise AssertionError("no width has a twin")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Comparisons of three widths, three numbers of experts and three seeds, as far apart in length as 100 and 200 steps."""
    home = tmp_path_factory.mktemp("home")
    base = tiny_dict(home)
    for width in WIDTHS:
        for experts in EXPERTS:
            sparse, dense = hidden(base, width, experts)
            out, random = home / "runs" / f"{width}-{experts}", np.random.default_rng(width + experts)
            total = 100 if experts < 16 else 200
            steps = np.arange(4, 101, 4) * total // 100
            for seed in SEEDS:
                size, settings = float(parameters(dense.model).active), [f"seed={seed}", f"train.steps={total}"]
                lift = 0.01 * seed + 1e-4 * random.normal(size=steps.size)
                gain_S = gain(1e8 * size / 2e4, experts, steps / total, 0.02 * random.normal())
                base_S = dense_loss(size, steps / total) + lift
                write_run(out / f"dense-seed{seed}", load(dump(dense), settings), base_S, steps)
                write_run(out / f"sparse-seed{seed}", load(dump(sparse), settings), base_S - gain_S, steps)
            arms = {arm: [f"{arm}-seed{seed}" for seed in SEEDS] for arm in ("sparse", "dense")}
            (out / "compare.json").write_text(json.dumps({"schema_version": 1, "arms": arms}))
    return home


@pytest.fixture(scope="module")
def collected(home):
    path = home / "past.csv"
    assert main(["forecast", "collect", str(home / "runs"), "--out", str(path)]) == 0
    return path


def test_collected_gains_are_the_planted_ones_pair_by_pair(home, collected, capsys):
    found = gains(read_curves(collected, top_k=2, routing_frequency=1.0), 0.2)
    assert found.gain_RS.shape[0] == 27 and not found.left_out
    assert len(np.unique(found.size_R)) == 3 and sorted(set(found.experts_R.tolist())) == list(EXPERTS)
    for run, gain_S in zip(found.run_R, found.gain_RS, strict=True):
        folders = [home / "runs" / str(run).replace("sparse", arm) for arm in ("sparse", "dense")]
        curves = [[json.loads(line) for line in (f / "evals.jsonl").read_text().splitlines()][:-1] for f in folders]
        steps, losses = [row["step"] for row in curves[0]], [[row["loss"] for row in rows] for rows in curves]
        planted = np.interp(found.progress_S, np.array(steps) / steps[-1], np.array(losses[1]) - losses[0])
        np.testing.assert_allclose(gain_S, planted, atol=1e-12)
    rows = list(csv.DictReader(collected.read_text().splitlines()))
    assert {row["schedule"] for row in rows} == {"cosine warmup_steps=0 final_fraction=0.1"}
    assert main(["forecast", "backtest", str(collected), "--hold-out", "all", "--anchor", "0.2", "--top-k", "2",
                 "--routing-frequency", "1", "--json"]) in (0, 2)  # fmt: skip


def test_a_comparison_is_forecast_pair_by_pair_from_the_users_own_past(home, collected, capsys):
    command = [
        "forecast",
        "run",
        str(home / "runs/48-8"),
        "--past",
        str(collected),
        "--anchor",
        "0.2",
        "--confidence",
        "0.99",
    ]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in result["runs"]] == [f"sparse-seed{seed}" for seed in SEEDS]
    for run in result["runs"]:
        assert (
            run["forecast"] == pytest.approx(run["looks"][-1]["gain"], rel=0.15)
            and run["past_runs"] == 27
            and run["form"] == "plain"
        )
    assert main(command) == 0
    assert capsys.readouterr().out.count("no alarm in 20 looks") == 3
    assert main([*command, "--dense", str(home / "runs/48-8/dense-seed0")]) == 2
    assert "leave --dense out" in capsys.readouterr().err


def test_single_runs_find_their_twin_by_what_they_saw_and_the_rest_is_named(home, tmp_path, capsys):
    sparse, dense = hidden(tiny_dict(home), 32, 4)
    steps, loss = np.arange(5, 101, 5), np.ones(20)
    change = "train.steps=100"
    for name, run, level in (
        ("a", load(dump(sparse), [change]), 2.0),
        ("right", load(dump(dense), [change]), 2.1),
        ("other lr", load(dump(dense), [change, "train.optimizer.lr=0.02"]), 2.05),
        ("other seed", load(dump(dense), [change, "seed=5"]), 2.5),
        ("wider", load(dump(dense), [change, "model.ffn_hidden=64", "model.ffn_hidden_per_layer=[]"]), 1.0),
        ("alone", load(dump(sparse), [change, "seed=9"]), 2.0),
    ):
        write_run(tmp_path / "runs" / name, run, level * loss, steps)
    write_run(tmp_path / "runs" / "broken off", load(dump(sparse), [change]), loss, steps, status="interrupted")
    out = tmp_path / "past.csv"
    assert main(["forecast", "collect", str(tmp_path / "runs"), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["sparse_runs"], result["dense_runs"]) == (1, 1)
    assert {row["hyper_id"].split("@")[0] for row in csv.DictReader(out.read_text().splitlines())} == {"a", "right"}
    assert [text.split(":")[0] for text in result["left_out"]] == ["broken off", "alone"]
    assert main(["forecast", "collect", str(tmp_path / "runs"), "--out", str(out)]) == 0, "it may be collected again"
    (tmp_path / "mine.csv").write_text("my,file\n")
    assert main(["forecast", "collect", str(tmp_path / "runs"), "--out", str(tmp_path / "mine.csv")]) == 2
    assert "is no file of past runs" in capsys.readouterr().err
    assert main(["forecast", "collect", str(tmp_path / "runs/alone"), "--out", str(out)]) == 2
    assert "no finished sparse run has a finished dense twin" in capsys.readouterr().err
    assert main(["forecast", "collect", str(tmp_path / "empty"), "--out", str(out)]) == 2
    assert "no run.json in" in capsys.readouterr().err

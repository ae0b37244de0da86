"""`compare` with a fake trainer (fake_runs.py as a program), whose events say what was started, when, and how it ended.

The twin and the configs are the real ones; the interleaved timing is checked with a clock that counts.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_runs
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from moe import cli
from moe.analysis.promise import sealed
from moe.analysis.report import build_report
from moe.config.load import load
from moe.cost import parameters, train_flops_per_token
from moe.errors import ConfigError, TrainingStopped, UserError
from moe.experiments import processes
from moe.experiments.compare import compare
from moe.experiments.step_timing import WARMUP_STEPS, interleave
from moe.routers.hash import Config as Hash

RECIPE = str(Path(__file__).parents[1] / "recipes" / "smoke.py")
FAKE = (sys.executable, fake_runs.__file__)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Call compare with the fakes; returns what was printed. Afterwards start.events() lists what the fakes did."""
    log = tmp_path / "events"
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"no picture"))
    monkeypatch.setenv("FAKE_EVENTS", str(log))

    def call(*, modes=None, **options):
        monkeypatch.setenv("FAKE_MODES", json.dumps(modes or {}))
        printed = io.StringIO()
        given = {"overrides": ["train.steps=20"], "seeds": 2, "jobs": 2, "lr_grid": [], "timing_rounds": 0} | options
        console = Console(file=printed, width=200)
        commands = {"train_command": FAKE, "timing_command": (*FAKE, "--timing")}
        call.page = compare(RECIPE, out=tmp_path / "out", console=console, **given, **commands)
        return printed.getvalue()

    def events(*kinds):
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [(kind, name) for kind, name, *_ in lines if not kinds or kind in kinds]

    call.events, call.log, call.out = events, log, tmp_path / "out"
    return call


def read(path):
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------------- training


def test_both_arms_are_trained_for_every_seed_and_reported(start):
    printed = start(seeds=[3, 5, 8])
    wanted = {f"{arm}-seed{seed}" for arm in ("sparse", "dense") for seed in (3, 5, 8)}
    assert {name for _, name in start.events("start")} == wanted
    assert start.page == start.out / "report.html"
    gain = read(start.out / "report.json")["gain"]
    # The fake's gain is 0.08 + 0.004 · seed.
    assert gain["values"] == pytest.approx([0.092, 0.1, 0.112])
    assert "sparse model is ahead" in printed
    assert printed.count("finished in") == 6


def test_a_pair_shares_everything_but_the_expert_layers(start):
    start()
    sparse, dense = (read(start.out / f"{arm}-seed1.json")["run"] for arm in ("sparse", "dense"))
    assert sparse["model"].pop("moe") is not None
    assert dense["model"].pop("moe") is None
    for name in ("ffn_hidden", "ffn_hidden_per_layer"):
        for run in (sparse, dense):
            run["model"].pop(name)
    assert (sparse.pop("name"), dense.pop("name")) == ("smoke-sparse-seed1", "smoke-dense-seed1")
    assert sparse == dense
    assert sparse["seed"] == 1


def test_twin_is_recorded_with_flops_that_agree(start):
    start(seeds=1)
    twin = read(start.out / "compare.json")["twin"]
    for arm in ("sparse", "dense"):
        run = load(start.out / f"{arm}-seed0.json")
        assert twin[f"flops_{arm}"] == train_flops_per_token(run.model, run.data.sequence_length)
    assert abs(twin["flops_dense"] / twin["flops_sparse"] - 1) <= 0.005
    assert twin["rows_per_token"] == 2


def test_rows_for_an_estimator_are_in_the_flops_and_not_in_what_the_logs_count(start):
    plain = ["train.steps=20"]
    start(seeds=1, overrides=[*plain, "model.moe.router.estimator=dense_mixer"])
    record = read(start.out / "compare.json")["twin"]
    run = load(start.out / "sparse-seed0.json")
    chosen = load(start.out / "sparse-seed0.json", ["model.moe.router.estimator=chosen"])
    assert record["rows_per_token"] == 2
    more = record["flops_sparse"] - train_flops_per_token(chosen.model, run.data.sequence_length)
    assert more == 2 * 18 * 64 * 64 * (8 - 2), "two layers, D = F = 64, all 8 experts instead of 2"


@pytest.mark.parametrize("jobs", [1, 3])
def test_at_most_jobs_runs_train_at_once(start, jobs):
    start(jobs=jobs)
    running = most = 0
    for kind, _ in start.events("start", "end"):
        running += 1 if kind == "start" else -1
        most = max(most, running)
    assert most <= jobs
    assert (most > 1) == (jobs > 1)


def test_processors_are_shared_out_where_the_recipe_leaves_threads_open(start, monkeypatch):
    monkeypatch.setattr("moe.experiments.compare.cpu_count", lambda: 8)
    start(seeds=1, jobs=3)
    assert read(start.out / "sparse-seed0.json")["run"]["train"]["threads"] == 2
    assert read(start.out / "dense-seed0" / "run.json")["run"]["train"]["threads"] == 2


def test_threads_of_the_recipe_are_kept(start):
    start(seeds=1, overrides=["train.steps=20", "train.threads=5"])
    assert read(start.out / "sparse-seed0.json")["run"]["train"]["threads"] == 5


# ------------------------------------------------------------------------------------------------- again, and failing


def test_finished_runs_are_reused(start):
    start(seeds=1)
    before = start.events()
    printed = start(seeds=1)
    assert start.events() == before
    assert printed.count("already finished, reused") == 2
    start(seeds=2)
    assert {name for _, name in start.events()[len(before) :]} == {"sparse-seed1", "dense-seed1"}


def test_interrupted_run_fails_the_comparison_and_is_resumed_by_the_next(start):
    with pytest.raises(TrainingStopped, match=r"dense-seed0 failed \(status interrupted, run the same command again"):
        start(seeds=1, jobs=1, modes={"dense-seed0": "interrupted"})  # one after the other, so that sparse is finished
    printed = start(seeds=1, jobs=1)
    assert start.events("resume") == [("resume", "dense-seed0")]
    assert "dense-seed0: resuming" in printed
    assert start.page.exists()


def test_run_of_other_settings_is_refused_by_name(start):
    start(seeds=1)
    with pytest.raises(UserError, match=r"sparse-seed0 holds a run of other settings: train\.steps is 20 there and 30"):
        start(seeds=1, overrides=["train.steps=30"])


def test_backend_that_was_resolved_is_no_other_setting(start):
    start(seeds=1)
    path = start.out / "sparse-seed0" / "run.json"
    header = read(path)
    assert header["run"]["model"]["moe"]["backend"] == "auto"
    header["run"]["model"]["moe"]["backend"] = "torch"
    path.write_text(json.dumps(header))
    assert "reused" in start(seeds=1)


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(start):
    start(seeds=1)
    path = start.out / "sparse-seed0" / "run.json"
    header = read(path)
    assert header["run"]["train"].pop("loss_chunk") == 512
    path.write_text(json.dumps(header))
    assert "reused" in start(seeds=1)
    with pytest.raises(UserError, match=r"train\.loss_chunk is 512 there and 64 here"):
        start(seeds=1, overrides=["train.loss_chunk=64"])


def test_past_runs_that_are_not_there_are_refused_before_anything_trains(start):
    with pytest.raises(UserError, match=r"past\.csv does not exist"):
        start(seeds=1, overrides=["forecast.past=past.csv", "evaluation.every_steps=5"])
    assert not start.out.exists() or start.events() == []


def test_folder_that_is_no_run_is_refused(start):
    (start.out / "sparse-seed0").mkdir(parents=True)
    (start.out / "sparse-seed0" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds no run\.json"):
        start(seeds=1)
    assert (start.out / "sparse-seed0" / "thesis.txt").exists()


@pytest.mark.parametrize(("mode", "error"), [("crash", TrainingStopped), ("refuse", UserError)])
def test_failing_run_is_reported_with_the_end_of_its_log_and_stops_the_others(start, mode, error):
    begin = time.monotonic()
    with pytest.raises(error, match=f"(?s)dense-seed0 failed .*the {mode} that the test asked for") as caught:
        start(seeds=1, modes={"dense-seed0": mode, "sparse-seed0": "slow"})
    assert isinstance(caught.value, UserError) == (mode == "refuse")
    assert time.monotonic() - begin < 30
    if ("ready", "sparse-seed0") in start.events():
        assert ("terminated", "sparse-seed0") in start.events()
    assert not start.out.joinpath("report.html").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_and_sigterm_end_the_children_with_one_signal_each(start, tmp_path, number, code):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"run": fake_runs.config()}))
    script = (
        "import sys; from pathlib import Path; from moe.experiments.processes import Job, run_jobs\n"
        "folder, command = Path(sys.argv[1]), tuple(sys.argv[2:])\n"
        "jobs = [Job(n, (*command, f'out={folder / n}'), folder / f'{n}.log') for n in ('a', 'b', 'c')]\n"
        "run_jobs(jobs, 2, print)"
    )
    modes = json.dumps({"a": "slow", "b": "slow"})
    environment = os.environ | {"FAKE_MODES": modes, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path), *FAKE, str(config)]
    # a shell gives its background jobs an ignored SIGINT, which children inherit; the user's Ctrl-C comes to a process that has not
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while len(start.events("ready")) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == code
    assert sorted(start.events("terminated")) == [("terminated", "a"), ("terminated", "b")]
    assert ("start", "c") not in start.events()
    for _, _, pid, _ in map(json.loads, start.log.read_text().splitlines()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_child_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.3)
    ready = tmp_path / "ready"
    stubborn = (
        "import signal, time, pathlib, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    wait = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)"
    jobs = [
        processes.Job(name, (sys.executable, "-c", code, str(ready)), tmp_path / f"{name}.log")
        for name, code in (("stubborn", stubborn), ("failing", wait))
    ]

    def fail(job, code, seconds):
        raise UserError(job.name)

    begin = time.monotonic()
    with pytest.raises(UserError, match="failing"):
        processes.run_jobs(jobs, 2, fail)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": 0}, "at least one"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"jobs": 0}, r"jobs \(0\) must be at least 1"),
        ({"lr_grid": [0.1, -1.0]}, "positive"),
        ({"timing_rounds": -1}, "0 .no timing. or more"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(start, options, says):
    with pytest.raises(UserError, match=says):
        start(**options)
    assert not start.out.exists()


def test_dense_recipe_is_refused(start, tmp_path):
    path = tmp_path / "dense.json"
    start(seeds=1)
    path.write_text((start.out / "dense-seed0.json").read_text())
    assert load(path).model.moe is None
    with pytest.raises(ConfigError, match="no expert layers"):
        compare(
            str(path), overrides=[], seeds=1, jobs=1, lr_grid=[], timing_rounds=0, out=tmp_path / "x", console=Console()
        )


# ----------------------------------------------------------------------------------------------------- learning rate


def test_learning_rate_is_found_on_the_dense_arm_and_shared(start):
    printed = start(lr_grid=[0.001, 0.002, 0.02])
    # The fake is best at 0.003, by the squared distance of logarithms: 0.002 of these.
    record = read(start.out / "compare.json")
    assert record["learning_rate"]["value"] == 0.002
    assert [lr for lr, _ in record["learning_rate"]["tried"]] == [0.001, 0.002, 0.02]
    assert record["arms"] == {"sparse": ["sparse-seed0", "sparse-seed1"], "dense": ["lr-0.002", "dense-seed1"]}
    for name in (*record["arms"]["sparse"], *record["arms"]["dense"]):
        assert read(start.out / name / "run.json")["run"]["train"]["optimizer"]["lr"] == 0.002
    assert len(start.events("start")) == 3 + 3
    assert read(start.out / "lr-0.02" / "run.json")["run"]["model"]["moe"] is None
    assert "learning rate 0.002" in printed
    assert read(start.out / "report.json")["cautions"] == []


def test_diverged_learning_rate_counts_as_worst(start):
    start(seeds=1, lr_grid=[0.002, 0.003], modes={"lr-0.003": "stopped"})
    record = read(start.out / "compare.json")
    assert record["learning_rate"]["value"] == 0.002
    assert record["learning_rate"]["tried"][1] == [0.003, None]
    assert any("edge of the grid" in caution for caution in read(start.out / "report.json")["cautions"])


def test_divergence_at_every_learning_rate_is_an_error(start):
    with pytest.raises(UserError, match="diverged at every learning rate"):
        start(seeds=1, lr_grid=[0.002], modes={"lr-0.002": "stopped"})


# ------------------------------------------------------------------------------------------------------------ timing


def test_timing_is_measured_once_for_the_same_configs(start):
    start(seeds=1, timing_rounds=3)
    assert start.events()[-1] == ("timing", "sparse-seed0 dense-seed0")
    assert read(start.out / "report.json")["timing"]["ratio"] == pytest.approx(0.7)
    start(seeds=1, timing_rounds=3)
    assert len(start.events("timing")) == 1
    start(seeds=1, timing_rounds=4)
    assert len(start.events("timing")) == 2


def test_without_timing_no_speed_is_reported(start):
    start(seeds=1, timing_rounds=0)
    assert start.events("timing") == []
    assert read(start.out / "report.json")["timing"] is None


def test_arms_take_turns_and_alternate_who_goes_first():
    calls, now = [], [0.0]

    def step(arm, seconds):
        def run(index):
            calls.append((arm, index))
            now[0] += seconds
            return 100

        return run

    speeds = interleave({"sparse": step("sparse", 2.0), "dense": step("dense", 1.0)}, 3, clock=lambda: now[0])
    assert speeds == {"sparse": [50, 50, 50], "dense": [100, 100, 100]}
    timed = calls[2 * WARMUP_STEPS :]
    assert [arm for arm, _ in timed] == ["sparse", "dense", "dense", "sparse", "sparse", "dense"]
    assert [index for _, index in timed] == [2, 2, 3, 3, 4, 4]
    calls.clear()
    # 0.2 s in the slower arm: turns of 3 steps, the same ones in both arms.
    interleave({"sparse": step("sparse", 0.2), "dense": step("dense", 0.1)}, 2, clock=lambda: now[0])
    arms = ["sparse", "dense", "dense", "sparse"]
    turns = [[2, 3, 4], [2, 3, 4], [5, 6, 7], [5, 6, 7]]
    assert calls[2 * WARMUP_STEPS :] == [(arm, i) for arm, turn in zip(arms, turns, strict=True) for i in turn]


@pytest.mark.full
def test_real_trainer_compares_a_tiny_recipe(tmp_path):
    overrides = ["train.steps=6", "evaluation.every_steps=2", "evaluation.rows=8", "evaluation.final_rows=8"]
    options = {"seeds": 2, "jobs": 2, "lr_grid": [], "timing_rounds": 2, "console": Console()}
    for _ in range(2):
        page = compare(RECIPE, overrides=overrides, out=tmp_path / "out", **options)
    report = read(page.with_name("report.json"))
    assert report["timing"]["rounds"] == 2
    assert report["cautions"] == []
    assert len(report["gain"]["values"]) == 2


# --------------------------------------------------------------------------------------------------------- contracts


def test_contracts_are_judged_with_twins_of_their_own(start):
    printed = start(seeds=2, contracts=True, decompose=True, timing_rounds=3)
    report, record = read(start.out / "report.json"), read(start.out / "compare.json")
    found = report["contracts"]
    assert set(record["more_arms"]) == {"total", "hash", "frozen_random"}
    assert {name for _, name in start.events("start")} >= {f"{arm}-seed1" for arm in ("total", "hash", "frozen_random")}
    sparse, total = (load(start.out / f"{arm}-seed0.json") for arm in ("sparse", "total"))
    assert parameters(total.model).total == pytest.approx(parameters(sparse.model).total, rel=0.005)
    assert load(start.out / "hash-seed0.json").model.moe.router == Hash()
    verdicts = {entry["contract"]: entry for entry in found["contracts"]}
    assert verdicts["flops"]["from"] == "the active twin itself" and verdicts["flops"]["verdict"] == "win"
    # the report's own gain at equal FLOPs
    assert verdicts["flops"]["gain"]["values"] == pytest.approx(report["gain"]["values"])
    assert verdicts["dollars"].get("gain") == verdicts["seconds"].get("gain") is not None
    assert "no price was given" in verdicts["dollars"]["from"]
    assert [part["twin"] for part in found["decomposition"]] == ["hash", "frozen_random"]
    assert any(line["sentence"].startswith("At equal FLOPs: win") for line in report["verdict"]["contracts"])
    assert "At equal FLOPs: win" in printed and "Against the hash twin: capacity" in printed
    assert (start.out / "timing_total.json").exists()


@pytest.mark.full
def test_each_arm_may_have_a_learning_rate_of_its_own(start):
    start(seeds=2, lr_grid=[0.001, 0.002], tune_each=True, modes={"sparse-lr-0.002": "stopped"})
    rate = read(start.out / "compare.json")["learning_rate"]
    assert rate["per_arm"]["sparse"] == 0.001
    assert load(start.out / "dense-seed1.json").train.optimizer.lr == rate["value"] == rate["per_arm"]["dense"]
    assert not any("optimizer.lr" in caution for caution in read(start.out / "report.json")["cautions"])


# ----------------------------------------------------------------------------------------------------------- promises


def promised(tmp_path, **changes):
    """A promise about the small comparison, as the command writes it."""
    path = tmp_path / "promise.json"
    given = {"gain": "0.08", "low": "0.05", "high": "0.11"} | changes
    options = [text for name, value in given.items() for text in (f"--{name}", value)]
    assert cli.main(["promise", RECIPE, "train.steps=20", "--out", str(path), *options]) == 0
    return path


def test_the_report_quotes_the_promise_and_says_that_it_was_kept(start, tmp_path):
    path = promised(tmp_path)
    start(promise=path)
    found = read(start.out / "report.json")
    seal = read(path)["sha256"]
    # the fake's runs all began at 10:00 on 2026-11-22
    assert found["promise"]["tampering"] == [
        t for t in found["promise"]["tampering"] if "after the first run began" in t
    ]
    assert found["promise"]["outcome"]["verdict"] == "kept"
    assert read(start.out / "sparse-seed1.json")["run"]["logging"]["promise"] == seal
    assert any(f"seal {seal[:12]}" in note for note in found["promise"]["sentences"])


def test_a_promise_that_was_changed_is_refused_before_and_shown_after(start, tmp_path):
    path = promised(tmp_path)
    start(promise=path, seeds=1)
    copy = start.out / "promise.json"
    copy.write_text(json.dumps(read(copy) | {"low": -1.0}))
    build_report(start.out)
    assert "changed after it was sealed" in " ".join(read(start.out / "report.json")["promise"]["sentences"])
    resealed = sealed({name: value for name, value in read(copy).items() if name != "sha256"})
    copy.write_text(json.dumps(resealed))
    build_report(start.out)
    assert "Not started under this promise, but under another or none: sparse-seed0" in " ".join(
        read(start.out / "report.json")["promise"]["sentences"]
    )
    copy.unlink()
    build_report(start.out)
    assert "which is missing" in " ".join(read(start.out / "report.json")["promise"]["tampering"])
    path.write_text(json.dumps(read(path) | {"gain": 0.06}))
    with pytest.raises(UserError, match="changed after it was sealed: make a new promise"):
        start(promise=path)


def test_a_promise_about_another_run_or_none_at_all_is_refused(start, tmp_path, capsys):
    path = promised(tmp_path)
    with pytest.raises(UserError, match="about another model, data or training"):
        start(promise=path, overrides=["train.steps=20", "model.dim=32"])
    assert cli.main(["promise", RECIPE, "--out", str(path), "--gain", "1", "--low", "0", "--high", "2"]) == 2
    assert "a promise is made once" in capsys.readouterr().err
    other = str(tmp_path / "other.json")
    for options, words in (
        (["--gain", "1", "--low", "2", "--high", "3"], "must lie in its interval"),
        (["--gain", "1", "--low", "0", "--high", "2", "--contract", "luck"], "must be one of active_parameters"),
        (["--gain", "1", "--low", "0", "--high", "2", "--error-rate", "0.7"], "above 0 and below 0.5"),
    ):
        assert cli.main(["promise", RECIPE, "--out", other, *options]) == 2
        assert words in capsys.readouterr().err

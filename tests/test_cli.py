"""The command line against the functions that it calls: what it prints, what it passes on, how it exits.

Commands run in this process through `main`; three run as real processes. Mistakes are in test_wrong_inputs.py.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import tiny_dict

from moe import cost
from moe.cli import main
from moe.config.command import parse
from moe.config.layout import resolve
from moe.config.load import dump, known_routers, load
from moe.config.words import typed
from moe.errors import GRACE_SECONDS, ConfigError, TrainingStopped, fail, run_main


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_dict(tmp_path)))
    return path


def run_command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


# --------------------------------------------------------------------------------------------------------------- show


@pytest.mark.parametrize("overrides", [[], ["model.moe=null"], ["model.moe.router=hash", 'name="8"', "seed=5"]])
def test_every_setting_that_show_prints_can_be_typed_back(recipe, capsys, overrides):
    assert main(["show", str(recipe), *overrides]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    settings = [line for line in lines if "=" in line and " " not in line.split("=")[0] and not line.startswith("note")]
    run = load(recipe, overrides)
    assert len(settings) > 50
    assert load(dump(run), settings) == run


def test_show_prints_the_numbers_of_cost(recipe, capsys):
    main(["show", str(recipe)])
    out = " ".join(capsys.readouterr().out.split())
    run = load(recipe)
    count = cost.parameters(run.model)
    assert f"parameters, total {count.total:,}" in out
    assert f"parameters, active per token {count.active:,}" in out
    assert f"training FLOPs per token {cost.train_flops_per_token(run.model, 32):,.0f}" in out
    assert "tokens per step 128" in out
    assert f"activations {cost.memory_bytes(run)['activations'] / 2**20:,.1f} MiB" in out
    assert "0-1 2/1 heads of 8 2 of 4 experts of 8" in out


def test_show_lists_each_kind_of_layer(recipe, capsys):
    main(["show", str(recipe), "model.num_layers=5", "model.moe.first_dense=1", "model.attention.windows=[8,0]"])
    out = " ".join(capsys.readouterr().out.split())
    assert "0 2/1 heads of 8, window 8 dense 32" in out
    assert "1 2/1 heads of 8 2 of 4 experts of 8" in out
    assert "4 2/1 heads of 8, window 8 2 of 4" in out


def test_show_prints_the_layout_the_placement_and_memory_per_rank(recipe, capsys):
    sizes = ["parallel.shard=4", "parallel.expert=2", "train.batch_rows=32"]
    assert main(["show", str(recipe), *sizes, "--ranks", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ranks 8: replicate=2 shard=4 expert=2" in out
    assert "matrices" in out and "cut into 4 over shard · context, 2 copies" in out
    assert "experts" in out and "cut into 2 over expert times 2 over expert_shard, 2 copies" in out
    run = load(recipe, sizes)
    memory = cost.memory_bytes(run, resolve(run, 8))
    assert f"memory per rank all {sum(memory.values()) / 2**20:,.1f} MiB" in out
    assert f"gathered {memory['gathered'] / 2**20:,.1f} MiB" in out
    assert main(["show", str(recipe), "parallel.shard=4", "--ranks", "6"]) == 2
    assert "must divide the number of processes (6)" in capsys.readouterr().err


def test_show_says_what_a_changed_router_drops_and_that_it_is_not_causal(recipe, capsys):
    main(["show", str(recipe), "model.moe.router=expert_choice"])
    out = capsys.readouterr().out
    assert "model.moe.router: topk -> expert_choice drops" in out
    assert "is not causal" in out


def test_show_gives_the_balance_coefficient_in_both_conventions(recipe, capsys):
    main(["show", str(recipe), "model.moe.router.balance.weight=0.5"])
    out = " ".join(capsys.readouterr().out.split())
    assert "weight 0.5 (1.0 is balance), or 0.25 where f is not divided by K" in out


def test_typed_text_survives_being_parsed_as_json():
    for value in ("a b", "", "8", "null", "true", '"x"', [1, "a"], None, 1e-6, {"a": [1]}):
        text = typed(value)
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            parsed = text
        assert parsed == value


def test_routers_lists_every_router_and_which_is_not_causal(capsys):
    assert main(["routers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == known_routers()
    assert [line.split()[0] for line in lines if "not causal" in line] == [
        "base",
        "expert_choice",
        "quantile_batch",
        "sinkhorn",
    ]


def test_moe_alone_prints_the_commands(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("show", "train", "resume", "compare", "report", "routers"):
        assert f"\n  {command} " in out


# ------------------------------------------------------------------------------------------------------ train, resume


def test_train_writes_the_run_where_out_says_and_resume_continues_it(recipe, tmp_path):
    out = tmp_path / "a" / "run"
    assert main(["train", str(recipe), f"out={out}", "seed=3"]) == 0
    assert load(out / "run.json") == load(recipe, ["seed=3"])
    assert main(["resume", str(out), "train.steps=3"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_train_refuses_a_folder_that_holds_anything(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert main(["train", str(recipe), f"out={tmp_path / 'out'}"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_python_m_moe_train_and_moe_train_are_one_thing(recipe, tmp_path):
    done = run_command("moe.train", recipe, "seed=3", f"out={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr
    assert main(["train", str(recipe), "seed=3", f"out={tmp_path / 'b'}"]) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("a", "b")
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_the_arguments_of_train_are_parsed_in_one_place():
    assert parse(["r.py", "a=1", "out=x", "b=2"]) == ("r.py", ["a=1", "b=2"], Path("x"))
    assert parse(["r.py"]) == ("r.py", [], None)
    for arguments, message in (
        ([], "a recipe is required"),
        (["r.py", "--fast"], "no option --fast"),
        (["r.py", "out=a", "out=b"], "given twice"),
        (["r.py", "out="], "names no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(arguments)


# ---------------------------------------------------------------------------------------------------- compare, report


def test_compare_passes_its_options_on(recipe, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        import_module("moe.experiments.compare"), "compare", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    options = ["--seeds", "4", "--jobs", "2", "--lr-grid", "1e-3,3e-3", "--timing-rounds", "7", "--out", str(tmp_path)]
    assert main(["compare", str(recipe), "train.steps=3", *options]) == 0
    assert isinstance(calls[0][1].pop("console"), Console)
    assert calls == [
        (
            (str(recipe),),
            {
                "overrides": ["train.steps=3"],
                "seeds": 4,
                "out": tmp_path,
                "jobs": 2,
                "lr_grid": [1e-3, 3e-3],
                "timing_rounds": 7,
                "contracts": False,
                "decompose": False,
                "tune_each": False,
                "promise": None,
            },
        )
    ]


@pytest.mark.parametrize(
    ("recipe_name", "folder"), [("recipes/smoke.py", "smoke"), ("a/b.py:wide", "b-wide"), ("x/run.json", "run")]
)
def test_a_comparison_without_a_folder_gets_one_by_its_recipe(recipe_name, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(import_module("moe.experiments.compare"), "compare", lambda *_, out, **__: calls.append(out))
    assert main(["compare", recipe_name]) == 0
    assert calls == [Path("runs") / f"{folder}-compare"]


def test_report_prints_where_the_report_is(tmp_path, monkeypatch, capsys):
    calls = []

    def build(folders, out, past):
        calls.append((folders, out, past))
        return folders[0] / "report.html"

    monkeypatch.setattr(import_module("moe.analysis.report"), "build_report", build)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert main(["report", str(tmp_path), "b", "--out", "c", "--past", "d.csv"]) == 0
    assert calls == [([tmp_path], None, None), ([tmp_path, Path("b")], Path("c"), Path("d.csv"))]


# --------------------------------------------------------------------------------------------------------- exit codes


def test_what_a_command_raises_decides_the_exit_code(capsys):
    def raising(error):
        def command():
            raise error

        return command

    assert run_main(lambda: None) == 0
    assert run_main(lambda: 3) == 3
    assert run_main(raising(ConfigError("a  rule\n\n(1): a way out"))) == 2
    assert capsys.readouterr().err == "error: a rule (1): a way out\n"
    assert run_main(raising(TrainingStopped("no"))) == 1
    assert run_main(raising(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_ctrl_c_that_nobody_catches_exits_with_130(recipe, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("moe.train"), "train", interrupted)
    assert main(["train", str(recipe)]) == 130


def test_another_rank_waits_for_rank_0_and_speaks_only_if_nobody_ended_it(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", "1")
    assert fail("no", 2) == 2
    assert waits == [(GRACE_SECONDS, "")]
    assert capsys.readouterr().err == "error: rank 1: no\n"
    monkeypatch.setenv("RANK", "0")
    assert fail("no", 2) == 2
    assert capsys.readouterr().err == "error: no\n"
    assert len(waits) == 1


@pytest.mark.full
def test_under_torchrun_rank_0_alone_says_what_is_wrong(recipe):
    for override in ("train.stepz=4", "train.micro_rows=4"):
        done = run_command("torch.distributed.run", "--nproc-per-node", 2, "-m", "moe.train", recipe, override)
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1
        assert override.split("=")[0].split(".")[1] in done.stderr


def test_help_and_mistakes_come_without_loading_torch():
    code = "import sys; from moe.cli import main; main(['--help']); main(['trian']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0
    assert "Usage: moe" in done.stdout
    assert "Did you mean 'train'" in done.stderr


def test_python_m_moe_is_the_command():
    done = run_command("moe", "routers")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base")

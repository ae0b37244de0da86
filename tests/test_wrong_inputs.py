"""Wrong commands, settings, recipes, run files, routers and data: each gives one paragraph, exit code 2, no new file.

Every case runs in this process through the entry of `moe`; those marked `process` once more as real processes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_dict

from moe.cli import main

RECIPE = """
from moe.config.load import load
from moe.config.schema import Train

def run():
    return load({plain!r})

def nothing():
    run()

def misspelt():
    return Train(stepz=3)

def divided():
    return 1 / 0
"""
ROUTER = "from moe.routers.topk import Config\n"


@dataclass(frozen=True)
class Case:
    name: str
    command: str
    """Arguments with spaces between; {run} is a valid run file."""
    says: tuple[str, ...]
    """What the message must hold: the rule, the numbers, the way out."""
    files: dict[str, bytes] = field(default_factory=dict)
    process: bool = False


def setting(name: str, overrides: str, *says: str) -> Case:
    return Case(name, f"show {{run}} {overrides}", says)


def data(name: str, files: dict[str, bytes], overrides: str, *says: str, process: bool = False) -> Case:
    path = next(iter(files), "nowhere.txt")
    return Case(name, f'train {{run}} data.sources.0.paths=["{path}"] {overrides}', says, files, process)


COMMANDS = [
    Case("no recipe", "train", ("Missing argument 'RECIPE'", "moe train --help")),
    Case("unknown command", "trian {run}", ("'trian'", "'train'")),
    Case("unknown option", "train {run} --fast", ("--fast",)),
    Case("override without value", "show {run} train.steps", ("'train.steps' must be path=value", "train.steps=100")),
    Case("override twice", "show {run} train.steps=3 train.steps=4", ("train.steps is given twice", "keep one")),
    Case("out twice", "train {run} out=a out=b", ("out is given twice (a and b)",)),
    Case("out empty", "train {run} out=", ("out= names no folder", "runs/<name>")),
    Case("out not empty", "train {run} out=full", ("out='full'", "not empty", "no run.json"), {"full/x": b"x"}),
    Case("out a file", "train {run} out=file", ("out='file'",), {"file": b"x"}),
    Case("out for show", "show {run} out=x", ("out is no setting", "moe train alone")),
    Case(
        "more than memory", "train {run} model.dim=1048576 model.num_layers=9999", ("GiB", "moe show prints the plan")
    ),
    Case("resume nothing", "resume {folder}", ("holds no run.json", "folder of a run")),
    Case("no seeds", "compare {run} --seeds 0", ("'--seeds'", "greater than or equal to 1")),
    Case("seeds in words", "compare {run} --seeds three", ("'--seeds'", "integer")),
    Case("rates in words", "compare {run} --lr-grid fast", ("--lr-grid ('fast')", "1e-3,3e-3")),
    Case("compare dense", "compare {run} model.moe=null --out cmp", ("no expert layers", "model.moe")),
    Case("report of nothing", "report {folder}", ("{folder}",)),
]

SETTINGS = [
    setting("unknown field", "train.stepz=5", "train.stepz is no setting", "did you mean steps?"),
    setting("unknown section", "trian.steps=5", "did you mean train?", "known:"),
    setting("field of another place", "lr=0.1", "there is train.optimizer.lr"),
    setting("text for a number", "train.steps=many", "an integer greater than 0", '"many"', "train.steps=1000"),
    setting("fraction for an integer", "model.dim=16.5", "model.dim must be an integer", "16.5"),
    setting("out of range", "train.optimizer.lr=-1", "greater than 0, not -1", "train.optimizer.lr=0.001"),
    setting("infinite", "train.clip_norm=Infinity", "train.clip_norm must be a number of at least 0", "Infinity"),
    setting("unknown choice", "train.precision=bf16", '"float32", "bfloat16"', '"bf16"'),
    setting("Python's True", "train.compile=True", "true or false", "train.compile=true"),
    setting("unknown router", "model.moe.router=top_k", "did you mean topk?", "expert_choice", "path/to/file.py"),
    setting("unknown router field", "model.moe.router.z_wait=1", "model.moe.router.z_wait", "did you mean z_weight?"),
    setting("dropped field", "model.moe.router=hash model.moe.router.z_weight=1", "'z_weight'", "known: ngram"),
    setting("below null", "model.moe=null model.moe.top_k=1", "model.moe is null", "model.moe={"),
    setting("below a number", "train.steps.x=1", "train.steps must be an integer", "and is 2"),
    setting("element that is not there", "data.sources.4.weight=1", "a list of 1", "from 0 to 0"),
    setting("unknown source", "data.sources.0=hubb", "did you mean hub?", "stdlib, files, hub"),
    setting("new name without its fields", "model.attention=latent", "kv_rank is required", "and 1 more"),
    setting("more experts per token than experts", "model.moe.top_k=9", "top_k (9)", "num_experts (4)", "top_k=4"),
    setting("heads", "model.attention.num_kv_heads=3", "num_heads (2)", "num_kv_heads (3)", "num_kv_heads=1 or 2"),
    setting("rotary", "model.rotary.fraction=0.3", "2.4 dimensions", "even number", "model.rotary.fraction=0.25"),
    setting("no expert layer", "model.moe.every=3", "every (3)", "2 layers", "model.moe=null"),
    setting("micro-batches", "train.micro_rows=3", "batch_rows (4)", "micro_rows (3)", "micro_rows=2"),
    setting("warm-up", "train.schedule.warmup_steps=2", "warmup_steps (2)", "train.steps (2)", "warmup_steps=0"),
    setting("decay", "train.schedule=wsd train.schedule.decay_steps=3", "plus decay_steps (3), 3", "train.steps (2)"),
    setting("vocabulary", "model.vocab_size=256", "model.vocab_size (256)", "at least 257"),
    setting("zero gradient", "model.moe.top_k=1", "gate 'selected' with top_k=1", "gate='full' or top_k=2"),
    setting("best of no evaluations", "checkpoint.keep_best=true", "evaluation.every_steps is 0", "keep_best=false"),
    setting("gate of nothing", "model.moe.shared_gate=true", "shared_hidden is 0", "shared_hidden=8"),
    setting("name with a slash", "name=a/b", "'a/b'", "folder's name"),
    Case("replay of nothing", "train {run} logging.replay_routing=nowhere", ("replay_routing", "nowhere")),
]

RECIPES = [
    Case(
        "missing recipe",
        "train recipes/smok.py",
        ("recipes/smok.py", "did you mean smoke.py?"),
        {"recipes/smoke.py": b""},
    ),
    Case("neither recipe nor run", "train notes.txt", ("'notes.txt'", "run.json", "recipes/smoke.py")),
    Case("folder of a run", "train old", ("old/run.json",), {"old/run.json": b"{}"}),
    Case("unknown variant", "show recipe.py:rum", ("no function 'rum'", "did you mean run?")),
    Case("recipe returns nothing", "show recipe.py:nothing", ("line 8", "returned NoneType", "return Run(...)")),
    Case("recipe misspells a field", "show recipe.py:misspelt", ("line 12", "'stepz'", "did you mean steps?")),
    Case("recipe fails", "show recipe.py:divided", ("line 15", "ZeroDivisionError", "recipe.py"), process=True),
    Case(
        "recipe with a syntax error",
        "show bad.py",
        ("bad.py, line 2", "SyntaxError"),
        {"bad.py": b"def run():\n  return (\n"},
    ),
    Case(
        "recipe that imports its neighbour", "show two.py", ("'neighbour'", "sys.path"), {"two.py": b"import neighbour"}
    ),
    Case("recipe without run", "show empty.py", ("no function 'run'",), {"empty.py": b"x = 1\n"}),
    Case("recipe that exits", "show exit.py", ("exit.py, line 1", "SystemExit"), {"exit.py": b"raise SystemExit(3)"}),
    Case("broken run file", "train broken.json", ("broken.json is not valid JSON",), {"broken.json": b'{"name": '}),
    Case(
        "run file of another version",
        "train v.json",
        ("schema_version 9", "reads 1"),
        {"v.json": b'{"schema_version": 9, "run": {}}'},
    ),
    Case("run file with a list", "train l.json", ("l.json must hold a run",), {"l.json": b"[]"}),
    Case("empty run file", "train e.json", ("name is required", "model is required"), {"e.json": b"{}"}),
    Case(
        "router without class",
        "show {run} model.moe.router=r.py",
        ("r.py", "no class Router"),
        {"r.py": ROUTER.encode()},
    ),
    Case("missing router file", "show {run} model.moe.router=a/r.py", ("a/r.py", "cannot be read")),
    Case("missing router module", "show {run} model.moe.router=their.router", ("their.router", "path/to/file.py")),
]

DATA = [
    data("missing data", {}, "", "'nowhere.txt' does not exist"),
    data("empty data file", {"a.txt": b" \n"}, "", "a.txt is empty", "on_bad_file", process=True),
    data("binary data file", {"a.txt": b"abc\0def"}, "", "a.txt is binary", "offset 3"),
    data("Latin-1 data file", {"a.txt": "né".encode("latin-1") * 50}, "", "a.txt is not UTF-8", "0xe9 at offset 1"),
    data("broken jsonl", {"a.jsonl": b'{"text": "x"}\n{"text": \n'}, "", "a.jsonl, line 2 is not JSON"),
    data("missing text field", {"a.jsonl": b'{"body": "x"}\n'}, "", "a.jsonl, line 1", "'text'", "body"),
    data("broken parquet", {"a.parquet": b"PAR1 no"}, "", "a.parquet cannot be read as parquet"),
    data("prompts in a text file", {"a.txt": b"text"}, "data.sources.0.prompt_field=ask", "'ask'", "a.txt"),
    data("too little data", {"a.txt": b"short"}, "", "sequence_length + 1 = 33"),
    Case("no tokenizer", "train {run} data.tokenizer=pretrained data.tokenizer.path=no.json", ("no.json",)),
]

CASES = [*COMMANDS, *SETTINGS, *RECIPES, *DATA]
HERE_ONLY = Case("a device that is not there", "train {run} train.device=cuda", ("train.device='cuda'", "'cpu'"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to stand in, with a valid run file, a recipe, and an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    plain = tiny_dict(folder)
    (folder / "run.json").write_text(json.dumps(plain))
    (folder / "recipe.py").write_text(RECIPE.format(plain=plain))
    (folder / "folder").mkdir()
    monkeypatch.chdir(folder)
    return folder


def prepared(case: Case, workplace: Path) -> tuple[list[str], set[str]]:
    """The arguments of a case, whose files are written, and what is in its workplace."""
    for name, content in case.files.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_bytes(content)
    arguments = [word.replace("{run}", "run.json").replace("{folder}", "folder") for word in case.command.split()]
    return arguments, contents(workplace)


def contents(folder: Path) -> set[str]:
    """Files and folders, without those of the data cache that are whole: prepared text, or empty folders."""
    cache = folder / "cache"
    whole = {path for done in cache.rglob("manifest.json") for path in (done.parent, *done.parent.iterdir())}
    whole |= {path for path in (cache, *cache.glob("*")) if path.is_dir()}
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path not in whole}


def check_message(case: Case, out: str, err: str) -> None:
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one paragraph"
    assert err.endswith("\n")
    assert "Traceback" not in out + err
    for part in case.says:
        assert part.replace("{folder}", "folder") in err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_gives_one_paragraph_exit_code_2_and_no_file(case, workplace, capsys):
    arguments, before = prepared(case, workplace)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    check_message(case, captured.out, captured.err)
    assert contents(workplace) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(workplace, capsys):
    test_a_mistake_gives_one_paragraph_exit_code_2_and_no_file(HERE_ONLY, workplace, capsys)


@pytest.mark.parametrize("case", [case for case in CASES if case.process], ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_in_a_real_process(case, workplace):
    arguments, before = prepared(case, workplace)
    modules: Any = ["moe.train", *arguments[1:]] if arguments[0] == "train" else ["moe", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", *modules],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2
    check_message(case, done.stdout, done.stderr)
    assert contents(workplace) == before


def test_the_unchanged_run_is_right(workplace):
    """Otherwise every case above could fail for a reason of its own."""
    assert main(["show", "run.json"]) == 0
    assert main(["show", "recipe.py"]) == 0
    assert main(["train", "run.json", "out=run"]) == 0


def test_there_are_more_than_thirty_cases():
    assert len(CASES) > 30
    assert len({case.name for case in CASES}) == len(CASES)

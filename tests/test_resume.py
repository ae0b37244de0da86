"""A run that is killed, interrupted or continued, against the run that was not: bitwise equal losses and parameters."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import torch

from moe.checkpoint import published
from moe.config.load import dump, load
from moe.errors import CheckpointError, ConfigError, TrainingStopped
from moe.metrics import JsonLines
from moe.train import resume, train
from moe.train.record import lock

HERE = Path(__file__).parent
SETTINGS = dict(
    setting.split("=")
    for setting in (
        "train.steps=24",
        "train.batch_rows=4",
        "train.micro_rows=4",
        "data.sequence_length=32",
        "checkpoint.every_steps=5",
        "evaluation.every_steps=6",
        "evaluation.rows=8",
        "evaluation.final_rows=8",
        "logging.routing_every=4",
        "logging.console=off",
        "train.threads=1",
        "model.moe.router=loss_free",
    )
)
RECIPE = str(HERE.parent / "recipes" / "smoke.py")


def overrides(*extra: str) -> list[str]:
    """The settings of the small run that is killed, with others instead of its own."""
    return [f"{key}={value}" for key, value in (SETTINGS | dict(setting.split("=") for setting in extra)).items()]


def config(*extra: str):
    """The small run that is killed."""
    return load(RECIPE, overrides(*extra))


def last_attempts(out: Path, name: str = "metrics") -> dict:
    """{step: fields that do not depend on the clock}, the last attempt of each."""
    rows = {}
    for line in (out / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = (row["step"], row.get("layer"), row.get("final"))
        clock = ("attempt", "step_seconds", "tokens_per_second", "memory_bytes")
        rows[key] = {k: v for k, v in row.items() if k not in clock}
    return rows


def parameters(out: Path) -> dict:
    """Every tensor of the newest checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(published(out)[-1].path, out / "whole.pt")
    return torch.load(out / "whole.pt")


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one."""
    items = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def assert_same_run(out: Path, reference: Path) -> None:
    """All logs and the final checkpoint agree to the last bit."""
    for name in ("metrics", "routing", "evals", "health"):
        assert last_attempts(out, name) == last_attempts(reference, name), name
    ours, theirs = flat(parameters(out)), flat(parameters(reference))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
        assert same, key


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(config(), out)


def run_and_crash(out: Path, moment: str, count: int, *arguments: str) -> None:
    command = [sys.executable, str(HERE / "crash_run.py"), moment, str(count), "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE.parent, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


SEED = 20240
MOMENTS = [
    ("step", random.Random(SEED).randint(6, 20)),
    ("write", random.Random(SEED + 1).randint(2, 60)),
    ("publish", random.Random(SEED + 2).randint(2, 3)),
]


@pytest.mark.parametrize(("moment", "count"), MOMENTS)
def test_a_killed_run_resumes_bitwise(moment, count, uninterrupted, tmp_path):
    out = tmp_path / "run"
    run_and_crash(out, moment, count, RECIPE, *overrides(), f"out={out}")
    survivors = [saved.step for saved in published(out)]
    assert survivors == sorted(survivors)
    if moment in ("write", "publish"):
        assert any(path.name.startswith(".writing-") for path in (out / "checkpoints").iterdir())
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"schema_version": 1, "attempt": 1, "step": 99, "lo')  # what a dying writer can leave
    resume(out)
    assert_same_run(out, uninterrupted)
    attempts = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert [row["attempt"] for row in attempts] == [1, 2]
    assert attempts[1]["from_step"] == (survivors[-1] if survivors else 0)
    assert not list((out / "checkpoints").glob(".writing-*"))


def test_a_killed_resume_resumes_too(uninterrupted, tmp_path):
    out = tmp_path / "run"
    run_and_crash(out, "step", 13, RECIPE, *overrides(), f"out={out}")
    run_and_crash(out, "publish", 1, "--resume", str(out))
    resume(out)
    assert_same_run(out, uninterrupted)
    assert json.loads((out / "summary.json").read_text())["tokens"] == 24 * 4 * 32


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(number, uninterrupted, tmp_path):
    """It comes twice, as from a scheduler that signals all processes and from torchrun, which hands its own on."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "moe.train", RECIPE, *overrides("checkpoint.every_steps=0"), f"out={out}"]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    os.kill(process.pid, number)
    time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    summary = json.loads((out / "summary.json").read_text())
    assert process.returncode == 0, errors
    if summary["status"] == "finished":
        pytest.skip("the run was over before the signal arrived")
    assert summary["status"] == "interrupted"
    assert [saved.step for saved in published(out)] == [summary["step"]]
    resume(out, ["checkpoint.every_steps=5"])
    assert last_attempts(out) == last_attempts(uninterrupted)


def test_checkpoints_kept_are_the_newest_and_the_best(tmp_path):
    out = train(
        config("checkpoint.keep_best=true", "checkpoint.keep_last=2", "train.optimizer.lr=0.003"), tmp_path / "run"
    )
    evals = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    best = min((row for row in evals if not row["final"]), key=lambda row: row["loss"])["step"]
    steps = [saved.step for saved in published(out)]
    assert steps == sorted({20, 24, best})


def test_a_checkpoint_with_a_missing_or_cut_file_is_named(tmp_path):
    out = train(config("train.steps=6", "checkpoint.every_steps=0"), tmp_path / "run")
    data = next((out / "checkpoints").rglob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{data.name} should have .* bytes"):
        resume(out, ["train.steps=7"])


@pytest.mark.parametrize("name", ["meta.json", ".metadata", "__0_0.distcp"])
def test_damage_at_equal_size_is_found(name, tmp_path):
    out = train(config("train.steps=6", "checkpoint.every_steps=0"), tmp_path / "run")
    (data,) = (out / "checkpoints").rglob(name)
    content = bytearray(data.read_bytes())
    content[0 if name == "meta.json" else len(content) // 2] ^= 0xFF
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is whole"):
        resume(out, ["train.steps=7"])


def test_a_second_process_is_kept_out(tmp_path):
    out = train(config("train.steps=6"), tmp_path / "run")
    with lock(out), pytest.raises(CheckpointError, match="being trained by another process"):
        resume(out, ["train.steps=7"])


def test_changed_text_is_refused(tmp_path):
    text = tiny_runs.write_corpus(tmp_path)
    settings = [f'data.sources.0={{"name": "files", "paths": ["{text}"]}}', f"data.cache_dir={tmp_path / 'cache'}"]
    run = load(RECIPE, [*overrides("train.steps=6", "evaluation.rows=2", "evaluation.final_rows=2"), *settings])
    out = train(run, tmp_path / "run")
    with text.open("a") as file:
        file.write('{"text": "one more passage that was not there before"}\n')
    with pytest.raises(CheckpointError, match="text of this run has changed"):
        resume(out, ["train.steps=7"])


def test_a_line_is_never_half_written(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", 1)
    log.write(step=1)

    class Full:
        """A disk that takes ten more bytes."""

        def __getattr__(self, name):
            return getattr(log_file, name)

        def write(self, data):
            return log_file.write(data[:10])

    log_file, log.file = log.file, Full()
    with pytest.raises(OSError, match="only in part"):
        log.write(step=2)
    log.file = log_file
    log.write(step=3)
    log.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 3]


def test_resume_refuses_another_model_and_a_missing_run(tmp_path):
    out = train(config("train.steps=6"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="model cannot change"):
        resume(out, ["model.dim=32"])
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        resume(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        train(config(), out)
    with pytest.raises(CheckpointError, match=r"past train\.steps=5"):
        resume(out, ["train.steps=5", "train.schedule.warmup_steps=0"])


def test_resume_honours_changed_optimizer_settings(tmp_path):
    out = train(config("train.steps=6"), tmp_path / "run")
    model_state = flat(parameters(resume(out, ["train.steps=7", "train.optimizer.weight_decay=0.7"])))
    assert {v for k, v in model_state.items() if k.endswith(".weight_decay")} == {0.7, 0.0}
    assert load(out / "run.json").train.optimizer.weight_decay == 0.7


def test_run_json_alone_starts_the_run_again(uninterrupted, tmp_path):
    again = train(load(uninterrupted / "run.json"), tmp_path / "again")
    assert_same_run(again, uninterrupted)
    assert dump(load(again / "run.json")) == dump(config())


def test_non_finite_steps_are_skipped_counted_and_end_the_run(tmp_path, monkeypatch):
    from moe.train import step as step_module

    real = step_module.gradient_norm
    calls = {"n": 0}

    def poisoned(model, ranks):
        calls["n"] += 1
        if calls["n"] in (3, 6, 7, 8):
            next(model.parameters()).grad.fill_(float("nan"))
        return real(model, ranks)

    monkeypatch.setattr(step_module, "gradient_norm", poisoned)
    out = tmp_path / "run"
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        train(config("train.max_nonfinite_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=20"), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False, False, True, False, False, True, True, True]
    assert [row["grad_norm"] is None for row in rows] == [row["skipped"] for row in rows], (
        "null, so that a line is JSON"
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["skipped_steps"] == 4

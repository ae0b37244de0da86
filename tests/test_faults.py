"""Faults injected into real runs of two ranks under torchrun (tests/fault_run.py): what is said, what is lost, how long it takes.

The run that nothing happened to is what a recovered one is compared with, to the last bit.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe.checkpoint import published
from moe.parallel import watch as watching
from moe.parallel.watch import Entry, Progress, Watch, explain
from moe.train import resume

HERE = Path(__file__).parent
TIMEOUT = 4
RECIPE = """
from pathlib import Path
from tiny_runs import tiny_run

def run():
    return tiny_run(Path(__file__).parent, "train.micro_rows=2", "train.steps=8", "checkpoint.every_steps=1",
                    "checkpoint.keep_last=9", "logging.console=plain", "parallel.timeout_seconds={TIMEOUT}",
                    "train.threads=1")
"""


def command(folder: Path, faults: str, *overrides: str, ranks: int = 2, restarts: int = 0) -> list[str]:
    """The command line of a run with faults in `folder`/run."""
    (folder / "recipe.py").write_text(RECIPE.replace("{TIMEOUT}", str(TIMEOUT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = [str(HERE / "fault_run.py"), faults, "--", str(folder / "recipe.py"), f"out={folder / 'run'}"]
    return [*launcher, f"--max-restarts={restarts}", *script, *overrides]


def launch(*arguments, **settings) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    line = command(*arguments, **settings)
    return subprocess.run(
        line, capture_output=True, text=True, timeout=280, cwd=HERE.parent, check=False, env=environment
    )


def times(folder: Path) -> dict[str, float]:
    """When the fault struck, and when the first step after a restart was done on every rank."""
    found: dict[str, float] = {}
    for line in (folder / "times").read_text().splitlines():
        what, moment = line.split()
        found[what] = max(found.get(what, 0.0), float(moment))
    return found


def logged(folder: Path) -> dict[int, dict]:
    """{step: last line about it in metrics.jsonl}."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """The run of two ranks without a fault."""
    folder = tmp_path_factory.mktemp("healthy")
    done = launch(folder, "none:0:0")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_recovered(folder: Path, healthy: Path, from_step: range) -> None:
    """The run was resumed from one of these steps, and ended as the one without a fault."""
    attempts = [json.loads(line) for line in (folder / "run" / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 2 and attempts[1]["from_step"] in from_step
    ours, theirs = logged(folder), logged(healthy)
    assert ours.keys() == theirs.keys()
    assert all(ours[step]["loss"] == theirs[step]["loss"] for step in theirs), "bitwise the run without a fault"
    assert [saved.step for saved in published(folder / "run")][-1] == 8


# ----------------------------------------------------------------------------------------------- faults in real processes


@pytest.mark.timeout(300)
def test_full_disk_not_a_number_and_a_hung_rank(tmp_path):
    """Three faults in one launch: rank 1's checkpoint of step 2, its gradient in step 4, and block 1 in step 6.

    Each rank holds half of the experts; what they saved before the end is whole for a single process.
    """
    done = launch(tmp_path, "full_disk:1:2,nan_gradient:1:4,sleep_layer:1:6", "parallel.expert=2")
    out, errors = " ".join(done.stdout.split()), done.stderr
    assert done.returncode == 1
    assert "the checkpoint of step 2 could not be saved (rank 1: no space left on the disk); training goes on" in out
    assert 2 not in [saved.step for saved in published(tmp_path / "run")]
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-step_00000002"))
    assert "gradient norm nan is not finite on rank 1; skipped" in out
    rows = logged(tmp_path)
    assert [step for step, row in rows.items() if row["skipped"]] == [4]
    assert list(rows) == [1, 2, 3, 4, 5]
    assert re.search(r"rank 1 has not reached all_\w+ \(moe/parallel/\w+\.py", errors)
    assert "in forward of layer 1 in step 6, where rank 0 waited" in errors
    assert "rank 1 was last seen in forward of layer 1 in step 6" in errors
    assert "time.sleep(10_000)" in errors, "the stack of the rank that hangs"
    moments = times(tmp_path)
    assert moments["ended"] - moments["sleep_layer"] < TIMEOUT + 2
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000005", ignore_errors=True)
    resume(tmp_path / "run", ["parallel.expert=1", "train.micro_rows=4"])
    again = logged(tmp_path)
    assert again[5]["attempt"] == 2 and list(again) == list(range(1, 9))
    assert abs(again[5]["loss"] / rows[5]["loss"] - 1) < 1e-5
    assert abs(again[5]["grad_norm"] / rows[5]["grad_norm"] - 1) < 1e-5


def recovery(folder: Path, fault: str, note, capsys) -> None:
    """Print the seconds from a fault to the first step that every rank has done after it."""
    moments = times(folder)
    seconds = moments["recovered"] - moments[fault]
    ended = f"; the ranks ended after {moments['ended'] - moments[fault]:.1f} s" if "ended" in moments else ""
    note(f"{fault}_seconds", round(seconds, 1))
    with capsys.disabled():
        print(f"\n{fault}: {seconds:.1f} s to the first step after it{ended}", end=" ")


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.parametrize("attempt", range(5))
def test_a_killed_rank_is_back_within_15_seconds(attempt, healthy, tmp_path, record_property, capsys):
    done = launch(tmp_path, "kill:1:6", "train.steps=8", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    # the checkpoint of step 5 may have been in writing
    assert_recovered(tmp_path, healthy, range(3, 6))
    recovery(tmp_path, "kill", record_property, capsys)
    assert times(tmp_path)["recovered"] - times(tmp_path)["kill"] < 15


LAYOUTS = {
    "one copy each": ("parallel.replicate=2", r"all_reduce"),
    "sharded": ("parallel.shard=2", r"all_reduce|foreach_all_gather|wait|all_gather"),
    "experts": ("parallel.expert=2", r"all_to_all_single|all_reduce"),
}


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hung_rank_is_named_and_the_run_goes_on(layout, tmp_path, record_property, capsys):
    override, collective = LAYOUTS[layout]
    done = launch(tmp_path, "sleep_layer:1:6", override, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stderr.splitlines() if line.startswith("error: rank 0 ends in "))
    found = re.search(r"rank 1 has not reached (\w+) \(.*\) in forward of layer 1 in step 6, where rank 0 waited", said)
    assert found and re.fullmatch(collective, found[1]), said
    moments = times(tmp_path)
    assert moments["ended"] - moments["sleep_layer"] < TIMEOUT + 2
    recovery(tmp_path, "sleep_layer", record_property, capsys)
    assert list(logged(tmp_path)) == list(range(1, 9))


@pytest.mark.full
def test_a_loss_that_is_not_a_number_on_one_rank_names_it(tmp_path):
    done = launch(tmp_path, "nan_loss:1:3", "parallel.shard=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 3: loss nan" in done.stdout and "is not finite on rank 1; skipped" in " ".join(done.stdout.split())
    assert [step for step, row in logged(tmp_path).items() if row["skipped"]] == [3]


@pytest.mark.full
def test_a_disk_that_is_full_at_the_end_fails_the_command(tmp_path):
    done = launch(tmp_path, "full_disk:1:8")
    assert done.returncode == 1
    assert "error: the checkpoint of step 8 could not be saved (rank 1: no space left on the disk)" in done.stderr
    assert [saved.step for saved in published(tmp_path / "run")] == list(range(1, 8))


@pytest.mark.full
@pytest.mark.parametrize("whom", ["one rank", "torchrun"])
def test_sigterm_saves_and_ends_every_rank(whom, healthy, tmp_path):
    faults = "terminate:1:4" if whom == "one rank" else "none:0:0"
    arguments = [tmp_path, faults, "checkpoint.every_steps=0", "train.steps=2000"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent, env=environment
    ) as process:
        if whom == "torchrun":
            deadline = time.monotonic() + 100
            log = tmp_path / "run" / "metrics.jsonl"
            while not log.exists() or log.read_bytes().count(b"\n") < 3:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted", errors[-2000:]
    assert [saved.step for saved in published(tmp_path / "run")] == [summary["step"]]
    assert whom == "torchrun" or (summary["step"], process.returncode) == (4, 0)


@pytest.mark.full
def test_a_damaged_newest_checkpoint_falls_back_under_torchrun(healthy, tmp_path):
    shutil.copytree(healthy / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000008" / "__1_0.distcp"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*launcher, "-m", "moe.train", "--resume", str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, cwd=HERE.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "__1_0.distcp has other content than was written" in said
    assert "going back to step 7, which loses 1 steps" in said
    assert_recovered(tmp_path, healthy, range(7, 8))


# ----------------------------------------------------------------------------------------------------- the watch, alone


def entry(marks: int, collective: str = "", layer: int = 3) -> Entry:
    """What a rank says in step 12."""
    return Entry(marks, 12, "forward", layer, collective, "moe/parallel/exchange.py:9 start", 1)


EXPLAINED = {
    "behind by its marks": (
        {0: entry(9, "all_reduce"), 1: entry(7, "", 2), 2: entry(9, "all_reduce")},
        "rank 1 has not reached all_reduce (moe/parallel/exchange.py:9 start) in forward of layer 3 in step 12, where "
        "ranks 0, 2 waited 5 s; rank 1 was last seen in forward of layer 2 in step 12, at moe/parallel/exchange.py:9 start",
    ),
    "at the same mark, but not waiting": (
        {0: entry(9), 1: entry(9, "all_to_all_single")},
        "rank 0 has not reached all_to_all_single (moe/parallel/exchange.py:9 start) in forward of layer 3 in step 12",
    ),
    "never heard of": ({0: entry(9, "all_reduce"), 1: None}, "rank 1 never said where it is"),
    "two of them": ({0: entry(1), 1: entry(9, "barrier"), 2: entry(2)}, "ranks 0, 2 have not reached barrier"),
    "nobody is behind": ({0: entry(9, "a"), 1: entry(9, "b")}, "none is behind the others: rank 0 is in a ("),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_the_rank_that_is_missing_is_found(case):
    entries, said = EXPLAINED[case]
    assert said in explain(entries, 5.0)


def test_only_what_takes_too_long_ends_the_process(monkeypatch, capfd):
    """Two watches in one process, rank 1 of which stands still: in a limited phase both end, in an unlimited one neither."""
    ended: list[int] = []
    monkeypatch.setattr(watching.os, "_exit", ended.append)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.02)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    busy, still = Progress(), Progress()
    still.at("saving", limited=False)
    with Watch(busy, 0, 2, 0.2, store), Watch(still, 1, 2, 0.2, store):
        for _ in range(30):
            busy.at("forward", step=1, layer=0)
            time.sleep(0.02)
        assert not ended
        still.at("forward", step=1, layer=1)
        deadline = time.monotonic() + 10
        while len(ended) < 2 and time.monotonic() < deadline:
            busy.at("forward", step=1, layer=0)
            time.sleep(0.02)
    assert ended == [watching.EXIT_CODE] * 2
    said = capfd.readouterr().err
    assert "rank 1 has not reached forward of layer 0 in step 1" in said
    assert said.count("error: rank 0 ends in") == said.count("error: rank 1 ends in") == 1


def test_blocks_tell_where_a_process_is():
    blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    progress, seen = Progress(), []
    progress.follow(blocks)
    real = progress.at
    progress.at = lambda *arguments, **named: (real(*arguments, **named), seen.append((progress.phase, progress.layer)))
    progress.at("forward", step=1)
    x = torch.ones(1, 2, requires_grad=True)
    for block in blocks:
        x = block(x)
    progress.at("backward")
    x.sum().backward()
    order = [("forward", -1), ("forward", 0), ("forward", 1), ("forward", 2)]
    assert seen == [*order, ("backward", -1), ("backward", 2), ("backward", 1), ("backward", 0)]

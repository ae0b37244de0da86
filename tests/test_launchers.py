"""The launchers in scripts/, run with stand-ins for Slurm and torchrun that record what they were asked; YAML is parsed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "scripts"
STANDINS = {
    # runs until it is told to end, as a training step does, or ends at once with the code in CODE
    "srun": 'echo "$@" > "$LOG/srun"\n[ -n "${CODE:-}" ] && exit "$CODE"\ntrap "exit 143" TERM\nwhile :; do sleep 0.05; done',
    "scancel": 'echo "$@" >> "$LOG/scancel"\npkill -TERM -P "$PPID" srun',
    "scontrol": '[ "$1" = show ] && echo node7 && exit\necho "$@" >> "$LOG/scontrol"',
    "python": 'echo "$@" > "$LOG/python"',
}


@pytest.fixture
def place(tmp_path):
    """An environment in which the stand-ins come first, and the folder of their records."""
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    out = {"OUT": str(tmp_path / "run"), "LOG": str(tmp_path), "PYTHON": "python"}
    return tmp_path, {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **slurm, **out}


def start(name: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    with open(Path(environment["LOG"]) / "said", "w") as said:
        return subprocess.Popen(["bash", str(SCRIPTS / name), *arguments], env=environment, stderr=said)


@pytest.mark.parametrize("name", ["slurm.sbatch", "launch_nodes"])
def test_bash_accepts_the_launchers(name):
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


def test_slurm_starts_one_elastic_agent_per_node(place):
    folder, environment = place
    job = start("slurm.sbatch", {**environment, "CODE": "3"}, "recipes/smoke.py", "parallel.shard=16")
    assert job.wait(20) == 3, "the run's exit code is the job's"
    line = (folder / "srun").read_text()
    for part in ("--nnodes 2", "--max-restarts 3", "--rdzv-endpoint node7:29500", "-m moe.train recipes/smoke.py"):
        assert part in line
    assert f"parallel.shard=16 out={folder / 'run'}" in line


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_saves_and_requeues_before_the_limit_and_on_preemption(place, number):
    folder, environment = place
    job = start("slurm.sbatch", environment, "recipes/smoke.py")
    until(lambda: (folder / "srun").exists())
    job.send_signal(number)
    assert job.wait(20) == 0
    assert (folder / "scancel").read_text() == "--signal=TERM 42.0\n"
    assert (folder / "scontrol").read_text() == "requeue 42\n"


def test_a_job_that_comes_back_resumes(place):
    folder, environment = place
    (folder / "run").mkdir()
    (folder / "run/run.json").write_text("{}")
    start("slurm.sbatch", {**environment, "CODE": "0"}, "recipes/smoke.py").wait(20)
    assert f"-m moe.train --resume {folder / 'run'}" in (folder / "srun").read_text()


def test_nodes_meet_at_the_head(place):
    folder, environment = place
    job = start("launch_nodes", {**environment, "HEAD": "10.0.0.1", "NODES": "2"}, "recipes/smoke.py", "seed=3")
    assert job.wait(20) == 0
    line = (folder / "python").read_text()
    assert "--nnodes 2 --nproc-per-node gpu" in line and "--rdzv-endpoint 10.0.0.1:29500" in line
    assert line.rstrip().endswith(f"-m moe.train recipes/smoke.py seed=3 out={folder / 'run'}")


@pytest.mark.parametrize("name", ["slurm.sbatch", "launch_nodes"])
def test_a_launcher_without_a_recipe_says_how_it_is_used(place, name):
    job = start(name, {key: value for key, value in place[1].items() if key != "HEAD"})
    assert job.wait(20) == 2
    assert "usage: " in (place[0] / "said").read_text()


def test_the_options_that_the_launchers_give_are_torchruns():
    from torch.distributed.run import get_args_parser

    words = "--nnodes 2 --nproc-per-node gpu --max-restarts 3 --rdzv-backend c10d --rdzv-id a --rdzv-endpoint b:1"
    options, rest = get_args_parser().parse_known_args([*words.split(), "-m", "moe.train", "recipes/smoke.py"])
    assert options.module and not rest and options.training_script == "moe.train"


def test_the_cloud_task_runs_the_launcher_on_every_node():
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text("utf-8"))
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    subprocess.run(["bash", "-n"], input=task["run"] + task["setup"], text=True, check=True)
    assert "scripts/launch_nodes" in task["run"] and (SCRIPTS / "launch_nodes").exists()
    assert task["envs"]["RECIPE"] == "recipes/olmoe_1b_7b.py"


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)

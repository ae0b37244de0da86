"""`moe train` with the triton backend on a CPU: the reference backend's losses under TRITON_INTERPRET=1, a refusal without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


FIVE_STEPS = ("train.steps=5",)


def moe_train(*overrides: str, interpret: bool) -> subprocess.CompletedProcess:
    """The smoke recipe through the command line, with or without triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "moe", "train", "recipes/smoke.py", *overrides],
        env={**environment, "TRITON_INTERPRET": "1"} if interpret else environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def losses(out: Path) -> list[float]:
    """The training loss of every step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_five_interpreted_steps_have_the_reference_backends_losses(tmp_path):
    pytest.importorskip("triton", reason="triton exists on Linux only")
    for backend in ("reference", "triton"):
        out = f"out={tmp_path / backend}"
        done = moe_train(f"model.moe.backend={backend}", *FIVE_STEPS, out, interpret=True)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, found = losses(tmp_path / "reference"), losses(tmp_path / "triton")
    assert len(expected) == len(found) == 5
    assert all(abs(a - b) <= 1e-5 for a, b in zip(found, expected, strict=True)), (found, expected)
    assert expected[0] - expected[-1] > 0.1  # the steps change something


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU it is used, and nothing is refused")
def test_a_cpu_run_without_the_interpreter_is_refused_and_the_variable_named(tmp_path):
    done = moe_train("model.moe.backend=triton", *FIVE_STEPS, f"out={tmp_path / 'run'}", interpret=False)
    assert done.returncode != 0
    assert "set TRITON_INTERPRET=1 to run the kernels in Python" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

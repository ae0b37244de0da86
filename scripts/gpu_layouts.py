"""The stage of scripts/gpu_check about several GPUs: layouts over NCCL, held to one process in float64.

It needs the packages that `moe` needs (pydantic beside torch), and two GPUs; a rehearsal compares the exchange of tokens on
two processes of the CPU instead.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_run import Check, Item, Json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1e-10
"""Largest relative difference to one process, as on gloo (tests/test_layouts.py)."""


def layouts(check: Check) -> Iterator[Item]:
    """One launch of torchrun with as many ranks as there are GPUs, 2 or 4."""
    if check.rehearse:
        yield "exchange of tokens on 2 processes", partial(_launch, 2, "exchange_cases.py")
        return
    gpus = torch.cuda.device_count()
    ranks = 4 if gpus >= 4 else 2
    if gpus < 2 or importlib.util.find_spec("pydantic") is None:
        lacks = "one GPU only" if gpus < 2 else "the package pydantic is not installed"
        yield "layouts on NCCL", lambda: {"skipped": lacks}
        return
    yield f"layouts on NCCL, {ranks} GPUs", partial(_launch, ranks, "layout_cases.py", "cuda")


def _launch(ranks: int, script: str, *arguments: str) -> Json:
    """Run a script of tests/ under torchrun; asserts that every difference it prints is below LIMIT."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths}
    command += [str(ROOT / "tests" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=480)
    assert done.returncode == 0, done.stderr[-1500:]
    found = json.loads(done.stdout)
    errors = {case: max(value.values()) if isinstance(value, dict) else value for case, value in found.items()}
    wrong = {case: error for case, error in errors.items() if not error < LIMIT}
    assert not wrong, f"{len(wrong)} of {len(errors)} cases differ from one process: {wrong}"
    return {"cases": len(errors), "worst": max(errors.values())}

"""moe/cost/totals.py, what a run is going to use, against the ledgers of real runs: FLOPs, bytes and memory within 10 %."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_run

from moe.analysis.ledger import account
from moe.backend import compiled
from moe.config.load import load
from moe.cost import memory_bytes
from moe.cost.totals import evaluation_flops, process_bytes, saves_of, tensors, totals
from moe.model import Transformer
from moe.train import train
from moe_cpu.experts import computes

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.document_mask=false",),
        ("model.moe=null", "evaluation.every_steps=1"),
        (
            "train.activation_checkpointing=true",
            "train.micro_rows=2",
            "checkpoint.every_steps=1",
            "evaluation.probe_rows=0",
        ),
    ],
)
def test_flops_and_checkpoints_of_a_run_are_what_was_planned(tmp_path, overrides):
    run = tiny_run(tmp_path, "model.dim=64", "train.steps=3", *overrides)
    spent, planned = account(train(run, tmp_path / "run")), totals(run)
    assert spent["flops"]["grade"] == "measured"
    assert planned.flops == pytest.approx(spent["flops"]["value"], rel=0.1)
    assert planned.bytes_written == pytest.approx(spent["checkpoint_bytes_written"], rel=0.1)
    assert planned.bytes_kept == pytest.approx(spent["checkpoint_bytes_kept"], rel=0.1)
    assert tensors(run.model) == len(list(Transformer(run.model).parameters()))


def test_evaluations_and_saves_are_counted_with_the_last_of_each(tmp_path):
    run = tiny_run(tmp_path, "train.steps=7", "evaluation.every_steps=3", "checkpoint.every_steps=2")
    assert saves_of(run) == 4  # after 2, 4, 6 and 7
    often, once = (tiny_run(tmp_path, "evaluation.probe_rows=0", f"train.steps={n}") for n in (7, 70))
    assert evaluation_flops(often, 1.0) == evaluation_flops(once, 1.0)


def test_kernels_of_products_in_16_bits_are_counted_until_every_row_count_has_come(tmp_path):
    # 128 tokens on 2 of 4 experts: 64 rows each on average, so up to 128 in fours are 32 counts of 7 kinds
    narrow = [
        process_bytes(tiny_run(tmp_path, "train.precision=bfloat16", f"train.steps={steps}")) for steps in (1, 10**6)
    ]
    limit = 32 * 7 * 0.65 * 2**20
    # 8 draws (2 layers of 4 experts) of 32: each is drawn with probability 1 - exp(-1/4)
    assert narrow[1] - narrow[0] == pytest.approx(limit * math.exp(-1 / 4), abs=2)


def test_compiled_kernels_need_no_masks_and_no_kernels_for_row_counts(tmp_path):
    for settings, without in ((["train.precision=float32"], "masks"), (["train.precision=bfloat16"], "")):
        run = tiny_run(tmp_path, *settings)
        less = process_bytes(run) - process_bytes(run, native=True)
        assert less > 0 and (not without or less == memory_bytes(run)[without])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a program apart")
def test_a_process_does_not_count_the_memory_of_the_one_that_started_it():
    child = "import torch; from moe.train.memory import peak_memory_bytes as peak; print(peak(torch.device('cpu')))"
    parent = (
        f"import subprocess, sys; held = b'x' * 2**31; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    found = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True, cwd=ROOT)
    assert 2**26 < int(found.stdout) < 2**30


def native(run):
    """Whether this machine computes the run with moe_cpu's kernels."""
    return compiled(run.model.backend) and computes(getattr(torch, run.train.precision))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        (
            "model.num_layers=4",
            "model.dim=256",
            "model.moe.expert_hidden=256",
            "train.batch_rows=8",
            "train.micro_rows=8",
        ),
        ("model.moe=null", "model.dim=192", "model.ffn_hidden=1024", "model.num_layers=3", "train.micro_rows=8"),
        (
            "model.dim=256",
            "model.num_layers=3",
            "train.activation_checkpointing=true",
            "train.micro_rows=4",
            "evaluation.probe_rows=0",
        ),
        ("model.dim=256", "model.num_layers=3", "model.moe.expert_hidden=384", "train.precision=bfloat16"),
    ],
)
def test_real_runs_use_what_was_planned(tmp_path, overrides):
    given = [
        "train.steps=3",
        "train.threads=1",
        "train.schedule.warmup_steps=1",
        "evaluation.final_rows=16",
        "evaluation.rows=8",
    ]
    recipe, out = str(ROOT / "recipes/smoke.py"), tmp_path / "run"
    command = [sys.executable, "-m", "moe.train", recipe, f"out={out}", *given, *overrides]
    subprocess.run(command, check=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True)
    run = load(json.loads((out / "run.json").read_text())["run"])
    spent, planned = account(out), totals(run)
    assert planned.flops == pytest.approx(spent["flops"]["value"], rel=0.1)
    assert planned.bytes_written == pytest.approx(spent["checkpoint_bytes_written"], rel=0.1)
    assert process_bytes(run, native=native(run)) == pytest.approx(spent["peak_memory_bytes"], rel=0.1)

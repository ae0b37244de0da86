"""Training with the triton backend against the reference backend, two tiny steps; tests/test_triton_training.py has more."""

import json
from pathlib import Path

from tiny_runs import tiny_run

from moe.train.loop import train


def losses(out: Path) -> list[float]:
    """The training loss of every step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_training_has_the_reference_backends_losses(tmp_path, launches):
    found = {}
    for backend in ("reference", "triton"):
        overrides = (
            f"model.moe.backend={backend}",
            "evaluation.final_rows=1",
            "train.batch_rows=2",
            "train.micro_rows=2",
        )
        found[backend] = losses(train(tiny_run(tmp_path, *overrides), tmp_path / backend))
        assert bool(launches) == (backend == "triton")
    assert len(found["triton"]) == len(found["reference"]) == 2
    assert all(abs(a - b) <= 1e-5 for a, b in zip(found["triton"], found["reference"], strict=True)), found

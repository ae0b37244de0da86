"""Evaluation and mirrors: one result in every layout, and copies that never stop a run."""

import json

import numpy as np
import pytest
import tiny_runs
import torch

from moe.config.load import known_routers, load
from moe.data import prepare
from moe.model import Transformer
from moe.parallel import Ranks
from moe.train import train
from moe.train.evaluate import evaluate
from moe.train.mirrors import Mirrors

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("router", known_routers())
def test_evaluation_does_not_depend_on_micro_rows(router, tmp_path):
    run = tiny_runs.tiny_run(tmp_path, f"model.moe.router={router}")
    corpus, model = prepare(run.data), Transformer(run.model, seed=1)
    results = [evaluate(model, corpus, ALONE, rows=4, micro_rows=micro_rows) for micro_rows in (1, 2, 4)]
    for result in results[1:]:
        assert np.allclose(result.nats_row, results[0].nats_row, rtol=1e-5)
    assert results[0].bits_per_byte == pytest.approx(
        results[0].nats_row.sum() / np.log(2) / results[0].bytes_row.sum(), rel=1e-12
    )


def test_the_final_rows_add_up_to_the_logged_loss(tmp_path):
    out = train(tiny_runs.tiny_run(tmp_path), tmp_path / "run")
    final = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()][-1]
    with np.load(out / "final_rows.npz") as rows:
        assert rows["nats_row"].sum() / rows["tokens_row"].sum() == pytest.approx(final["loss"])
        assert rows["nats_row"].sum() / np.log(2) / rows["bytes_row"].sum() == pytest.approx(final["bits_per_byte"])
        assert len(rows["nats_row"]) == final["rows"] == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(180)
def test_wandb_offline_works_without_an_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    out = train(tiny_runs.tiny_run(tmp_path, "logging.wandb=offline"), tmp_path / "run")
    assert list(out.rglob("*.wandb")), "an offline run is in the run's folder"
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"


def test_a_mirror_that_fails_is_dropped_with_a_word(tmp_path):
    said: list[str] = []
    mirrors = Mirrors(load(tiny_runs.tiny_dict(tmp_path)), tmp_path, said.append)

    def broken(row: dict, step: int) -> None:
        raise ConnectionError("no route")

    mirrors.senders["wandb"] = broken
    mirrors.send({"loss": 1.0}, 1)
    mirrors.send({"loss": 1.0}, 2)
    assert said == ["wandb is off from here: ConnectionError: no route"]

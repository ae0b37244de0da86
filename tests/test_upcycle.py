"""Upcycling against the dense model itself: the same logits, and what each method changes, unit by unit."""

import json

import pytest
import torch

from moe import checkpoint
from moe.cli import main
from moe.config.load import load
from moe.errors import CheckpointError, ConfigError
from moe.model import Transformer
from moe.surgery.start import begin_run, read_run
from moe.surgery.upcycle import Change, upcycle
from tests.tiny_runs import tiny_dict


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run with weights that matter; its FFN is 32 wide."""
    folder = tmp_path_factory.mktemp("upcycle")
    values = tiny_dict(folder)
    values["model"] |= {"moe": None, "init_std": 0.3}
    run = load(values)
    begin_run(folder / "dense", run, Transformer(run.model, seed=3).state_dict(), {})
    return folder


def target(folder, name="target", **moe) -> str:
    """A run.json with expert layers for the dense run."""
    values = tiny_dict(folder)
    settings = {"num_experts": 4, "top_k": 2, "expert_hidden": 32, "router": {"name": "topk"}}
    values["model"] |= {"init_std": 0.3, "moe": {**settings, **moe}}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return str(path)


def logits(run_folder, ids) -> torch.Tensor:
    with torch.no_grad():
        return read_run(run_folder).model()(ids).logits_BSV


IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(2))
CASES = {
    "whole copies": {},
    "halves": {"num_experts": 8, "expert_hidden": 16},
    "quarters, two replicas a token": {"num_experts": 12, "expert_hidden": 8, "top_k": 8},
    "scaled weights": {"router": {"name": "topk", "scaling_factor": 2.5}},
    "sigmoid scores and a selection bias": {"router": {"name": "loss_free"}},
    "a shared part": {"shared_hidden": 8, "expert_hidden": 24},
    "a dense layer below": {"first_dense": 1},
    "every expert": {"top_k": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_step_0_computes_what_the_dense_model_computes(case, dense, tmp_path):
    receipt = upcycle(dense / "dense", target(dense, **CASES[case]), tmp_path / "new", rows=6)
    assert abs(receipt["difference"]) <= 1e-6
    torch.testing.assert_close(logits(tmp_path / "new", IDS), logits(dense / "dense", IDS), rtol=1e-4, atol=2e-5)
    assert receipt["parameters_after"] > receipt["parameters_before"]


def test_the_command_prints_its_receipt_and_the_run_trains_on(dense, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["upcycle", str(dense / "dense"), target(dense), "--out", str(out), "--rows", "4"]) == 0
    printed = capsys.readouterr().out
    assert "difference" in printed and "e-0" in printed
    assert main(["resume", str(out)]) == 0
    saved = checkpoint.newest(out)
    assert saved is not None and saved.step == 2
    again = tmp_path / "again"
    wider = target(dense, "wider", num_experts=8, top_k=4)
    assert main(["upcycle", str(out), wider, "--out", str(again), "--rows", "4"]) == 0
    torch.testing.assert_close(logits(again, IDS), logits(out, IDS), rtol=1e-4, atol=2e-5)


def test_drop_renews_the_given_share_of_each_copys_hidden_units(dense, tmp_path):
    upcycle(dense / "dense", target(dense), tmp_path / "new", Change(method="drop", ratio=0.25), rows=4)
    old, new = read_run(dense / "dense").tensors, read_run(tmp_path / "new").tensors
    renewed = []
    for e in range(4):
        same = torch.ones(32, dtype=torch.bool)
        for mine, theirs in (("w_gate_EDF", "gate"), ("w_up_EDF", "up"), ("w_down_EFD", "down")):
            weight, expert = old[f"layers.1.ffn.{theirs}.weight"], new[f"layers.1.moe.experts.{mine}"][e]
            by_unit = (expert if theirs == "down" else expert.t()) == (weight.t() if theirs == "down" else weight)
            assert (by_unit.all(1) | ~by_unit.any(1)).all(), "a unit is renewed whole, or not at all"
            same &= by_unit.all(1)
        assert int((~same).sum()) == 8
        renewed.append(tuple(same.tolist()))
    assert len(set(renewed)) == 4, "every expert draws its own"
    gate, kept = new["layers.1.moe.experts.w_gate_EDF"], old["layers.1.ffn.gate.weight"]
    assert gate.std() == pytest.approx(float(kept.std()), rel=0.1)


def test_noise_has_the_deviation_that_was_asked_for(dense, tmp_path):
    upcycle(dense / "dense", target(dense), tmp_path / "new", Change(method="noise", noise=0.1), rows=4)
    old, new = read_run(dense / "dense").tensors, read_run(tmp_path / "new").tensors
    weight = old["layers.0.ffn.up.weight"].t()
    change = new["layers.0.moe.experts.w_up_EDF"] - weight
    assert float(change.std() / weight.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(change[0], change[1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"router": {"name": "topk", "gate": "full"}}, "router 'topk' sum"),
        ({"expert_hidden": 12}, "multiple of expert_hidden"),
        ({"expert_hidden": 16, "num_experts": 5}, r"num_experts \(5\) must be a multiple of the 2"),
        ({"expert_hidden": 16, "num_experts": 8, "top_k": 3}, r"top_k \(3\) must be a multiple"),
        ({"latent_dim": 8}, "latent_dim=8"),
    ],
)
def test_what_a_copy_cannot_be_made_of_is_refused(changes, says, dense, tmp_path):
    with pytest.raises(ConfigError, match=says):
        upcycle(dense / "dense", target(dense, "refused", **changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_growing_with_the_same_top_k_is_no_copy(dense, tmp_path):
    upcycle(dense / "dense", target(dense), tmp_path / "a", Change(method="noise", noise=0.5), rows=4)
    wider = target(dense, "wider-same-k", num_experts=8)
    with pytest.raises(CheckpointError, match="top_k must grow alike"):
        upcycle(tmp_path / "a", wider, tmp_path / "b", rows=4)
    assert not (tmp_path / "b").exists()
    receipt = upcycle(tmp_path / "a", wider, tmp_path / "b", Change(method="noise"), rows=4)
    assert receipt["difference"] != 0
    with pytest.raises(ConfigError, match="num_experts=8"):
        upcycle(tmp_path / "a", target(dense, "odd", num_experts=6), tmp_path / "c", rows=4)
    other = tiny_dict(dense)
    other["model"]["dim"] = 32
    path = dense / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="dim: 16 there, 32"):
        upcycle(dense / "dense", str(path), tmp_path / "c")

"""moe/muon.py against singular value decompositions in float64, torch.optim.Muon and torch.optim.AdamW, expert by expert."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny_run
from torch import nn

from moe.checkpoint import newest
from moe.checkpoint.state import read_tensors, stored_names
from moe.config.load import load
from moe.config.schema import AdamW, GroupedQueryAttention, Model, MoE, Muon
from moe.cost import memory_bytes
from moe.errors import ConfigError
from moe.model import Transformer
from moe.muon import COEFFICIENTS, orthogonalised
from moe.optim import build_optimizer
from moe.routers.topk import Config as TopK
from moe.train import resume, train

MODEL = Model(
    vocab_size=20,
    dim=8,
    num_layers=2,
    ffn_hidden=12,
    attention=GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4, qkv_bias=True),
    moe=MoE(num_experts=3, top_k=2, expert_hidden=4, router=TopK(), first_dense=1),
)
CONFIG = Muon(lr=0.05, momentum=0.9, weight_decay=0.2)


def by_decomposition(matrix, iterations: int):
    """U·p(p(...p(S/|S|)))·Vᵀ: the iterations act on singular values alone."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1)])
def test_iterations_act_on_singular_values_alone(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(orthogonalised(matrix, 5), by_decomposition(matrix, 5), rtol=0, atol=1e-10)


def test_singular_values_come_near_one():
    matrix = torch.randn(16, 24, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalised(matrix, 5))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.linalg.svdvals(matrix / matrix.norm()).min() < 0.1, "where they were not"
    assert (orthogonalised(torch.zeros(2, 3), 5) == 0).all()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [torch.randn_like(p) for p in model.parameters()]


def give(model: nn.Module, values: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.grad = value.clone()


def test_a_matrix_follows_the_equations_in_float64():
    model = nn.Linear(6, 4, bias=False).double()
    optimizer, average = build_optimizer(model, CONFIG), torch.zeros(4, 6, dtype=torch.float64)
    expected = model.weight.detach().clone()
    for _ in range(3):
        values = gradients(model)
        give(model, values)
        optimizer.step()
        average = 0.9 * average + 0.1 * values[0]
        update = by_decomposition(0.1 * values[0] + 0.9 * average, 5)
        expected = expected * (1 - 0.05 * 0.2) - 0.05 * 0.2 * math.sqrt(6) * update
        torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-10)


def test_a_matrix_moves_as_with_torchs_muon():
    """Theirs iterates in bfloat16: an update of root mean square 0.2 agrees to a few hundredths of it."""
    mine, theirs = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    theirs.load_state_dict(mine.state_dict())
    first = mine.weight.detach().clone()
    optimizers = [
        build_optimizer(mine, CONFIG),
        torch.optim.Muon(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        values = gradients(mine)
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            give(model, values)
            optimizer.step()
    moved = (mine.weight - first).detach()
    assert (mine.weight - theirs.weight).detach().norm() < 0.03 * moved.norm()
    assert moved.norm() > 0.1


@pytest.mark.parametrize("widths", [(), (2, 4, 6)])
def test_every_expert_is_a_matrix_of_its_own(widths):
    assert MODEL.moe is not None
    config = replace(MODEL, moe=replace(MODEL.moe, expert_widths=widths))
    model = Transformer(config).double()
    experts = model.layers[1].moe.experts
    optimizer = build_optimizer(model, replace(CONFIG, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    give(model, gradients(model))
    optimizer.step()
    for name, parameter in experts.named_parameters():
        pieces = [t.split(list(widths)) if widths else t for t in (before[name], parameter.detach(), parameter.grad)]
        assert len(list(pieces[0])) == 3
        for old, new, gradient in zip(*pieces, strict=True):
            update = by_decomposition(gradient, 5) * 0.2 * math.sqrt(max(old.shape))
            torch.testing.assert_close(new, old - 0.05 * update, rtol=0, atol=1e-10)


def test_the_rest_moves_as_with_torchs_adamw():
    mine, theirs = Transformer(MODEL), Transformer(MODEL)
    optimizer = build_optimizer(mine, CONFIG)
    reference = build_optimizer(theirs, AdamW(lr=0.05, weight_decay=0.2))
    names = [name for name, _ in mine.named_parameters()]
    by_muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    rest = {name for name, p in mine.named_parameters() if id(p) not in by_muon}
    assert {name for name in names if "router" in name or "norm" in name or "bias" in name} <= rest
    assert {"embedding.weight", "head.weight"} <= rest
    assert {name.split(".", 2)[2] for name in set(names) - rest if name.startswith("layers.1.")} == {
        *(
            f"attention.{part}.weight"
            for part in ("query", "key", "value", "out")
            if f"layers.1.attention.{part}.weight" in names
        ),
        *(f"moe.experts.{part}" for part in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")),
    }
    for _ in range(2):
        values = gradients(mine)
        give(mine, values)
        give(theirs, values)
        optimizer.step()
        reference.step()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) == (name in rest), name


def weights(out):
    saved = newest(out)
    assert saved is not None
    return read_tensors(saved, stored_names(saved))


def test_a_run_with_muon_resumes_as_if_it_had_not_stopped(tmp_path):
    settings = ["train.optimizer=muon", "train.schedule.final_fraction=1.0"]
    whole = weights(train(tiny_run(tmp_path, *settings, "train.steps=4"), tmp_path / "whole"))
    train(tiny_run(tmp_path, *settings, "train.steps=2"), tmp_path / "halves")
    halves = weights(resume(tmp_path / "halves", ["train.steps=4"]))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_muon_keeps_one_average_of_a_matrix(tmp_path):
    run = load(tiny_run(tmp_path))
    with_muon = load(run, ["train.optimizer=muon"])
    model = Transformer(run.model)
    optimizer = build_optimizer(model, with_muon.train.optimizer)
    give(model, gradients(model))
    optimizer.step()
    kept = sum(t.numel() * 4 for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert memory_bytes(with_muon)["optimizer"] == kept < memory_bytes(run)["optimizer"]


def test_muon_refuses_matrices_that_are_cut(tmp_path):
    cut = ["train.optimizer=muon", "parallel.shard=2", "train.batch_rows=4", "train.micro_rows=2"]
    with pytest.raises(ConfigError, match=r"'muon' updates whole matrices, and parallel\.shard \(2\) cuts them: use"):
        load(tiny_run(tmp_path), cut)

"""Schedules against their definitions, AdamW against its equations written out, groups and clipping against sums by hand."""

import math
from itertools import pairwise

import pytest
import torch

from moe.config.rates import learning_rate
from moe.config.schema import AdamW, Cosine, GroupedQueryAttention, Model, MoE, Wsd
from moe.model import Transformer
from moe.optim import build_optimizer, clip, gradient_norm, parameter_groups
from moe.parallel import Ranks
from moe.routers.loss_free import Config as LossFree

ALONE = Ranks(0, 1, torch.device("cpu"))

MODEL = Model(
    vocab_size=20,
    dim=8,
    num_layers=2,
    ffn_hidden=8,
    attention=GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4, qkv_bias=True, qk_norm="head", sinks=True),
    moe=MoE(num_experts=2, top_k=2, expert_hidden=8, router=LossFree(), first_dense=1),
)


def test_cosine_schedule():
    schedule = Cosine(warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(schedule, 2.0, step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[14] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[4:]))


def test_wsd_schedule():
    schedule = Wsd(warmup_steps=2, decay_steps=4, final_fraction=0.0)
    rates = [learning_rate(schedule, 1.0, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", [Cosine(), Wsd(decay_steps=1), Cosine(warmup_steps=1)])
def test_schedules_of_very_short_runs(schedule):
    for steps in (1, 2, 3):
        rates = [learning_rate(schedule, 1.0, step, steps) for step in range(steps)]
        assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates)


def test_only_matrices_decay_and_every_parameter_is_in_one_group():
    model = Transformer(MODEL)
    decayed, plain = parameter_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    without = {names[id(p)] for p in plain["params"]}
    assert "embedding.weight" in without
    assert all("norm" in n or "bias" in n or "sink" in n or n == "embedding.weight" for n in without)
    assert "head.weight" in {names[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert "layers.1.moe.router.bias_E" not in names.values()


def test_adamw_follows_its_equations():
    """Loshchilov & Hutter 2019, algorithm 2, with bias correction."""
    model = torch.nn.Linear(3, 2).double()
    config = AdamW(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    expected = model.weight.detach().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 5):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2, dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        expected = expected - 0.1 * (update + 0.2 * expected)
        assert torch.allclose(model.weight, expected, atol=1e-12)


def test_clipping_scales_the_norm_over_all_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = gradient_norm(model, ALONE)
    assert norm.item() == pytest.approx(2 * math.sqrt(9))
    clip(model, norm, 0.0)
    assert gradient_norm(model, ALONE).item() == pytest.approx(6.0)
    clip(model, norm, 1.5)
    assert gradient_norm(model, ALONE).item() == pytest.approx(1.5, rel=1e-5)
    clip(model, gradient_norm(model, ALONE), 100.0)
    assert gradient_norm(model, ALONE).item() == pytest.approx(1.5, rel=1e-5)

"""Values of routing that have a closed form, to 1e-6: gates and losses of z = (2, 1, 0, -1), fixtures of load, identities.

Numbers were worked out apart from this project; where others' code computes the same (transformers, numpy), it is called. The
identities of routers with each other are in test_router_values.py, balancing speed in test_balancing_speed.py, causality,
relabelling and finite differences of every router in test_routers.py, those of estimators in test_router_estimators.py.
"""

import math

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe.balance import balance_loss, capacity_of, z_loss
from moe.config.load import resolve_router
from moe.config.schema import Balance, MoE
from moe.metrics import routing_row
from moe.moe_layer import MoELayer
from moe.routers._gates import gate
from moe.routers._scores import scores
from moe.routers.noisy_topk import variation_squared
from moe.routing import Tokens, apply_capacity

Z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
TOP2 = torch.tensor([[0, 1]])
SHARES = (0.643914, 0.236883, 0.087144, 0.032059)
LSE = 2.4401897


def tokens_of(B: int, S: int) -> Tokens:
    return Tokens.of(torch.zeros(B, S, dtype=torch.int64))


def balance_of(share: torch.Tensor, expert_TK: torch.Tensor, scope: str = "global") -> float:
    T, K = expert_TK.shape
    token_R = torch.arange(T).repeat_interleave(K)
    return balance_loss(share, expert_TK.flatten(), token_R, tokens_of(1, T), Balance(scope=scope), 0).value.item()


def row_of(counts: list[int]) -> dict:
    """The logged fields of one layer with these loads; scores play no part in what is read here."""
    E = len(counts)
    fields = dict.fromkeys(
        ("entropy_sum", "margin_sum", "logit_square_sum", "lse_square_sum", "logit_max"), np.array(1.0)
    )
    loads = {"counts_E": np.array(counts), "kept_E": np.array(counts)}
    return routing_row({**fields, **loads, "token_sum": np.array(8.0), "share_sum_E": np.full(E, 8.0 / E)})


def variation_of(counts: list[int]) -> float:
    """Coefficient of variation of loads, by the function that the importance loss uses."""
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return (
        variation_squared(torch.eye(len(counts), dtype=torch.float64)[chosen], tokens_of(1, len(chosen))).sqrt().item()
    )


def test_shares_and_losses_of_one_token():
    assert scores("softmax", Z)[0].tolist() == pytest.approx(SHARES, abs=1e-6)
    assert torch.logsumexp(Z, 1).item() == pytest.approx(LSE, abs=1e-6)
    leaf = Z.clone().requires_grad_()
    loss = z_loss(leaf, tokens_of(1, 1), 1.0).value
    assert loss.item() == pytest.approx(5.9545258, abs=1e-6)
    loss.backward()
    exact = [
        2 * math.log(sum(map(math.exp, (2, 1, 0, -1)))) * math.exp(z) / sum(map(math.exp, (2, 1, 0, -1)))
        for z in (2, 1, 0, -1)
    ]
    assert leaf.grad[0].tolist() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "full", "selected"),
    [
        ("softmax", (0.643914, 0.236883), (0.731059, 0.268941)),
        ("sigmoid", (0.880797, 0.731059), (0.546449, 0.453551)),
        ("sqrt_softplus", (1.458399, 1.145976), (0.559980, 0.440020)),
    ],
)
def test_gates_of_the_two_best(kind, full, selected):
    assert gate(scores(kind, Z), TOP2, normalize=False)[0].tolist() == pytest.approx(full, abs=1e-6)
    assert gate(scores(kind, Z), TOP2, normalize=True)[0].tolist() == pytest.approx(selected, abs=1e-6)


def test_softmax_of_the_chosen_is_the_renormalised_softmax_for_any_logits():
    z = torch.randn(50, 8, dtype=torch.float64)
    best = z.topk(3, dim=1)
    assert torch.allclose(gate(z.softmax(1), best.indices, normalize=True), best.values.softmax(1), atol=1e-14)


def test_one_normalised_expert_leaves_the_router_without_gradient():
    leaf = Z.clone().requires_grad_()
    gate(leaf.softmax(1), torch.tensor([[0]]), normalize=True).sum().backward()
    assert leaf.grad.abs().max().item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_balance_is_one_here_and_k_in_transformers(K):
    expert_TK = torch.stack([(torch.arange(K) + t) % 4 for t in range(8)])
    assert balance_of(torch.full((8, 4), 0.25, dtype=torch.float64), expert_TK) == pytest.approx(1.0, abs=1e-6)
    # their top-k of the logits must be balanced too: a hint so small that the softmax stays flat
    logits = torch.zeros(8, 4).scatter(1, expert_TK, 1e-6)
    assert float(load_balancing_loss_func((logits,), 4, K)) == pytest.approx(K, abs=1e-5)


def test_balance_at_collapse_its_bound_and_below_one():
    all_to_first = torch.zeros(8, 1, dtype=torch.int64)
    share = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64).expand(8, 4)
    assert balance_of(share, all_to_first) == pytest.approx(2.8, abs=1e-6)
    sure = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(8, 4)
    assert balance_of(sure, all_to_first) == pytest.approx(4.0, abs=1e-6)
    against = torch.tensor([0.1, 0.3, 0.3, 0.3], dtype=torch.float64).expand(8, 4)
    assert balance_of(against, all_to_first) == pytest.approx(0.4, abs=1e-6)


def test_loads_of_four_two_one_one():
    row = row_of([4, 2, 1, 1])
    assert row["max_vio"] == pytest.approx(1.0, abs=1e-6)
    assert row["load_entropy"] == pytest.approx(0.875, abs=1e-6)
    assert row["load_cv"] == pytest.approx(0.6123724, abs=1e-6)
    assert variation_of([4, 2, 1, 1]) == pytest.approx(0.6123724, abs=1e-6)


@pytest.mark.parametrize(("E", "k"), [(8, 2), (8, 1), (64, 8)])
def test_total_collapse_onto_k_experts(E, k):
    row = row_of([60] * k + [0] * (E - k))
    assert row["max_vio"] == pytest.approx(E / k - 1, abs=1e-6)
    assert row["load_cv"] == pytest.approx(math.sqrt((E - k) / k), abs=1e-6)
    assert variation_of([60] * k + [0] * (E - k)) == pytest.approx(math.sqrt((E - k) / k), abs=1e-6)
    assert row["effective_experts"] == pytest.approx(k, abs=1e-6)


@pytest.mark.parametrize("name", ["topk", "deepseek_v2", "loss_free"])
def test_with_all_experts_chosen_the_balance_loss_is_constant_and_the_output_dense(name):
    config = resolve_router(name).Config(balance=Balance(weight=1.0, scope="sequence"))
    layer = MoELayer(
        MoE(num_experts=4, top_k=4, expert_hidden=6, router=config, backend="reference"), 8, layer=0
    ).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y, routing = layer(x)
    loss = routing.losses["balance"].value
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, layer.router.weight_ED)
    assert gradient.abs().max().item() == pytest.approx(0, abs=1e-12)
    z = x.flatten(0, 1) @ layer.router.weight_ED.t()
    score = z.sigmoid() / z.sigmoid().sum(1, keepdim=True) if name == "loss_free" else z.softmax(1)
    w = layer.experts
    dense = sum(
        score[:, e : e + 1]
        * (
            (torch.nn.functional.silu(x.flatten(0, 1) @ w.w_gate_EDF[e]) * (x.flatten(0, 1) @ w.w_up_EDF[e]))
            @ w.w_down_EFD[e]
        )
        for e in range(4)
    )
    assert torch.allclose(y.flatten(0, 1), dense, atol=1e-12)


def test_a_selection_bias_is_in_no_gate_and_in_no_gradient():
    module = resolve_router("loss_free")
    config = module.Config(normalize=False, balance=Balance(weight=0.0))
    x = torch.randn(30, 6, dtype=torch.float64)
    seen = []
    for shift in (0.0, 0.3):
        router = module.Router(config, dim=6, num_experts=6, top_k=6, layer=0, seed=0).double()
        with torch.no_grad():
            router.weight_ED.copy_(torch.eye(6))
            router.bias_E.copy_(shift * torch.randn(6, generator=torch.Generator().manual_seed(1)))
        routing = router(x, tokens_of(3, 10))
        weight_TE = torch.zeros(30, 7, dtype=torch.float64).index_put(
            (routing.token_R, routing.expert_R), routing.weight_R
        )
        (gradient,) = torch.autograd.grad((weight_TE * torch.arange(7)).sum(), router.weight_ED)
        seen.append((weight_TE.detach(), gradient))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-14)
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-12)


def test_capacity_drops_what_exceeds_it_in_each_row():
    B, S, E, K = 3, 40, 4, 2
    expert_TK = torch.randint(0, E, (B * S, K), generator=torch.Generator().manual_seed(2))
    capacity = capacity_of(0.8, S, K, E)
    assert capacity == math.ceil(0.8 * K * S / E)
    kept = apply_capacity(expert_TK, tokens_of(B, S), E, capacity)
    counts = torch.stack([torch.bincount(row.flatten(), minlength=E) for row in expert_TK.view(B, S, K)])
    assert (kept == E).sum() == (counts - capacity).clamp(min=0).sum() > 0


def test_gates_that_are_not_renormalised_sum_to_less_than_one():
    assert gate(scores("softmax", Z), TOP2, normalize=False).sum().item() == pytest.approx(0.880797, abs=1e-6)

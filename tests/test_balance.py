"""Balance loss, z-loss, load-free bias and routing statistics against values worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe.balance import balance_loss, capacity_of, z_loss
from moe.config.schema import Balance
from moe.metrics import max_vio_floor, routing_row
from moe.routers import loss_free, topk
from moe.routers._gates import gate
from moe.routing import Tokens, apply_capacity

Z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
P = (0.643914, 0.236883, 0.087144, 0.032059)  # exp(z) / (e² + e + 1 + 1/e)
LOGSUMEXP = 2.4401897


def tokens_of(B: int, S: int) -> Tokens:
    return Tokens.of(torch.zeros(B, S, dtype=torch.int64))


def rows(expert_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_R and token_R of a choice."""
    T, K = expert_TK.shape
    return expert_TK.flatten(), torch.arange(T).repeat_interleave(K)


@pytest.mark.parametrize("scope", ["sequence", "global", "micro_batch"])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_balance_loss_is_one_at_perfect_balance(scope, K):
    expert_TK = torch.stack([(torch.arange(K) + t) % 4 for t in range(8)])
    share = torch.full((8, 4), 0.25, dtype=torch.float64)
    loss = balance_loss(share, *rows(expert_TK), tokens_of(2, 4), Balance(weight=0.5, scope=scope), 0)
    assert loss.value.item() == pytest.approx(1.0)
    assert loss.weight == 0.5


def test_balance_loss_at_full_collapse_is_E_times_the_score():
    share = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64).expand(8, 4)
    expert_TK = torch.zeros(8, 1, dtype=torch.int64)
    loss = balance_loss(share, *rows(expert_TK), tokens_of(1, 8), Balance(), 0)
    assert loss.value.item() == pytest.approx(2.8)


def test_sequence_scope_sees_what_global_scope_does_not():
    """Each row is one expert's own: balanced over the batch, collapsed within every row."""
    expert_TK = torch.arange(4).repeat_interleave(3).unsqueeze(1)
    share = torch.nn.functional.one_hot(expert_TK[:, 0], 4).double()
    values = {
        scope: balance_loss(share, *rows(expert_TK), tokens_of(4, 3), Balance(scope=scope), 0).value.item()
        for scope in ("sequence", "global")
    }
    assert values["global"] == pytest.approx(1.0)
    assert values["sequence"] == pytest.approx(4.0)


def test_balance_loss_can_be_below_one():
    share = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    loss = balance_loss(share, torch.tensor([0]), torch.tensor([0]), tokens_of(1, 1), Balance(), 0)
    assert loss.value.item() == pytest.approx(0.2)


def test_micro_batch_scope_differs_by_the_documented_formula():
    """From `global` by E·Σ_m (T_m/T)·Σ_e (f_me - f_e)·P_me over micro-batches m, value and gradient (docs/routers.md)."""
    torch.manual_seed(1)
    score, expert_TK = torch.rand(12, 3, dtype=torch.float64), torch.randint(0, 3, (12, 1))
    halves = (slice(0, 4), slice(4, 12))
    f_E = torch.bincount(expert_TK[:, 0], minlength=3).double() / 12
    values, gradients = {}, {}
    for scope in ("micro_batch", "global", "by hand"):
        leaf = score.clone().requires_grad_()
        share, total = leaf.softmax(1), torch.zeros((), dtype=torch.float64)
        for half in halves:
            n = half.stop - half.start
            counts = torch.bincount(expert_TK[:, 0], minlength=3).unsqueeze(0)
            tokens = replace(tokens_of(1, n), step_tokens=torch.tensor(12.0), step_counts_LE=counts)
            if scope == "by hand":
                f_mE = torch.bincount(expert_TK[half, 0], minlength=3).double() / n
                total = total + 3 * n / 12 * ((f_mE - f_E) * share[half].mean(0)).sum()
            else:
                total = total + balance_loss(share[half], *rows(expert_TK[half]), tokens, Balance(scope=scope), 0).value
        values[scope] = total.item()
        (gradients[scope],) = torch.autograd.grad(total, leaf)
    assert abs(values["by hand"]) > 1e-3
    assert values["micro_batch"] - values["global"] == pytest.approx(values["by hand"], abs=1e-12)
    assert torch.allclose(gradients["micro_batch"] - gradients["global"], gradients["by hand"], atol=1e-12)


def test_z_loss_and_its_gradient():
    logits = Z.clone().requires_grad_()
    loss = z_loss(logits, tokens_of(1, 1), 1.0)
    loss.value.backward()
    assert loss.value.item() == pytest.approx(5.9545258, rel=1e-7)
    assert logits.grad[0].tolist() == pytest.approx([2 * LOGSUMEXP * p for p in P], rel=2e-5)


def test_a_loss_of_weight_zero_is_reported_without_gradient():
    logits = Z.clone().requires_grad_()
    assert not z_loss(logits, tokens_of(1, 1), 0.0).value.requires_grad
    loss = balance_loss(
        logits.softmax(1), torch.tensor([0]), torch.tensor([0]), tokens_of(1, 1), Balance(weight=0.0), 0
    )
    assert not loss.value.requires_grad
    assert loss.value.item() == pytest.approx(4 * P[0], rel=1e-5)


def router_of(module, config, weight=None):
    """A router over 4 experts and inputs of width 4 whose logits are its input."""
    router = module.Router(config, dim=4, num_experts=4, top_k=2, layer=0, seed=0).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4) if weight is None else weight)
    return router.eval()


def test_softmax_of_the_chosen_is_the_renormalised_softmax():
    """Mixtral's gate is Qwen3's with norm_topk_prob."""
    routing = router_of(topk, topk.Config(gate="selected"))(Z, tokens_of(1, 1))
    assert routing.expert_R.tolist() == [0, 1]
    assert routing.weight_R.tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert routing.weight_R.tolist() == pytest.approx(Z[0, :2].softmax(0).tolist())
    full = router_of(topk, topk.Config(gate="full"))(Z, tokens_of(1, 1))
    assert full.weight_R.tolist() == pytest.approx(P[:2], abs=1e-6)


def test_sigmoid_gates():
    routing = router_of(loss_free, loss_free.Config())(Z, tokens_of(1, 1))
    assert routing.weight_R.tolist() == pytest.approx([0.546449, 0.453551], abs=1e-6)
    plain = router_of(loss_free, loss_free.Config(normalize=False, scaling_factor=2.5))(Z, tokens_of(1, 1))
    assert plain.weight_R.tolist() == pytest.approx([2.5 * 0.880797, 2.5 * 0.731059], abs=3e-6)


def test_one_chosen_expert_with_normalised_weights_gives_the_router_no_gradient():
    scores = Z.clone().requires_grad_()
    gate(scores.softmax(1), torch.tensor([[0]]), normalize=True).sum().backward()
    assert scores.grad.abs().max().item() < 1e-15


def test_selection_bias_chooses_and_never_weighs():
    router = router_of(loss_free, loss_free.Config(normalize=False))
    router.bias_E.copy_(torch.tensor([-5.0, 0.0, 0.0, 5.0]))
    logits = Z.clone().requires_grad_()
    routing = router(logits, tokens_of(1, 1))
    assert sorted(routing.expert_R.tolist()) == [1, 3]
    weights = dict(zip(routing.expert_R.tolist(), routing.weight_R.tolist(), strict=True))
    assert weights == pytest.approx({1: 0.731059, 3: 0.268941}, abs=1e-6)
    assert "bias_E" not in dict(router.named_parameters())
    router.bias_E += 3.0
    assert router(Z, tokens_of(1, 1)).expert_R.tolist() == routing.expert_R.tolist(), "a common shift changes nothing"


def test_bias_moves_by_its_rate_against_the_load():
    router = router_of(loss_free, loss_free.Config(bias_rate=0.001))
    router.update({"counts_E": torch.tensor([8, 2, 2, 4])})
    assert router.bias_E.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.0])


def test_capacity_rounds_up_and_keeps_the_first():
    assert capacity_of(1.25, 10, 2, 8) == math.ceil(1.25 * 20 / 8) == 4
    assert capacity_of(0.01, 10, 2, 8) == 1
    expert_TK = torch.tensor([[0], [0], [1], [0], [0], [0]])
    kept = apply_capacity(expert_TK, tokens_of(2, 3), 2, 1)
    assert kept.flatten().tolist() == [0, 2, 1, 0, 2, 2]


def statistics(counts: list[int], kept: list[int] | None = None) -> dict[str, np.ndarray]:
    """What a layer reports for these loads, with two tokens of entropy ln 2 each."""
    return {
        "counts_E": np.array(counts),
        "kept_E": np.array(kept or counts),
        "entropy_sum": np.array(2 * math.log(2)),
        "margin_sum": np.array(0.5),
        "token_sum": np.array(2.0),
        "share_sum_E": np.full(len(counts), 2.0 / len(counts)),
        "logit_square_sum": np.array(8.0),
        "lse_square_sum": np.array(2.0),
        "logit_max": np.array(3.0),
    }


def test_routing_row_of_known_loads():
    row = routing_row(statistics([4, 2, 1, 1], kept=[3, 2, 1, 1]))
    assert row["max_vio"] == pytest.approx(1.0)
    assert row["load_entropy"] == pytest.approx(0.875)
    assert row["effective_experts"] == pytest.approx(2**1.75)
    assert row["drop_rate"] == pytest.approx(1 / 8)
    assert row["router_entropy"] == pytest.approx(0.5)
    assert row["margin"] == pytest.approx(0.25)
    assert row["logit_max"] == 3.0
    assert row["dead_experts"] == 0


def test_routing_row_of_total_collapse():
    row = routing_row(statistics([50, 50, 0, 0, 0, 0, 0, 0]))
    assert row["max_vio"] == pytest.approx(8 / 2 - 1)
    assert row["dead_experts"] == 6
    assert row["effective_experts"] == pytest.approx(2)


def test_routing_row_without_tokens():
    row = routing_row(statistics([0, 0, 0, 0]))
    assert row["max_vio"] == row["drop_rate"] == 0.0


@pytest.mark.parametrize(("E", "rows"), [(2, 1000), (8, 1024), (64, 8192), (64, 32768), (256, 4096), (7, 200)])
def test_noise_floor_is_what_a_perfect_router_shows(E, rows):
    draws = np.random.default_rng(0).multinomial(rows, [1 / E] * E, size=2000)
    measured = (draws.max(1) * E / rows - 1).mean()
    assert max_vio_floor(E, rows) == pytest.approx(measured, rel=0.06)

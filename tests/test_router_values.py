"""Each router against values worked out by hand, brute force, numpy, or another router that must be the same.

The input z = (2, 1, 0, -1) with E = 4 and K = 2 has softmax (.643914, .236883, .087144, .032059).
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.routers import (
    base,
    deepseek_v2,
    expert_threshold,
    frozen_random,
    gpt_oss,
    gshard,
    llama4,
    longcat,
    loss_free,
    moe_plus_plus,
    noisy_topk,
    quantile,
    quantile_batch,
    remoe,
    simbal,
    sinkhorn,
    smebu,
    st_moe,
    switch,
    top_p,
    topk,
)
from moe.routers import hash as hash_router
from moe.routers._bias import BINS, histogram, upper_quantile
from moe.routers._select import limit_groups, sinkhorn_plan
from moe.routing import Routing, Tokens

Z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
P = (0.643914, 0.236883, 0.087144, 0.032059)


def tokens_of(B: int, S: int, step: int = 0) -> Tokens:
    return Tokens.of(torch.zeros(B, S, dtype=torch.int64), step=step)


def router_of(module, config=None, E: int = 4, K: int = 2):
    """A float64 router in evaluation mode whose logits are its input."""
    router = module.Router(config or module.Config(), dim=E, num_experts=E, top_k=K, layer=0, seed=0).double()
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            parameter.copy_(torch.eye(E)) if name == "weight_ED" else parameter.zero_()
    return router.eval()


def routed(module, config=None, z: Tensor = Z, K: int = 2) -> Routing:
    return router_of(module, config, z.shape[1], K)(z, tokens_of(1, len(z)))


def random_logits(T: int = 24, E: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def max_vio(counts: Tensor) -> float:
    return (counts.max() / counts.double().mean() - 1).item()


# ---------------------------------------------------------------------------------------- routers that are the same


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((gpt_oss, None), (topk, topk.Config())),
        ((st_moe, st_moe.Config(eval_capacity_factor=0.0)), (topk, topk.Config())),
        ((gshard, gshard.Config(capacity_factor=0.0)), (topk, topk.Config())),
        ((simbal, None), (topk, topk.Config())),
        ((noisy_topk, None), (topk, topk.Config())),
        ((deepseek_v2, None), (topk, topk.Config(gate="full"))),
        ((switch, switch.Config(capacity_factor=0.0)), (topk, topk.Config(gate="full"))),
        ((smebu, None), (loss_free, None)),
        ((quantile, None), (topk, topk.Config(score="sigmoid"))),
        ((loss_free, None), (topk, topk.Config(score="sigmoid"))),
    ],
    ids=lambda pair: pair[0].__name__.rsplit(".", 1)[-1],
)
def test_without_what_is_its_own_a_router_is_another(first, second):
    ours, theirs = (routed(*router, z=random_logits()) for router in (first, second))
    assert torch.equal(ours.expert_R, theirs.expert_R)
    assert torch.allclose(ours.weight_R, theirs.weight_R, atol=1e-12)


def test_switch_is_topk():
    assert switch.Router is topk.Router


# ------------------------------------------------------------------------------------------------- scores and gates


def test_root_of_softplus_gates():
    routing = routed(topk, topk.Config(score="sqrt_softplus"))
    assert routing.weight_R.tolist() == pytest.approx([0.559980, 0.440020], abs=1e-6)
    full = routed(topk, topk.Config(score="sqrt_softplus", gate="full"))
    assert full.weight_R.tolist() == pytest.approx([1.458399, 1.145976], abs=1e-6)


def test_switch_gate_is_the_full_probability():
    assert routed(switch, K=1).weight_R.tolist() == pytest.approx([P[0]], abs=1e-6)


def test_llama4_weighs_the_input_with_a_sigmoid():
    routing = routed(llama4, K=1)
    assert routing.weight_on == "input"
    assert routing.weight_R.tolist() == pytest.approx([0.880797], abs=1e-6)


def test_a_bias_moves_gpt_oss_choices_and_gates():
    router = router_of(gpt_oss)
    with torch.no_grad():
        router.logit_bias_E.copy_(torch.tensor([0.0, 0.0, 4.0, 0.0]))
    routing = router(Z, tokens_of(1, 1))
    assert routing.expert_R.tolist() == [2, 0]
    assert routing.weight_R.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])


@pytest.mark.parametrize(("threshold", "chosen"), [(0.4, [0]), (0.7, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])])
def test_top_p_takes_the_smallest_set(threshold, chosen):
    routing = routed(top_p, top_p.Config(threshold=threshold))
    assert routing.expert_R[routing.expert_R < 4].tolist() == chosen
    assert routing.weight_R[: len(chosen)].tolist() == pytest.approx(P[: len(chosen)], abs=1e-6)
    assert routing.losses["entropy"].value.item() == pytest.approx(0.947537, abs=1e-6)
    bounded = routed(top_p, top_p.Config(threshold=threshold, max_experts=2))
    assert bounded.expert_R[bounded.expert_R < 4].tolist() == chosen[:2]


def test_remoe_takes_every_positive_score():
    routing = routed(remoe)
    assert routing.expert_R.tolist()[:2] == [0, 1]
    assert (routing.expert_R[2:] == 4).all()
    assert routing.weight_R.tolist() == pytest.approx([2, 1, 0, 0])


@pytest.mark.parametrize(("rows", "exponent"), [(8, -7), (40, 7)])
def test_remoe_coefficient_after_seven_steps(rows, exponent):
    router = router_of(remoe)
    for _ in range(7):
        router.update({"counts_E": torch.tensor([rows // 4] * 4), "token_sum": torch.tensor(10.0)})
    assert router.coefficient.item() == pytest.approx(1e-8 * 1.2**exponent, rel=1e-6)


def test_remoe_loss_pulls_active_gates_down():
    router, z = router_of(remoe, remoe.Config(start=0.5)), Z.clone().requires_grad_()
    losses = router(z, tokens_of(1, 1)).losses
    assert losses["l1"].value.item() == pytest.approx(4 * 0.5 * (2 + 1))  # E·Σ f·g, f = 1/2 each
    assert losses["l1_scaled"].value.item() == pytest.approx(0.5 * losses["l1"].value.item())
    losses["l1_scaled"].value.backward()
    assert z.grad[0].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])


# --------------------------------------------------------------------------------------------------------- selection


def test_groups_limit_by_their_best_scores():
    score = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.6, 0.1]])
    by_best = limit_groups(score, 3, 1, best=1)
    assert by_best.isfinite().tolist() == [[True, True, False, False, False, False]]
    by_two = limit_groups(score, 3, 1, best=2)
    assert by_two.isfinite().tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize("module", [deepseek_v2, loss_free])
def test_a_token_uses_at_most_the_given_groups(module):
    z = random_logits(T=50)
    limited = routed(module, module.Config(num_groups=4, top_groups=2), z=z, K=3).expert_R.view(50, 3) // 2
    assert max(len(set(row)) for row in limited.tolist()) == 2
    every = routed(module, module.Config(num_groups=4, top_groups=4), z=z, K=3)
    assert torch.equal(every.expert_R, routed(module, z=z, K=3).expert_R)


@pytest.mark.parametrize(
    ("groups", "message"), [((3, 1), "must divide"), ((4, 5), "at most"), ((4, 1), "use top_groups=2")]
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    config = deepseek_v2.Config(num_groups=groups[0], top_groups=groups[1])
    with pytest.raises(ConfigError, match=message):
        config.check(num_experts=8, top_k=3)


def test_gshard_keeps_the_second_expert_by_twice_its_weight():
    T = 4000
    z = torch.tensor([[1.0, 1.0 + math.log(0.15 / 0.85), -9.0, -9.0]], dtype=torch.float64).expand(T, 4)
    router = router_of(gshard, gshard.Config(capacity_factor=0.0))
    tokens = tokens_of(4, T // 4)
    assert router(z, tokens).statistics["counts_E"].tolist()[:2] == [T, T]
    first, second = router.train()(z, tokens).statistics["counts_E"].tolist()[:2]
    assert first == T
    assert second / T == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / T))


def test_gshard_counts_first_choices_only():
    z = torch.tensor([[3.0, 2.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    loss = routed(gshard, z=z).losses["balance"].value.item()
    assert loss == pytest.approx(4 * z[0].softmax(0)[0].item())


def test_base_assignment_is_the_best_balanced_one():
    score = random_logits(T=6, E=3).numpy()
    chosen = base.balanced_assignment(score, 1)[:, 0]
    assert np.bincount(chosen, minlength=3).tolist() == [2, 2, 2]
    balanced = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    best = max(sum(score[t, e] for t, e in enumerate(way)) for way in balanced)
    assert score[np.arange(6), chosen].sum() == pytest.approx(best)


def test_base_is_balanced_in_training_and_greedy_outside():
    z = random_logits(T=32) + torch.linspace(0, 3, 8)
    router, tokens = router_of(base, E=8), tokens_of(2, 16)
    greedy = router(z, tokens)
    assert torch.equal(greedy.expert_R.view(32, 2), z.topk(2, dim=1).indices)
    counts = router.train()(z, tokens).statistics["counts_E"]
    assert counts.tolist() == [8] * 8
    assert max_vio(greedy.statistics["counts_E"]) > 0.5


def test_sinkhorn_marginals():
    z, tokens = 3 * random_logits(T=24), tokens_of(2, 12)
    plan = sinkhorn_plan(z, tokens, 400).view(2, 12, 8)
    assert torch.allclose(plan.sum(2), torch.full((2, 12), 1 / 12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(plan.sum(1), torch.full((2, 8), 1 / 8, dtype=torch.float64), atol=1e-6)
    shifted = sinkhorn_plan(z + random_logits(T=24, E=1), tokens, 400).view(2, 12, 8)
    assert torch.allclose(shifted, plan, atol=1e-9), "a constant per token changes nothing"
    order = torch.randperm(8)
    assert torch.allclose(sinkhorn_plan(z[:, order], tokens, 400).view(2, 12, 8), plan[:, :, order], atol=1e-12)


def test_sinkhorn_balances_in_training_only():
    z = random_logits(T=64) + torch.linspace(0, 3, 8)
    router, tokens = router_of(sinkhorn, E=8), tokens_of(1, 64)
    assert max_vio(router.train()(z, tokens).statistics["counts_E"]) < 0.6
    assert max_vio(router.eval()(z, tokens).statistics["counts_E"]) > 1


def test_same_batch_prices_balance_each_row():
    z = random_logits(T=512) + torch.linspace(0, 3, 8)
    loads = torch.zeros(2, 8)
    expert_BSK = router_of(quantile_batch, E=8)(z, tokens_of(2, 256)).expert_R.view(2, -1)
    for row in range(2):
        loads[row] = torch.bincount(expert_BSK[row], minlength=8)
    assert loads.max() / 64 - 1 < 0.1
    assert max_vio(routed(topk, z=z).statistics["counts_E"]) > 1


# -------------------------------------------------------------------------------------------------- losses by formula


def test_importance_of_known_loads():
    """Loads (4, 2, 1, 1): CV = 0.6124."""
    gates = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])]
    squared = noisy_topk.variation_squared(gates, tokens_of(1, 8))
    assert squared.sqrt().item() == pytest.approx(0.6124, abs=1e-4)


def test_chance_of_choice_is_that_of_a_fresh_draw_of_ones_own_noise():
    logits, noisy = random_logits(T=1, E=5), random_logits(T=1, E=5, seed=1)
    deviation = torch.rand(1, 5, dtype=torch.float64) + 0.5
    chance = noisy_topk.chance_of_choice(logits, noisy, deviation, 2)
    for e in range(5):
        draws = noisy.expand(20_000, 5).clone()
        draws[:, e] = logits[0, e] + deviation[0, e] * torch.randn(20_000, dtype=torch.float64)
        share = (draws.topk(2, dim=1).indices == e).any(1).double().mean().item()
        assert chance[0, e].item() == pytest.approx(share, abs=0.015)


def test_deepseek_v2_losses_are_one_at_balance():
    config = deepseek_v2.Config(num_groups=4, top_groups=2)
    pairs = [(0, 2), (4, 6), (1, 3), (5, 7)]  # each expert once, each group twice, two groups a token
    z = torch.full((4, 8), -20.0, dtype=torch.float64)
    for t, pair in enumerate(pairs):
        z[t, list(pair)] = 5.0
    losses = routed(deepseek_v2, config, z=z).losses
    assert [losses[name].value.item() for name in ("balance", "device", "communication")] == pytest.approx([1] * 3)
    assert [losses[name].weight for name in ("balance", "device", "communication")] == [0.003, 0.05, 0.02]
    one_group = torch.tensor([[5.0, 5, -20, -20, -20, -20, -20, -20]] * 4, dtype=torch.float64)
    losses = routed(deepseek_v2, config, z=one_group).losses
    assert losses["device"].value.item() == pytest.approx(4)  # G·1·1
    assert losses["communication"].value.item() == pytest.approx(2)  # G/M·1·1


def test_moe_plus_plus_loss_is_one_where_zero_cost_experts_take_more():
    """E = 2 experts and 2 others with tau = 1/2: balance is 1/6 each for experts and 1/3 each for the others."""
    config = moe_plus_plus.Config(num_zero=1, num_copy=1, num_constant=0, tau=0.5)
    router = moe_plus_plus.Router(config, dim=4, num_experts=2, top_k=1, layer=0, seed=0).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4)[:2])
        router.null_weight_ZD.copy_(torch.eye(4)[2:])
    kinds = torch.tensor([0, 1, 2, 2, 3, 3])
    routing = router(40 * torch.eye(4, dtype=torch.float64)[kinds], tokens_of(1, 6))
    assert routing.losses["balance"].value.item() == pytest.approx(1.0)
    assert routing.statistics["counts_E"].tolist() == [1, 1]
    assert config.rows_per_token(num_experts=2, top_k=1) == pytest.approx(2 / 6)


def test_zero_copy_and_constant_experts():
    config = moe_plus_plus.Config(num_zero=1, num_copy=1, num_constant=1)
    router = moe_plus_plus.Router(config, dim=5, num_experts=2, top_k=1, layer=0, seed=0).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(5)[:2])
        router.null_weight_ZD.copy_(torch.eye(5)[2:])
        router.constant_CD.copy_(torch.arange(5.0).unsqueeze(0))
        router.mixture_CD.copy_(torch.stack((torch.zeros(5), torch.eye(5)[4])))
    x = 3 * torch.eye(5, dtype=torch.float64)[2:]
    bypass = router(x, tokens_of(1, 3)).bypass_TD
    p = math.exp(3) / (math.exp(3) + 4)
    assert (bypass[0] == 0).all()
    assert torch.allclose(bypass[1], p * x[1])
    keep = 1 / (1 + math.exp(3))
    assert torch.allclose(bypass[2], p * (keep * x[2] + (1 - keep) * torch.arange(5.0)))


def test_orthonormal_rows_cost_nothing():
    rows = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert simbal.distance_from_orthonormal(rows[:5]).item() == pytest.approx(0, abs=1e-12)
    assert simbal.distance_from_orthonormal(rows[:, :5]).item() == pytest.approx(0, abs=1e-12)
    assert simbal.distance_from_orthonormal(2 * torch.eye(3)).item() == pytest.approx(9)
    assert routed(simbal, z=2 * random_logits()).losses["orthogonal"].value.item() == pytest.approx(0, abs=1e-12)
    router, tokens = router_of(simbal), tokens_of(2, 3)
    with torch.no_grad():
        router.weight_ED.mul_(2)
    assert router(random_logits(T=6, E=4), tokens).losses["orthogonal"].value.item() == pytest.approx(12)


# ------------------------------------------------------------------------------------------------ state and control


def test_quantile_of_a_histogram_is_that_of_the_values():
    values = torch.rand(5000, 3, dtype=torch.float64) ** 2
    tokens = tokens_of(1, 5000)
    found = upper_quantile(histogram(values, tokens, 0.0, 1.0), 0.125, 0.0, 1.0)
    assert found.numpy() == pytest.approx(np.quantile(values.numpy(), 0.875, axis=0), abs=1 / BINS)
    halves = sum(histogram(half, tokens_of(1, 2500), 0.0, 1.0) for half in values.split(2500))
    assert torch.equal(halves, histogram(values, tokens, 0.0, 1.0)), "additive"
    assert upper_quantile(torch.zeros(2, BINS), 0.5, -2.0, 2.0).tolist() == [-2, -2]


def test_experts_with_a_bar_take_their_share():
    z = random_logits(T=4096) + torch.linspace(0, 3, 8)
    router, tokens = router_of(expert_threshold, E=8), tokens_of(4, 1024)
    first = router(z, tokens)
    assert torch.equal(first.expert_R.view(4096, 8)[:, :2], z.topk(2, dim=1).indices), "k best before the first update"
    router.update(first.statistics)
    second = router(z, tokens)
    assert max_vio(second.statistics["counts_E"]) < 0.02
    rows_T = (second.expert_R.view(4096, 8) < 8).sum(1)
    assert rows_T.min() < 2 < rows_T.max()
    bar = router.bar_E.clone()
    router.update(router(z - 1, tokens).statistics)
    assert torch.allclose(router.bar_E, 0.99 * bar + 0.01 * np_bar(z - 1), atol=1e-5)


def np_bar(z: Tensor) -> Tensor:
    return torch.quantile(z.sigmoid(), 0.75, dim=0)


def test_longcat_passes_a_token_by_its_identity_experts():
    router = longcat.Router(longcat.Config(num_null=2), dim=4, num_experts=2, top_k=2, layer=0, seed=0).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4)[:2])
        router.null_weight_ZD.copy_(torch.eye(4)[2:])
    x = torch.tensor([[3.0, 2, 0, 0], [3, 0, 2, 0], [0, 0, 2, 3]], dtype=torch.float64)
    routing = router(x, tokens_of(1, 3))
    p = x.softmax(1)
    assert routing.expert_R.tolist() == [0, 1, 0, 2, 2, 2]
    assert torch.allclose(routing.bypass_TD, torch.stack((0 * x[0], p[1, 2] * x[1], (p[2, 2] + p[2, 3]) * x[2])))


def test_longcat_steers_to_its_budget():
    z = random_logits(T=2048, E=12)
    config = longcat.Config(num_null=4, budget=0.5, bias_rate=0.01)
    router = longcat.Router(config, dim=12, num_experts=8, top_k=4, layer=0, seed=0).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(12)[:8])
        router.null_weight_ZD.copy_(torch.eye(12)[8:])
    tokens = tokens_of(2, 1024)
    with torch.no_grad():
        before = router(z, tokens).statistics["kept_E"].sum().item() / 2048
        for _ in range(150):
            router.update(router(z, tokens).statistics)
        after = router(z, tokens).statistics["counts_E"]
    assert before == pytest.approx(4 * 8 / 12, abs=0.2)
    assert after.sum().item() / 2048 == pytest.approx(2, abs=0.05)
    assert max_vio(after) < 0.1


def test_smebu_step_by_hand():
    router = router_of(smebu, smebu.Config(bias_rate=0.1, kappa=2.0, momentum=0.5))
    router.update({"counts_E": torch.tensor([4, 2, 1, 1])})
    step = [0.1 * math.tanh(2 * v) for v in (-1.0, 0.0, 0.5, 0.5)]
    mean = sum(step) / 4
    assert router.bias_E.tolist() == pytest.approx([s - mean for s in step], abs=1e-7)
    router.update({"counts_E": torch.tensor([2, 2, 2, 2])})
    assert router.bias_E.tolist() == pytest.approx([1.5 * (s - mean) for s in step], abs=1e-7)


def test_a_frozen_router_is_a_function_of_seed_and_layer():
    weights = [
        frozen_random.Router(frozen_random.Config(), dim=64, num_experts=8, top_k=2, layer=layer, seed=seed).frozen_ED
        for seed, layer in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert weights[0].square().sum(1).mean().item() == pytest.approx(1, abs=0.3)


def test_hash_with_frequencies_balances_a_skewed_corpus(tmp_path):
    counts = 20_000 // np.arange(1, 1001)
    np.save(tmp_path / "counts.npy", counts)
    ids = torch.from_numpy(np.repeat(np.arange(1000), counts)).view(1, -1)
    x = torch.zeros(ids.numel(), 4)
    loads = []
    for frequencies in ("", str(tmp_path / "counts.npy")):
        config = hash_router.Config(frequencies=frequencies)
        router = hash_router.Router(config, dim=4, num_experts=16, top_k=2, layer=0, seed=0)
        assert not list(router.parameters())
        loads.append(router(x, Tokens.of(ids)).statistics["counts_E"])
        order = torch.randperm(16)
        router.relabel(order)
        assert torch.equal(router(x, Tokens.of(ids)).statistics["counts_E"], loads[-1][order])
    assert max_vio(loads[0]) > 0.2
    assert max_vio(loads[1]) < 0.1


@pytest.mark.parametrize("content", [b"no array", np.array([[1.0]]), np.array([-1])])
def test_a_wrong_file_of_frequencies_is_refused(content, tmp_path):
    path = tmp_path / "counts.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ConfigError, match=r"counts\.npy"):
        hash_router.Router(hash_router.Config(frequencies=str(path)), dim=4, num_experts=4, top_k=1, layer=0, seed=0)

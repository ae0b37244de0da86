"""Gradient estimators against the router's gradient written out densely, and against the routers they are taken from."""

import pytest
import torch
from torch import Tensor

from moe.config.schema import Balance, MoE
from moe.errors import ConfigError
from moe.experts.means import output_sums
from moe.moe_layer import MoELayer
from moe.routers import deepseek_v2, gpt_oss, grin, loss_free, quantile, topk
from moe.routers._estimators import DECAY, STRIDE, scaled
from moe.routing import Tokens

NO_LOSS = {"balance": Balance(weight=0.0), "z_weight": 0.0}
ROUTERS = {
    "topk full": (topk, {"gate": "full", **NO_LOSS}),
    "topk selected": (topk, NO_LOSS),
    "loss_free": (loss_free, {"scaling_factor": 2.5, **NO_LOSS}),
    "gpt_oss": (gpt_oss, NO_LOSS),
    "deepseek_v2": (deepseek_v2, {"scaling_factor": 16.0, "balance": Balance(weight=0.0)}),
    "quantile": (quantile, {}),
}
B, S, D, E, K = 2, 6, 7, 5, 2


def layer_of(name: str, estimator: str) -> MoELayer:
    """A float64 layer whose experts' mean outputs, if it keeps any, are far from 0."""
    module, settings = ROUTERS[name]
    router = module.Config(**settings, estimator=estimator)
    layer = MoELayer(
        MoE(num_experts=E, top_k=K, expert_hidden=6, router=router, backend="reference"), D, layer=0, init_std=0.5
    )
    if layer.router.default_ED is not None:
        layer.router.default_ED.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(8)))
    return layer.double()


def data(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of the layer's output."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, S, D, generator=generator, dtype=torch.float64) for _ in range(2))


def outputs(layer: MoELayer, x: Tensor) -> Tensor:
    """Every expert's output for every token [T, E, D], written out."""
    w, x = layer.experts, x.flatten(0, 1)
    hidden = torch.nn.functional.silu(torch.einsum("td,edf->tef", x, w.w_gate_EDF))
    return torch.einsum("tef,efd->ted", hidden * torch.einsum("td,edf->tef", x, w.w_up_EDF), w.w_down_EFD).detach()


def dense_gradient(layer: MoELayer, x: Tensor, upstream: Tensor, name: str) -> Tensor:
    """The router's gradient as if y were the sum over all experts of gate·output, the others' outputs being default_ED if any."""
    weight = layer.router.weight_ED.detach().clone().requires_grad_()
    z = x.flatten(0, 1) @ weight.t()
    if name == "gpt_oss":
        z = z + layer.router.logit_bias_E.detach()
    score = z.sigmoid() if name in ("loss_free", "quantile") else z.softmax(1)
    chosen = torch.zeros_like(score).scatter(1, score.topk(K, dim=1).indices, 1.0).bool()
    gates = score
    if name not in ("topk full", "deepseek_v2"):
        total = (score * chosen).sum(1, keepdim=True)
        gates = torch.where(chosen, score / total, score / total.detach())
    gates = gates * getattr(layer.router.config, "scaling_factor", 1.0)
    heard = outputs(layer, x)
    if layer.router.default_ED is not None:
        heard = torch.where(chosen.unsqueeze(2), heard, layer.router.default_ED)
    (gates * (heard * upstream.flatten(0, 1).unsqueeze(1)).sum(2)).sum().backward()
    return weight.grad


@pytest.mark.parametrize("estimator", ["dense_mixer", "default_vector"])
@pytest.mark.parametrize("name", ROUTERS)
def test_an_estimator_changes_the_routers_gradient_alone(name, estimator):
    plain, mixed = layer_of(name, "chosen"), layer_of(name, estimator)
    x, upstream = data()
    ours = []
    for layer in (plain, mixed):
        y, routing = layer(x)
        (y * upstream).sum().backward()
        ours.append(y)
    assert torch.allclose(ours[0], ours[1], atol=1e-14), "no output changes, but for the order of sums over more rows"
    assert torch.equal(ours[0], ours[1]) or estimator == "dense_mixer"
    for a, b in zip(plain.experts.parameters(), mixed.experts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12)
    assert torch.allclose(mixed.router.weight_ED.grad, dense_gradient(mixed, x, upstream, name), atol=1e-12)
    assert not torch.allclose(plain.router.weight_ED.grad, mixed.router.weight_ED.grad, atol=1e-4)
    rows = {"dense_mixer": E, "default_vector": K}[estimator]
    assert len(routing.expert_R) == B * S * rows
    if estimator == "dense_mixer":
        assert routing.selected_R.sum() == B * S * K


@pytest.mark.parametrize("estimator", ["dense_mixer", "default_vector"])
def test_an_estimator_gives_one_normalised_expert_a_gradient(estimator):
    topk.Config(estimator=estimator).check(num_experts=4, top_k=1)
    with pytest.raises(ConfigError, match="no gradient"):
        topk.Config(estimator="sparse_mixer").check(num_experts=4, top_k=1)


@pytest.mark.parametrize("step", [0, 5])
def test_the_means_are_those_of_the_experts_outputs(step):
    layer, (x, _) = layer_of("topk selected", "default_vector"), data()
    tokens = Tokens.of(torch.zeros(B, S, dtype=torch.int64), step=step)
    before = layer.router.default_ED.clone()
    _, routing = layer(x, tokens)
    layer.update(routing.statistics)
    taken = torch.tensor([b * S + (place + step) % S for b in range(B) for place in range(0, S, STRIDE)])
    expert_TK, out = routing.expert_R.view(B * S, K)[taken], outputs(layer, x)[taken]
    for e in range(E):
        rows = (expert_TK == e).any(1)
        mean = out[rows, e].mean(0) if rows.any() else before[e]
        assert torch.allclose(layer.router.default_ED[e], DECAY * before[e] + (1 - DECAY) * mean)
    assert routing.statistics["output_rows_E"].sum() == len(taken) * K


def test_means_over_every_token_leave_out_padding_and_add_up():
    layer, (x, _) = layer_of("topk selected", "default_vector"), data()
    valid = torch.arange(S).expand(B, S) < torch.tensor([[4], [0]])
    tokens = Tokens.of(torch.zeros(B, S, dtype=torch.int64), valid_BS=valid)
    _, routing = layer(x, tokens)
    sums = output_sums(layer.experts, None, x.flatten(0, 1), routing, tokens, stride=1)
    assert sums["output_rows_E"].sum() == 4 * K
    chosen = torch.zeros(B * S, E, dtype=torch.bool).scatter(1, routing.expert_R.view(-1, K).clamp(max=E - 1), True)
    chosen &= valid.flatten().unsqueeze(1)
    assert torch.allclose(sums["output_sum_ED"], (outputs(layer, x) * chosen.unsqueeze(2)).sum(0))


def test_means_are_taken_in_training_with_gradient_only():
    layer, (x, _) = layer_of("topk selected", "default_vector"), data()
    with torch.no_grad():
        assert "output_sum_ED" not in layer(x)[1].statistics
    assert "output_sum_ED" not in layer.eval()(x)[1].statistics
    before = layer.router.default_ED.clone()
    layer.update(layer(x)[1].statistics)
    assert torch.equal(layer.router.default_ED, before)


# ------------------------------------------------------------------------------------------------------ SparseMixer-v2


def test_sparse_mixer_keeps_the_gradient_and_thirds_the_value():
    weight = torch.tensor([0.6, 0.6], requires_grad=True)
    out = scaled(weight, torch.tensor([1.0, 1 / 3]))
    out.sum().backward()
    assert out.tolist() == pytest.approx([0.6, 0.2])
    assert weight.grad.tolist() == [1, 1]


def routed(module, config, training: bool, top_k: int = 1):
    """Weights and experts of random logits, with the weights' gradient."""
    router = module.Router(config, dim=8, num_experts=8, top_k=top_k, layer=0, seed=0).double().train(training)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(8))
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    routing = router(x, Tokens.of(torch.zeros(5, 100, dtype=torch.int64)))
    (routing.weight_R * torch.linspace(0, 1, len(routing.weight_R))).sum().backward()
    return routing.expert_R, routing.weight_R, x.grad


@pytest.mark.parametrize("training", [True, False])
def test_top_one_with_sparse_mixer_is_grin_without_its_mask(training):
    ours = routed(topk, topk.Config(gate="full", estimator="sparse_mixer", **NO_LOSS), training)
    theirs = routed(grin, grin.Config(jitter=1e9, **NO_LOSS), training)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-14)


def test_two_sampled_experts_differ_and_follow_the_probabilities():
    config = topk.Config(gate="full", estimator="sparse_mixer", **NO_LOSS)
    router = topk.Router(config, dim=4, num_experts=4, top_k=2, layer=0, seed=0).double().train()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4))
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    x, T = p.log().expand(8000, 4), 8000
    expert_TK = router(x, Tokens.of(torch.zeros(8, 1000, dtype=torch.int64))).expert_R.view(T, 2)
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    first = torch.bincount(expert_TK[:, 0], minlength=4) / T
    assert first.tolist() == pytest.approx(p.tolist(), abs=0.02)
    after_best = expert_TK[expert_TK[:, 0] == 0, 1]
    second = torch.bincount(after_best, minlength=4) / len(after_best)
    assert second.tolist() == pytest.approx([0, 0.6, 0.3, 0.1], abs=0.03)


def test_grin_samples_among_the_near_best():
    z = torch.tensor([[2.0, 1.99, 1.0, -1.0]], dtype=torch.float64).expand(6000, 4)
    router = grin.Router(grin.Config(jitter=0.05), dim=4, num_experts=4, top_k=1, layer=0, seed=0).double().train()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4))
    tokens = Tokens.of(torch.zeros(6, 1000, dtype=torch.int64))
    counts = router(z, tokens).statistics["counts_E"] / 6000
    better = 1 / (1 + torch.tensor(-0.01).exp().item())
    assert counts.tolist() == pytest.approx([better, 1 - better, 0, 0], abs=0.03)
    assert router.eval()(z, tokens).statistics["counts_E"].tolist() == [6000, 0, 0, 0]


@pytest.mark.full
@pytest.mark.parametrize("estimator", ["dense_mixer", "default_vector", "sparse_mixer"])
def test_an_estimator_traces_in_one_graph(estimator):
    router = topk.Config(estimator=estimator, gate="full")
    layer = MoELayer(MoE(num_experts=E, top_k=K, expert_hidden=6, router=router, backend="torch"), D, layer=0)
    x = torch.randn(B, S, D)
    y, routing = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    expected, eager = layer(x)
    assert torch.allclose(y, expected, atol=1e-6)
    assert routing.statistics.keys() == eager.statistics.keys()

"""Latent experts against the same layer written out: routed in D, computed in a smaller width between two shared matrices."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from moe.config.load import load
from moe.config.schema import MoE
from moe.cost import dense_twin, parameters, relative_difference, train_flops_per_token
from moe.errors import ConfigError
from moe.experts.means import output_sums
from moe.moe_layer import MoELayer
from moe.routers.moe_plus_plus import Config as MoEPlusPlus
from moe.routers.topk import Config as TopK
from moe.routing import Tokens

D, L, E, K, F = 12, 5, 4, 2, 6


def layer_of(backend: str = "reference", router=None, **changes) -> MoELayer:
    """A float64 layer of experts in width 5 of 12."""
    config = MoE(num_experts=E, top_k=K, expert_hidden=F, router=router or TopK(), latent_dim=L, backend=backend)
    return MoELayer(replace(config, **changes), D, layer=1, init_std=0.5).double()


def written_out(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """W_up of the gated sum of experts of W_down x, plus the shared expert of x."""
    u, p = x @ layer.into_latent.weight.t(), (x @ layer.router.weight_ED.t()).softmax(-1)
    best = p.topk(K, dim=-1)
    y = torch.zeros_like(u)
    for e in range(E):
        weight = torch.where(best.indices == e, best.values, 0.0).sum(-1, keepdim=True) / best.values.sum(
            -1, keepdim=True
        )
        w = layer.experts
        y = y + weight * ((silu(u @ w.w_gate_EDF[e]) * (u @ w.w_up_EDF[e])) @ w.w_down_EFD[e])
    y = y @ layer.out_of_latent.weight.t()
    return y + layer.shared(x) if layer.shared is not None else y


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shared", [0, 8])
def test_values_and_gradients_are_those_of_the_formula(backend, shared):
    layer = layer_of(backend, shared_hidden=shared)
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, D, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    ours, theirs = layer(x)[0], written_out(layer, x)
    assert torch.allclose(ours, theirs, atol=1e-12)
    gradients = [torch.autograd.grad((y * upstream).sum(), leaves) for y in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_the_router_and_what_passes_by_stay_in_the_models_width():
    layer = layer_of(router=MoEPlusPlus())
    assert layer.router.weight_ED.shape == (E, D)
    assert layer.router.constant_CD.shape[1] == D
    assert layer.experts.w_up_EDF.shape == (E, L, F)
    y, routing = layer(torch.randn(1, 20, D, dtype=torch.float64))
    assert routing.bypass_TD is not None and routing.bypass_TD.shape == y.flatten(0, 1).shape


def test_default_vectors_are_those_of_the_models_width():
    layer = layer_of(router=TopK(estimator="default_vector"))
    x = torch.randn(1, 24, D, dtype=torch.float64)
    _, routing = layer(x)
    tokens, x_TD = Tokens.of_hidden(x), x[0]
    assert layer.into_latent is not None and layer.out_of_latent is not None
    inside = output_sums(layer.experts, None, layer.into_latent(x_TD), routing, tokens, stride=8)["output_sum_ED"]
    assert routing.statistics["output_sum_ED"].shape == (E, D)
    assert torch.allclose(routing.statistics["output_sum_ED"], inside @ layer.out_of_latent.weight.t())


def test_smoke_with_latent_experts_is_counted_and_has_a_twin():
    plain, latent = load("recipes/smoke.py"), load("recipes/smoke.py", ["model.moe.latent_dim=32"])
    saved = parameters(plain.model).total - parameters(latent.model).total
    assert saved == 2 * (8 * 3 * 64 * (64 - 32) - 2 * 64 * 32)
    assert train_flops_per_token(latent.model, 128) < train_flops_per_token(plain.model, 128)
    assert abs(relative_difference(latent, dense_twin(latent))) <= 0.005


def test_a_latent_width_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"latent_dim \(64\) must be less than model.dim \(64\)"):
        load("recipes/smoke.py", ["model.moe.latent_dim=64"])

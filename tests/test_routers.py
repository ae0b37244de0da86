"""Conformance of every router in moe/routers, found by its file: contract, algebra, gradients, causality.

Outputs are compared with dense feed-forward layers and weighted sums written out here; gradients with finite differences.
"""

import itertools
import typing
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from moe.config.load import known_routers, resolve_router
from moe.config.schema import MoE, NonNegativeFloat, RouterConfig
from moe.errors import ConfigError
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.routing import Routing, Selection, Tokens, plan

D, F = 12, 10
ROUTERS = known_routers()


def config_for(name: str, num_experts: int, top_k: int, **changes: object) -> RouterConfig:
    """The router's default settings, or the nearest single change of a switch that K and E allow."""
    base = resolve_router(name).Config(**changes)
    candidates = [base]
    for field in fields(base):
        hint = typing.get_type_hints(type(base), include_extras=True)[field.name]
        options = (
            (True, False)
            if hint is bool
            else typing.get_args(hint)
            if typing.get_origin(hint) is typing.Literal
            else ()
        )
        candidates += [replace(base, **{field.name: option}) for option in options]
    for candidate in candidates:
        try:
            candidate.check(num_experts=num_experts, top_k=top_k)
        except ConfigError:
            continue
        return candidate
    raise AssertionError(f"{name} has no settings for E={num_experts}, K={top_k}")


def capacities(name: str) -> list[str]:
    """The router's capacity factors that 0 switches off."""
    hints = typing.get_type_hints(resolve_router(name).Config, include_extras=True)
    return [field for field, hint in hints.items() if field.endswith("capacity_factor") and hint == NonNegativeFloat]


def layer_of(name: str, num_experts: int = 6, top_k: int = 2, capacity_factor: float = 0.0) -> MoELayer:
    """A float64 layer in evaluation mode, without capacity unless one is given."""
    changes = dict.fromkeys(capacities(name), capacity_factor)
    router = config_for(name, num_experts, top_k, **changes)
    config = MoE(num_experts=num_experts, top_k=top_k, expert_hidden=F, router=router, backend="reference")
    return MoELayer(config, D, layer=0, init_std=0.5, seed=3).double().eval()


def batch(B: int = 3, S: int = 11, seed: int = 0) -> tuple[Tensor, Tokens]:
    """Hidden states [B, S, D] float64 and their tokens with ids."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, 50, (B, S), generator=generator)
    return torch.randn(B, S, D, generator=generator, dtype=torch.float64), Tokens.of(ids_BS)


def ffn(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    """One expert applied to x, written out."""
    experts = layer.experts
    return (silu(x @ experts.w_gate_EDF[expert]) * (x @ experts.w_up_EDF[expert])) @ experts.w_down_EFD[expert]


def combined(layer: MoELayer, routing: Routing, x: Tensor) -> Tensor:
    """Every row's expert applied and summed, written out, and what reaches the output without an expert."""
    x_TD, W_TE = x.flatten(0, 1), weight_matrix(routing, x.shape[0] * x.shape[1])
    y = torch.zeros_like(x_TD) if routing.bypass_TD is None else routing.bypass_TD.double()
    for e in range(routing.num_experts):
        weight = W_TE[:, e : e + 1]
        y = y + (ffn(layer, e, weight * x_TD) if routing.weight_on == "input" else weight * ffn(layer, e, x_TD))
    return y.view_as(x)


def adapted(layer: MoELayer, steps: int = 3) -> MoELayer:
    """The layer after its router's state has adapted to a few batches."""
    for step in range(steps):
        with torch.no_grad():
            _, routing = layer(*batch(seed=50 + step))
        layer.update(routing.statistics)
    return layer


def weight_matrix(routing: Routing, num_tokens: int) -> Tensor:
    """The routing as a dense T×E matrix of weights."""
    W_TE = torch.zeros(num_tokens, routing.num_experts + 1, dtype=torch.float64)
    W_TE.index_put_((routing.token_R, routing.expert_R), routing.weight_R.double(), accumulate=True)
    return W_TE[:, :-1]


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_is_well_formed(name):
    layer, (x, tokens) = layer_of(name), batch()
    y, routing = layer(x, tokens)
    assert y.shape == x.shape
    assert torch.equal(routing.token_R, routing.token_R.sort().values)
    starts = torch.searchsorted(routing.token_R, torch.arange(x.shape[0] * x.shape[1] + 1))
    assert torch.equal(routing.token_offsets, starts)
    assert routing.expert_R.min() >= 0
    assert routing.expert_R.max() <= 6
    counts = torch.bincount(routing.expert_R, minlength=7)[:6]
    assert torch.equal(routing.statistics["kept_E"], counts)
    dispatch = plan(routing)
    assert torch.equal(dispatch.row_P.sort().values, torch.arange(len(routing.token_R)))
    assert torch.equal(dispatch.offsets_E1.diff(), counts)
    pairs = routing.token_R * 7 + routing.expert_R
    real = pairs[routing.expert_R < 6]
    assert len(real.unique()) == len(real), "a token meets an expert at most once"


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_weights_sum_as_declared(name, top_k):
    layer, (x, tokens) = layer_of(name, top_k=top_k), batch()
    _, routing = layer(x, tokens)
    sums_T = weight_matrix(routing, 33).sum(1)
    declared = layer.router.weights_sum
    assert declared in ("one", "at_most_one", "free")
    if declared == "one":
        assert torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-6)
    elif declared == "at_most_one":
        assert (sums_T <= 1 + 1e-6).all()
        assert (sums_T >= 0).all()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_output_is_the_weighted_sum_of_the_experts(name, top_k):
    layer, (x, tokens) = layer_of(name, top_k=top_k), batch()
    y, routing = layer(x, tokens)
    assert torch.allclose(y, combined(layer, routing, x), atol=1e-10)
    if top_k == 6 and layer.router.exact_rows:
        assert (weight_matrix(routing, 33) > 0).all(), "with K = E every token meets every expert"


@pytest.mark.parametrize("name", ROUTERS)
def test_one_expert_is_a_dense_layer(name):
    layer, (x, tokens) = layer_of(name, num_experts=1, top_k=1), batch()
    y, routing = layer(x, tokens)
    weight_T1 = weight_matrix(routing, 33)
    assert torch.allclose(y, combined(layer, routing, x), atol=1e-10)
    if layer.router.weights_sum == "one":
        assert torch.allclose(weight_T1, torch.ones_like(weight_T1), atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_identical_experts_are_one_dense_layer(name):
    layer, (x, tokens) = layer_of(name), batch()
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    y, routing = layer(x, tokens)
    if routing.weight_on == "input":
        assert torch.allclose(y, combined(layer, routing, x), atol=1e-8), "a gate on the input is inside the expert"
        return
    dense = weight_matrix(routing, 33).sum(1, keepdim=True) * ffn(layer, 0, x.flatten(0, 1))
    bypass = 0.0 if routing.bypass_TD is None else routing.bypass_TD
    assert torch.allclose(y.flatten(0, 1), dense + bypass, atol=1e-8)


@pytest.mark.parametrize("name", ROUTERS)
def test_relabelling_experts_changes_nothing(name):
    layer, (x, tokens) = adapted(layer_of(name)), batch()
    for state, buffer in layer.router.named_buffers():
        if state.endswith("bias_E"):
            buffer.copy_(torch.linspace(-0.2, 0.2, 6))
    before, routing = layer(x, tokens)
    order_E = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        layer.router.relabel(order_E)
        for weight in layer.experts.parameters():
            weight.copy_(weight[order_E])
    after, relabelled = layer(x, tokens)
    assert torch.allclose(before, after, atol=1e-12)
    assert torch.equal(routing.statistics["counts_E"][order_E], relabelled.statistics["counts_E"])
    for loss in routing.losses:
        assert torch.allclose(routing.losses[loss].value, relabelled.losses[loss].value, atol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_agree_with_finite_differences_under_replay(name):
    layer, (x, tokens) = layer_of(name), batch(B=2, S=5)
    # random directions through the Jacobian, forward against backward: its every entry would cost a hundred times as much
    with torch.no_grad():
        _, routing = layer(x, tokens)
    names = [key for key, _ in layer.named_parameters()]

    def value(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, again = torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x, tokens, routing.selection)
        )
        return y, auxiliary_loss(again).double()

    inputs = [t.detach().clone().requires_grad_() for t in (x, *layer.parameters())]
    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", ROUTERS)
def test_replay_reproduces_the_routing(name):
    layer, (x, tokens) = layer_of(name), batch()
    y, routing = layer(x, tokens)
    again, replayed = layer(x, tokens, routing.selection)
    assert torch.equal(y, again)
    assert torch.equal(routing.expert_R, replayed.expert_R)
    shifted = Selection(routing.selection.token_R, (routing.selection.expert_R + 1) % 6)
    _, forced = layer(x, tokens, shifted)
    assert torch.equal(forced.selection.expert_R, shifted.expert_R), "replay forces another choice"


def moves_earlier_outputs(layer: MoELayer) -> bool:
    """Whether changing the tokens after t changes outputs up to t, for a few t of a few batches."""
    for seed in range(3):
        x, tokens = batch(B=2, S=9, seed=seed)
        y, _ = layer(x, tokens)
        for t in (0, 3, 7):
            changed, ids = x.clone(), tokens.ids_T.view(2, 9).clone()
            changed[:, t + 1 :] = 3 * batch(B=2, S=9, seed=seed + 100)[0][:, t + 1 :]
            ids[:, t + 1 :] = 49 - ids[:, t + 1 :]
            after, _ = layer(changed, Tokens.of(ids))
            if not torch.allclose(after[:, : t + 1], y[:, : t + 1], atol=1e-12):
                return True
    return False


@pytest.mark.parametrize(
    ("name", "capacity"), [(n, c) for n, c in itertools.product(ROUTERS, [0.0, 0.6]) if not c or capacities(n)]
)
def test_causality_is_as_declared(name, capacity):
    """In training or in evaluation: a router that looks ahead in training only is not causal either."""
    layer = adapted(layer_of(name, capacity_factor=capacity))
    with torch.no_grad():
        moves = moves_earlier_outputs(layer) or moves_earlier_outputs(layer.train())
    assert moves is not layer.router.causal


def test_the_routers_that_look_ahead_are_these_four():
    ahead = {name for name in ROUTERS if not resolve_router(name).Router.causal}
    assert ahead == {"base", "expert_choice", "quantile_batch", "sinkhorn"}


@pytest.mark.parametrize("name", [n for n in ROUTERS if capacities(n)])
def test_capacity_drops_the_last_tokens_of_a_row(name):
    layer, (x, tokens) = layer_of(name, capacity_factor=0.5), batch()
    dropless = layer_of(name)
    _, full = dropless(x, tokens)
    y, routing = layer(x, tokens)
    capacity = 2  # ceil(0.5 · 11 · 2 / 6)
    wanted = full.expert_R.view(3, -1)
    for row in range(3):
        seen = dict.fromkeys(range(6), 0)
        for place, expert in enumerate(wanted[row].tolist()):
            kept = routing.expert_R.view(3, -1)[row, place].item()
            assert kept == (expert if seen[expert] < capacity else 6)
            seen[expert] += 1
    assert (routing.weight_R[routing.expert_R == 6] == 0).all()
    dropped = (full.statistics["counts_E"] - routing.statistics["kept_E"]).sum()
    assert dropped == (routing.expert_R == 6).sum() > 0
    assert torch.allclose(y, combined(layer, routing, x), atol=1e-10), "a dropped row adds nothing"


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_goes_nowhere_and_counts_nowhere(name):
    layer, (x, tokens) = adapted(layer_of(name)), batch()
    y, routing = layer(x, tokens)
    ids = torch.cat((tokens.ids_T.view(3, 11), torch.full((2, 11), 7)))
    valid = torch.cat((torch.ones(3, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.bool)))
    padded_x = torch.cat((x, torch.full((2, 11, D), 5.0, dtype=torch.float64)))
    after, padded = layer(padded_x, Tokens.of(ids, valid_BS=valid))
    assert torch.allclose(after[:3], y, atol=1e-12)
    assert (after[3:] == 0).all()
    for key in routing.statistics:
        assert torch.allclose(routing.statistics[key].double(), padded.statistics[key].double()), key
    for key, loss in routing.losses.items():
        assert torch.allclose(loss.value, padded.losses[key].value, atol=1e-12), key


@pytest.mark.parametrize("name", ROUTERS)
def test_forward_and_evaluation_leave_state_alone(name):
    layer, (x, tokens) = layer_of(name), batch()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.train()(x, tokens)
    layer.eval()(x, tokens)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_are_known_on_the_host(name):
    layer, (x, tokens) = layer_of(name), batch()
    with torch.no_grad():
        _, routing = layer(x, tokens)
    on_meta = Tokens(**{f.name: to_meta(getattr(tokens, f.name)) for f in fields(tokens)})
    shapes = plan(layer.router.to("meta")(x.flatten(0, 1).to("meta"), on_meta))
    assert shapes.token_P.shape == routing.token_R.shape, "no data-dependent shape, and no host synchronisation"


def to_meta(value: object) -> object:
    """Tensors to the meta device; everything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 7)])
def test_awkward_batches(name, shape):
    layer, (x, tokens) = layer_of(name), batch(*shape)
    y, routing = layer(x, tokens)
    assert y.shape == (*shape, D)
    assert torch.isfinite(y).all()
    assert torch.isfinite(auxiliary_loss(routing))


@pytest.mark.parametrize("name", ROUTERS)
def test_expected_rows_agree_with_the_routing(name):
    layer, (x, tokens) = layer_of(name), batch(B=4, S=24)
    _, routing = layer(x, tokens)
    expected = config_for(name, 6, 2).rows_per_token(num_experts=6, top_k=2)
    if layer.router.exact_rows:
        assert routing.statistics["kept_E"].sum().item() == pytest.approx(expected * 96, rel=0.01)
    assert 0 < expected <= 6


@pytest.mark.parametrize("name", ROUTERS)
def test_declared_parameters_are_those_of_the_module(name):
    layer = layer_of(name)
    config = config_for(name, 6, 2)
    declared = config.parameters(dim=D, num_experts=6, top_k=2)
    assert sum(p.numel() for p in layer.router.parameters()) == declared
    assert config.source, "the source's convention is stated"

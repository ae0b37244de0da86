"""The expert layer with the triton backend against the same layer with the reference backend: routing, output, gradients.

With that backend, `topk` and `loss_free` score and choose with moe_triton's kernel where it can do what they ask for.
"""

import pytest
import torch
from torch import Tensor

from moe.config.load import resolve_router
from moe.config.schema import MoE
from moe.errors import BackendError
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.routing import Routing, Tokens

KERNEL = "topk_fwd_kernel"


def layer_of(backend: str, router: str, precision: str = "native", experts: dict | None = None, **settings) -> MoELayer:
    """Six experts, two for each token; `experts` are more settings of theirs."""
    config = resolve_router(router).Config(**settings)
    sizes = {"num_experts": 6, "top_k": 2, "expert_hidden": 8, **(experts or {})}
    layer = MoELayer(MoE(**sizes, router=config, backend=backend, precision=precision), 16, layer=0)
    bias_E = getattr(layer.router, "bias_E", None)
    if bias_E is not None:
        bias_E.copy_(torch.linspace(-0.2, 0.2, 6))
    return layer


def run(layer: MoELayer, x_BSD: Tensor, dy_BSD: Tensor, **options) -> tuple[Routing, dict[str, Tensor]]:
    """The routing; output, losses and every gradient."""
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD, routing = layer(x_BSD, Tokens.of_hidden(x_BSD), **options)
    names = [name for name, _ in layer.named_parameters()]
    loss = (y_BSD * dy_BSD).sum() + auxiliary_loss(routing)
    gradients = torch.autograd.grad(loss, [x_BSD, *layer.parameters()])
    found = {"y": y_BSD.detach(), **dict(zip(["x", *names], gradients, strict=True))}
    found |= {name: loss.value.detach() for name, loss in routing.losses.items()}
    return routing, found


@pytest.mark.parametrize(
    "router, settings, fused",
    [
        ("topk", {}, True),
        ("topk", {"gate": "full", "score": "sigmoid", "scaling_factor": 2.5, "capacity_factor": 0.8}, True),
        pytest.param("topk", {"estimator": "dense_mixer"}, True, marks=pytest.mark.full),
        ("loss_free", {}, True),
        pytest.param("loss_free", {"score": "sqrt_softplus", "normalize": False}, True, marks=pytest.mark.full),
        ("loss_free", {"num_groups": 3, "top_groups": 2}, False),
        pytest.param("gpt_oss", {}, False, marks=pytest.mark.full),
    ],
)
def test_layer_equals_the_reference_backend(launches, router, settings, fused):
    layers = [layer_of(backend, router, **settings) for backend in ("reference", "triton")]
    x_BSD, dy_BSD = torch.randn(2, 2, 20, 16)
    (old, expected), (new, found) = (run(layer, x_BSD, dy_BSD) for layer in layers)
    assert (KERNEL in launches) == fused
    assert torch.equal(new.expert_R, old.expert_R)
    assert torch.equal(new.selection.expert_R, old.selection.expert_R)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6 * value.abs().max()), name
    for name, value in old.statistics.items():
        assert torch.allclose(new.statistics[name].double(), value.double(), rtol=1e-5), name


def test_clamped_experts_with_biases_equal_the_reference_backend():
    settings = {"activation": "swiglu_oai", "activation_alpha": 1.3, "activation_limit": 0.5, "expert_bias": True}
    layers = [layer_of(backend, "gpt_oss", experts=settings) for backend in ("reference", "triton")]
    values = {name: torch.randn(p.shape) for name, p in layers[0].experts.named_parameters()}
    for layer in layers:
        layer.experts.load_state_dict(values)
    x_BSD, dy_BSD = torch.randn(2, 2, 20, 16)
    expected, found = (run(layer, x_BSD, dy_BSD)[1] for layer in layers)
    assert {"experts.b_gate_EF", "experts.b_up_EF", "experts.b_down_ED"} <= expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max()), name


def test_a_replayed_choice_is_kept(launches):
    layer, other = layer_of("triton", "topk"), layer_of("reference", "topk")
    x_BSD, dy_BSD = torch.randn(2, 1, 20, 16)
    forced = run(layer, torch.randn(1, 20, 16), dy_BSD)[0].selection
    launches.clear()
    (new, found), (_, expected) = (run(which, x_BSD, dy_BSD, replay=forced) for which in (layer, other))
    assert KERNEL not in launches
    assert torch.equal(new.selection.expert_R, forced.expert_R)
    assert torch.allclose(found["y"], expected["y"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp8_row", pytest.param("fp8_block", marks=pytest.mark.full)])
def test_products_of_8_bits_are_those_of_the_reference_backend_and_not_the_native_ones(launches, precision):
    x_BSD, dy_BSD = torch.randn(2, 1, 20, 16)
    layers = [
        layer_of("reference", "topk", precision),
        layer_of("triton", "topk", precision),
        layer_of("reference", "topk"),
    ]
    expected, found, native = (run(layer, x_BSD, dy_BSD)[1] for layer in layers)
    assert launches.count("fp8_rows_kernel") == 4
    for name, value in expected.items():
        apart, price = ((other[name] - value).norm() / value.norm() for other in (found, native))
        assert apart < 1e-3, name  # one operand in a thousand on the other side of a rounding would be more
        assert price > 0.01 or name not in ("y", "x", "experts.w_up_EDF", "experts.w_down_EFD"), name


def test_products_of_8_bits_are_refused_where_a_router_weighs_the_experts_inputs():
    with pytest.raises(BackendError, match=r"'fp8_row' for a router that weighs the experts' inputs: use .*native"):
        run(layer_of("triton", "llama4", "fp8_row"), *torch.randn(2, 1, 20, 16))

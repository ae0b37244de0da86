"""Expert backends against the float64 reference (a loop in plain autograd): values, every gradient, memory, tracing.

Tolerance: twice the error of the same formula in plain torch at that type, plus a floor; results must be far above it.
"""

import copy

import pytest
import torch
from compiler import CPU
from torch import Tensor
from torch.nn.functional import silu

from moe.errors import BackendError
from moe.experts import BACKENDS, Experts, resolve_backend
from moe.experts.activation import Activation
from moe.init import BIASES
from moe.routing import Dispatch, Routing, Selection, plan

SHAPES = {
    # T, D, F, E, K: the reason
    (5, 16, 8, 8, 2): "fewer tokens than experts have rows in a tile",
    (33, 13, 7, 7, 3): "odd everything, prime E",
    (64, 16, 24, 4, 1): "K = 1",
    (20, 8, 8, 3, 3): "K = E",
    (0, 8, 8, 4, 2): "no tokens",
    (1, 8, 8, 1, 1): "one of each",
}
RUNNABLE = ("reference", "torch", CPU)  # triton's own tests run it under its interpreter
CLAMPED = Activation("swiglu_oai", alpha=1.3, limit=0.8)
"""Inputs are of unit scale: this limit cuts off a fifth of the gates and two fifths of what they multiply."""
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def routing_of(T: int, E: int, K: int, kind: str = "uniform") -> Routing:
    """A fixed routing: `uniform`, `one` expert for all, `empty` middle expert, or with rows that go `nowhere`."""
    expert_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    if kind == "one":
        expert_TK = torch.full((T, 1), E // 2)
        K = 1
    if kind == "empty":
        expert_TK[expert_TK == E // 2] = E
    if kind == "nowhere":
        expert_TK[::2] = E
    token_R = torch.arange(T).repeat_interleave(K)
    expert_R = expert_TK.flatten()
    weight_R = torch.where(expert_R < E, torch.rand(T * K) + 0.1, 0.0)
    return Routing(token_R, expert_R, weight_R, torch.arange(T + 1) * K, E, Selection(token_R, expert_R))


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's activation with CLAMPED's settings, written with the places that it clamps."""
    gate = torch.where(gate > CLAMPED.limit, CLAMPED.limit, gate)
    up = torch.where(up.abs() > CLAMPED.limit, CLAMPED.limit * up.detach().sign(), up)
    return (up + 1) * gate / (1 + torch.exp(-CLAMPED.alpha * gate))


def plain(x: Tensor, experts: Experts, dispatch: Dispatch) -> Tensor:
    """The same formula, written with masks instead of rows, at x's own type."""
    # everything takes part with factor 0, so that gradients exist even without rows
    y = 0 * x + 0 * (dispatch.weight_P.sum() + sum(w.sum() for w in experts.parameters())).to(x.dtype)
    biases = [getattr(experts, name, None) for name in BIASES]
    bounds = dispatch.offsets_E1.tolist()
    for e in range(len(bounds) - 1):
        for p in range(bounds[e], bounds[e + 1]):
            row = x[dispatch.token_P[p]]
            scale = dispatch.weight_P[p].to(x.dtype)
            row = row * scale if dispatch.weight_on == "input" else row
            w_gate, w_up, w_down = (
                w[e].to(x.dtype) for w in (experts.w_gate_EDF, experts.w_up_EDF, experts.w_down_EFD)
            )
            b_gate, b_up, b_down = (b[e].to(x.dtype) if b is not None else 0 for b in biases)
            gate, up = row @ w_gate + b_gate, row @ w_up + b_up
            out = (clamped(gate, up) if experts.activation == CLAMPED else silu(gate) * up) @ w_down + b_down
            y = y.index_add(
                0, dispatch.token_P[p : p + 1], (out if dispatch.weight_on == "input" else out * scale)[None]
            )
    return y


def run(function, x: Tensor, experts: Experts, routing: Routing, dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of `function` for copies of its inputs."""
    x = x.detach().clone().requires_grad_()
    experts = copy.deepcopy(experts)
    weight_R = routing.weight_R.detach().clone().to(experts.w_up_EDF.dtype).requires_grad_()
    dispatch = plan(Routing(**{**vars(routing), "weight_R": weight_R}))
    y = function(x, experts, dispatch)
    y.backward(dy.to(y.dtype))
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weight_R": weight_R.grad, **grads}


def build(T: int, D: int, F: int, E: int, dtype: torch.dtype, **options) -> tuple[Tensor, Experts, Tensor]:
    """Inputs of unit scale, so that outputs are too."""
    experts = Experts(E, D, F, **options).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for name, weight in experts.named_parameters():
            weight.copy_(torch.randn(weight.shape) / (1 if name in BIASES else weight.shape[1] ** 0.5))
    return torch.randn(T, D).to(dtype), experts, torch.randn(T, D)


def backend(name: str):
    """A backend as a function of (x, experts, dispatch)."""

    def call(x: Tensor, experts: Experts, dispatch: Dispatch) -> Tensor:
        experts.backend = name
        return experts(x, dispatch)

    return call


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "uniform") for shape in SHAPES), *(((33, 13, 7, 7, 3), k) for k in ("one", "empty", "nowhere"))],
)
def test_values_and_gradients_agree_with_the_reference(name, dtype, weight_on, shape, kind):
    agree(name, dtype, weight_on, shape, kind)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "kind", "weight_on", "options"),
    [
        ((33, 13, 7, 7, 3), "uniform", "output", {"bias": True, "activation": CLAMPED}),
        ((33, 13, 7, 7, 3), "empty", "input", {"bias": True, "activation": CLAMPED}),
        ((20, 8, 8, 3, 3), "nowhere", "output", {"bias": True}),
        ((64, 16, 24, 4, 1), "uniform", "input", {"activation": CLAMPED}),
        ((0, 8, 8, 4, 2), "uniform", "output", {"bias": True, "activation": CLAMPED}),
    ],
    ids=["gpt-oss", "gpt-oss on the input", "biases", "clamps", "no tokens"],
)
def test_clamps_and_biases_agree_with_the_plain_formula(name, dtype, shape, kind, weight_on, options):
    agree(name, dtype, weight_on, shape, kind, **options)


def agree(name: str, dtype: torch.dtype, weight_on: str, shape: tuple[int, ...], kind: str, **options) -> None:
    """Hold a backend's values and gradients to the criterion."""
    T, D, F, E, K = shape
    x, experts, dy = build(T, D, F, E, dtype, **options)
    routing = Routing(**{**vars(routing_of(T, E, K, kind)), "weight_on": weight_on})
    exact = run(plain, x.double(), copy.deepcopy(experts).double(), routing, dy)
    ours = run(backend(name), x, experts, routing, dy)
    rough = run(plain, x, experts, routing, dy)
    for key, value in exact.items():
        allowed = 2 * (rough[key].double() - value).abs().max() if value.numel() else 0
        scale = value.abs().max().item() if value.numel() else 0.0
        error = (ours[key].double() - value).abs().max().item() if value.numel() else 0.0
        assert error <= allowed + FLOOR[dtype] * max(scale, 1e-3), key
        if scale == 0:
            assert error == 0, f"{key} must be exactly zero"


def test_empty_expert_gets_exactly_zero_gradient():
    x, experts, dy = build(33, 13, 7, 7, torch.float32)
    grads = run(backend("torch"), x, experts, routing_of(33, 7, 3, "empty"), dy)
    for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
        assert (grads[name][3] == 0).all()
        assert (grads[name][2] != 0).any()


@pytest.mark.parametrize("name", RUNNABLE)
def test_expanded_gradients_and_strided_inputs(name):
    _, experts, _ = build(12, 16, 8, 4, torch.float64)
    routing = routing_of(12, 4, 2)
    dispatch = plan(routing)
    strided = torch.randn(16, 12, dtype=torch.float64).t().requires_grad_()
    backend(name)(strided, experts, dispatch).sum().backward()
    contiguous = strided.detach().contiguous().requires_grad_()
    plain(contiguous, experts, dispatch).sum().backward()
    assert torch.allclose(strided.grad, contiguous.grad)


def test_two_runs_are_bitwise_equal():
    x, experts, dy = build(64, 16, 24, 4, torch.float32)
    routing = routing_of(64, 4, 2)
    first, second = (run(backend("torch"), x, experts, routing, dy) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("E", [4, 16])
def test_backward_keeps_only_inputs_and_preactivations(dtype, E):
    T, D, F, K = 64, 16, 24, 2
    x, experts, _ = build(T, D, F, E, dtype)
    weights = [w.detach().to(dtype).requires_grad_() for w in experts.parameters()]
    parameters = {w.untyped_storage().data_ptr() for w in weights}
    weight_R = routing_of(T, E, K).weight_R
    dispatch = plan(routing_of(T, E, K))
    x.requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        BACKENDS["torch"](x, *weights, dispatch)
    hidden = (D + 2 * K * F) * T * x.element_size()
    indices = sum(t.untyped_storage().nbytes() for t in (dispatch.token_P, dispatch.offsets_E1)) + weight_R.nbytes
    assert sum(saved.values()) == hidden + indices


def test_nothing_is_kept_without_gradient():
    x, experts, _ = build(8, 16, 8, 4, torch.float32)
    dispatch = plan(routing_of(8, 4, 2))
    with torch.no_grad():
        out = torch.ops.moe_lab.expert_ffn(
            x,
            *experts.parameters(),
            *[None] * 3,
            dispatch.token_P,
            dispatch.weight_P,
            dispatch.offsets_E1,
            [8] * 4,
            False,
            False,
            *Activation(),
        )
    assert out[1].numel() == out[2].numel() == 0


@pytest.mark.parametrize("options", [{}, {"bias": True, "activation": CLAMPED}], ids=["plain", "gpt-oss"])
def test_operator_contract(options):
    x, experts, _ = build(9, 8, 6, 3, torch.float64, **options)
    dispatch = plan(routing_of(9, 3, 2))
    arguments = (
        x.requires_grad_(),
        *experts.parameters(),
        *([] if options else [None] * 3),
        dispatch.token_P,
        dispatch.weight_P.double().requires_grad_(),
    )
    rule = (dispatch.offsets_E1, [6] * 3, False, True, *experts.activation)
    torch.library.opcheck(torch.ops.moe_lab.expert_ffn, (*arguments, *rule))


@pytest.mark.parametrize("options", [{}, {"bias": True, "activation": CLAMPED}], ids=["plain", "gpt-oss"])
def test_gradcheck(options):
    x, experts, _ = build(5, 4, 3, 3, torch.float64, **options)
    dispatch = plan(routing_of(5, 3, 2))

    def function(x, w_gate, w_up, w_down, *others):
        *biases, weight_P = others
        rule = {"biases": tuple(biases), "activation": experts.activation} if biases else {}
        fields = {**vars(dispatch), "weight_P": weight_P}
        return BACKENDS["torch"](x, w_gate, w_up, w_down, Dispatch(**fields), **rule)

    inputs = [t.detach().clone().requires_grad_() for t in (x, *experts.parameters(), dispatch.weight_P.double())]
    assert torch.autograd.gradcheck(function, inputs)


def test_compiles_as_one_graph_without_recompiling_for_other_counts():
    x, experts, _ = build(24, 8, 6, 3, torch.float32)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(lambda x, dispatch: experts(x, dispatch), fullgraph=True, backend=count)
    for kind in ("uniform", "empty", "nowhere"):
        dispatch = plan(routing_of(24, 3, 2, kind))
        assert torch.allclose(compiled(x, dispatch), plain(x, experts, dispatch), atol=1e-5)
    assert graphs == 1


@pytest.mark.parametrize("name", ["triton", "block_sparse"])
def test_a_backend_that_cannot_run_is_refused_by_name(name):
    with pytest.raises(BackendError, match=f"'{name}'.*'torch'"):
        resolve_backend(name)
    assert resolve_backend("auto") in BACKENDS


@pytest.mark.parametrize("precision", ["fp8_row", "fp8_block"])
def test_the_reference_rounds_operands_to_8_bits_and_others_refuse(precision):
    x, experts, _ = build(24, 8, 6, 3, torch.float32)
    dispatch = plan(routing_of(24, 3, 2, "uniform"))
    rounding = Experts(3, 8, 6, "reference", precision=precision)
    rounding.load_state_dict(experts.state_dict())
    exact, found = plain(x, experts, dispatch), rounding(x, dispatch)
    error = (found - exact).norm() / exact.norm()
    assert 0.01 < error < 0.15  # three bits after the first: 2 to 3 % an operand
    with pytest.raises(BackendError, match=f"'{precision}' is computed by backend 'triton', or by 'reference'"):
        Experts(3, 8, 6, "torch", precision=precision)
    with pytest.raises(BackendError, match="experts of one width, and these have 2: use precision=native"):
        Experts(2, 8, 0, "reference", widths=(4, 6), precision=precision)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, 8, 6, "block_sparse"), {"bias": True}, "computes SwiGLU without biases.*expert_bias=true: use 'triton'"),
        ((3, 8, 6, "block_sparse"), {"activation": CLAMPED}, "activation=swiglu_oai: use 'triton'"),
        ((3, 8, 6, "reference"), {"bias": True, "precision": "fp8_row"}, "'fp8_row' is for SwiGLU without biases"),
        (
            (2, 8, 0, "torch"),
            {"bias": True, "widths": (4, 6)},
            r"one width.* 2 have 2, from 4 to 6: use expert_widths=\[\]",
        ),
    ],
    ids=["biases", "clamps", "precision", "widths"],
)
def test_what_cannot_take_biases_or_clamps_says_so(arguments, options, message):
    with pytest.raises(BackendError, match=message):
        Experts(*arguments, **options)


@pytest.mark.parametrize("name", RUNNABLE)
def test_clamped_experts_of_different_widths_are_each_their_own(name):
    """Packed experts of widths 3 and 5, each against a stack of one expert."""
    packed = Experts(2, 8, 0, name, widths=(3, 5), activation=CLAMPED)
    x, start, total = torch.randn(9, 8), 0, torch.zeros(9, 8)
    with torch.no_grad():
        for weight in packed.parameters():
            weight.copy_(torch.randn(weight.shape))
    routing = routing_of(9, 2, 2)
    for e, width in enumerate(packed.widths):
        one = Experts(1, 8, width, "reference", activation=CLAMPED)
        rows = slice(start, start + width)
        start += width
        gate, up, down = (w.detach()[rows] for w in packed.parameters())
        one.load_state_dict({"w_gate_EDF": gate.t()[None], "w_up_EDF": up.t()[None], "w_down_EFD": down[None]})
        kept = torch.where(routing.expert_R == e, 0, 1)
        weight_R = torch.where(kept == 0, routing.weight_R, 0.0)
        alone = Routing(**{**vars(routing), "expert_R": kept, "weight_R": weight_R, "num_experts": 1})
        total += one(x, plan(alone)).detach()
    torch.testing.assert_close(packed(x, plan(routing)).detach(), total)

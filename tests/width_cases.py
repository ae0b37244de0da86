"""What the tests of experts of different widths share: routings, and the loop over nn modules that layers must equal."""

from typing import Literal

import torch
from block_sparse_cases import routing_of
from torch import Tensor, nn
from torch.nn.functional import silu

from moe.experts import Experts
from moe.routing import Dispatch

# widths, tokens, rows per token, where rows go, where the weight is: the reason
CASES: dict[tuple[tuple[int, ...], int, int, str, Literal["output", "input"]], str] = {
    ((24, 7, 40, 16), 21, 2, "uniform", "output"): "odd widths, smaller and larger than a block",
    ((24, 7, 40, 16), 21, 2, "nowhere", "input"): "the weight on the input, rows that go nowhere",
    ((48, 16, 32), 9, 3, "uniform", "output"): "K = E, whole blocks",
    ((5, 64, 33, 17, 1), 17, 1, "one", "output"): "all rows to one expert, a width of 1",
    ((16, 40, 24), 20, 2, "empty", "input"): "an expert without rows",
    ((16, 8), 0, 1, "uniform", "output"): "no tokens",
    ((24, 24, 24), 19, 2, "nowhere", "output"): "equal widths",
}
DIM = 20


class Expert(nn.Module):
    """One SwiGLU network of torch's own linear layers, in float64."""

    def __init__(self, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_FD: Tensor) -> None:
        super().__init__()
        F, D = w_up_FD.shape
        self.gate, self.up = (nn.Linear(D, F, bias=False, dtype=torch.float64) for _ in range(2))
        self.down = nn.Linear(F, D, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.gate.weight.copy_(w_gate_FD)
            self.up.weight.copy_(w_up_FD)
            self.down.weight.copy_(w_down_FD.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


def rows_of(experts: Experts) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(gate, up, down) [F, D] of each expert, cut out of the parameters by arithmetic of this file."""
    if hasattr(experts, "w_up_EDF"):
        return [(g.t(), u.t(), d) for g, u, d in zip(*experts.parameters(), strict=True)]
    ends = [sum(experts.widths[: e + 1]) for e in range(len(experts.widths))]
    return [
        tuple(w[end - width : end] for w in (experts.w_gate_FD, experts.w_up_FD, experts.w_down_FD))
        for width, end in zip(experts.widths, ends, strict=True)
    ]


def loop_of(experts: Experts) -> list[Expert]:
    """The experts, a module each."""
    return [Expert(*(w.detach().double() for w in weights)) for weights in rows_of(experts)]


def loop(modules: list[Expert], x: Tensor, dispatch: Dispatch) -> Tensor:
    """y_t = Σ weight · expert(x_t), one expert after another."""
    y = torch.zeros_like(x)
    bounds = dispatch.offsets_E1.tolist()
    for module, start, end in zip(modules, bounds[:-1], bounds[1:], strict=True):
        token, weight = dispatch.token_P[start:end], dispatch.weight_P[start:end, None]
        rows = x[token]
        out = module(rows * weight) if dispatch.weight_on == "input" else module(rows) * weight
        y = y.index_add(0, token, out)
    return y


def dispatch_of(T: int, K: int, E: int, kind: str, weight_on: Literal["output", "input"]) -> Dispatch:
    """A routing in expert order, weights in float64 and differentiable."""
    token_P, weight_P, offsets_E1 = routing_of((1,) * E, T, K, kind)
    weight_P = weight_P.double().requires_grad_()
    return Dispatch(torch.arange(T * K), token_P, weight_P, offsets_E1, offsets_E1.diff(), weight_on)


def check_experts(backend: str, case: tuple) -> None:
    """Output and every gradient of `Experts` in float64 against the loop."""
    widths, T, K, kind, weight_on = case
    experts = Experts(len(widths), DIM, 8, backend, widths=widths).double()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.4)
    dispatch = dispatch_of(T, K, len(widths), kind, weight_on)
    x, dy = torch.randn(T, DIM, dtype=torch.float64, requires_grad=True), torch.randn(T, DIM, dtype=torch.float64)

    modules = loop_of(experts)
    y = loop(modules, x, dispatch)
    leaves = [x, dispatch.weight_P, *(p for module in modules for p in module.parameters())]
    dx, dweight, *dloop = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)

    found = experts(x, dispatch)
    found.backward(dy)
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dispatch.weight_P.grad, dweight, rtol=1e-12, atol=1e-12)
    for weight in experts.parameters():
        weight.data = weight.grad  # so that the same cuts give each expert's gradients
    for e, (gate, up, down) in enumerate(rows_of(experts)):
        wanted = dloop[3 * e : 3 * e + 3]
        for name, a, b in zip(("gate", "up", "down"), (gate, up, down.t()), wanted, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-12, atol=1e-12, msg=lambda text, n=name, e=e: f"{n} of {e}: {text}"
            )
    if T:
        assert all(g.abs().max() > 1e-3 for g in (y, dx, dweight)), "too small to say anything"

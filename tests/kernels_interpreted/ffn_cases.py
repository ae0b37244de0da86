"""Inputs of the expert FFN, the formula in plain torch at any type, and the criterion that a result must meet.

`plain` is written with a loop over rows' experts and autograd, independently of moe_triton.reference. In float64 it is the
exact value; at the tested type it is what plain torch makes of it, and a kernel may err twice as much.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from moe_triton import ffn

ALPHA, LIMIT = 1.3, 0.8
"""Of swiglu_oai here: inputs are of unit scale, so this limit cuts off a fifth of the gates and two fifths of the others."""


def swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's activation, written with the places that it clamps."""
    gate = torch.where(gate > LIMIT, LIMIT, gate)
    up = torch.where(up.abs() > LIMIT, LIMIT * up.detach().sign(), up)
    return (up + 1) * gate / (1 + torch.exp(-ALPHA * gate))


ACTIVATIONS = {
    "swiglu": lambda gate, up: silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "swiglu_oai": swiglu_oai,
    "relu2": lambda _, up: relu(up) ** 2,
    "gelu": lambda _, up: gelu(up),
    "silu": lambda _, up: silu(up),
}
GATED = ("swiglu", "geglu", "swiglu_oai")


@dataclass(frozen=True)
class Case:
    """One point of the suite."""

    T: int = 33
    D: int = 97
    F: int = 47
    E: int = 7
    K: int = 2
    routing: str = "uniform"
    dtype: torch.dtype = torch.float32
    activation: str = "swiglu"
    biased: bool = False
    weight_on: str = "output"
    recompute: str = "activation"
    gradient: str = "dense"
    """What the incoming gradient is: dense, expanded (stride 0), strided or sliced out of a larger tensor."""
    capacity: int | None = None
    """Rows that an expert takes from every 8 tokens; None for all."""

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in vars(self).values())


Rows = tuple[Tensor, Tensor, Tensor]


def rows_of(case: Case) -> Rows:
    """(token_R, expert_R, token_offsets) of the case's routing; repeated experts where K > E."""
    T, E, K = case.T, case.E, case.K
    counts_T = torch.full((T,), K)
    if case.routing == "ragged":  # 0 to 2·K rows per token
        counts_T = torch.randint(0, 2 * K + 1, (T,))
    token_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts_T.cumsum(0)])
    token_R = torch.arange(T).repeat_interleave(counts_T)
    weight_E = torch.ones(E)
    if case.routing == "zipf":
        weight_E = 1 / torch.arange(1, E + 1)
    if case.routing == "ragged" or K > E:
        expert_R = weight_E.multinomial(max(len(token_R), 1), replacement=True)[: len(token_R)]
    else:
        expert_R = torch.cat([torch.zeros(0, dtype=torch.int64), *(weight_E.multinomial(K) for _ in range(T))])
    nowhere = {"empty_first": 0, "empty_middle": E // 2, "empty_last": E - 1}.get(case.routing)
    if nowhere is not None:
        expert_R[expert_R == nowhere] = E
    if case.routing == "one":
        expert_R.fill_(E // 2)
    if case.routing == "ragged":
        expert_R[::5] = E
    return token_R, expert_R, token_offsets


def inputs_of(case: Case, rows: Rows) -> dict[str, Tensor]:
    """Differentiable inputs of unit scale in the case's type, so that outputs and gradients are of unit scale too."""
    T, D, F, E = case.T, case.D, case.F, case.E
    inputs = {
        "x": torch.randn(T, D),
        "w_gate": torch.randn(E, D, F) / D**0.5,
        "w_up": torch.randn(E, D, F) / D**0.5,
        "w_down": torch.randn(E, F, D) / F**0.5,
        "b_gate": torch.randn(E, F),
        "b_up": torch.randn(E, F),
        "b_down": torch.randn(E, D),
    }
    if case.activation not in GATED:
        del inputs["w_gate"], inputs["b_gate"]
    if not case.biased:
        inputs = {name: tensor for name, tensor in inputs.items() if not name.startswith("b_")}
    inputs = {name: tensor.to(case.dtype) for name, tensor in inputs.items()}
    weight_R = (torch.rand(len(rows[0])) + 0.2) * torch.randn(len(rows[0])).sign()
    return {**inputs, "weight": torch.where(rows[1] < E, weight_R, 0.0)}


def gradient_of(case: Case) -> Tensor:
    """The gradient of y [T, D], in the layout that the case asks for."""
    T, D = case.T, case.D
    if case.gradient == "expanded":
        return torch.randn(D).to(case.dtype).expand(T, D)
    if case.gradient == "strided":
        return torch.randn(D, T).to(case.dtype).t()
    if case.gradient == "sliced":
        return torch.randn(T, D + 3).to(case.dtype)[:, 1 : D + 1]
    return torch.randn(T, D).to(case.dtype)


def kept_experts(case: Case, rows: Rows) -> Tensor:
    """expert_R with E where the capacity is used up, counted one row after the other."""
    expert_R, taken = rows[1].clone(), Counter()
    for r, key in enumerate(zip((rows[0] // 8).tolist(), rows[1].tolist(), strict=True)):
        taken[key] += 1
        if case.capacity is not None and taken[key] > case.capacity:
            expert_R[r] = case.E
    return expert_R


def plain(case: Case, rows: Rows, inputs: dict[str, Tensor]) -> Tensor:
    """The same formula in plain torch at x's own type, one expert at a time."""
    token_R, expert_R = rows[0], kept_experts(case, rows)
    x = inputs["x"]
    y = x * 0 + sum((tensor.sum() * 0).to(x.dtype) for tensor in inputs.values())  # every input takes part
    for e in range(case.E):
        which = (expert_R == e).nonzero().flatten()
        token, scale = token_R[which], inputs["weight"][which].to(x.dtype)[:, None]
        row = x.index_select(0, token)
        if case.weight_on == "input":
            row = row * scale

        def product(rows: Tensor, name: str, e: int = e) -> Tensor:
            out = rows @ inputs[f"w_{name}"][e]
            return out + inputs[f"b_{name}"][e] if f"b_{name}" in inputs else out

        gate = product(row, "gate") if "w_gate" in inputs else None
        out = product(ACTIVATIONS[case.activation](gate, product(row, "up")), "down")
        y = y.index_add(0, token, out if case.weight_on == "input" else out * scale)
    return y


def kernels(case: Case, rows: Rows, inputs: dict[str, Tensor]) -> Tensor:
    """The operator under test."""
    token_R, expert_R, token_offsets = rows
    return ffn.expert_ffn(
        inputs["x"],
        inputs.get("w_gate"),
        inputs["w_up"],
        inputs["w_down"],
        token_R,
        expert_R,
        inputs["weight"],
        token_offsets,
        num_experts=case.E,
        activation=case.activation,
        alpha=ALPHA,
        limit=LIMIT,
        b_gate_EF=inputs.get("b_gate"),
        b_up_EF=inputs.get("b_up"),
        b_down_ED=inputs.get("b_down"),
        weight_on=case.weight_on,  # pyright: ignore[reportArgumentType]
        recompute=case.recompute,  # pyright: ignore[reportArgumentType]
        capacity=case.capacity,
        tokens_per_group=None if case.capacity is None else 8,
    )


def results(function, case: Case, rows: Rows, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradient of every input, in float64."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(case, rows, inputs)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach().double(), **{k: g.double() for k, g in zip(inputs, gradients, strict=True)}}


def rms(tensor: Tensor) -> float:
    """Root mean square; 0 for an empty tensor."""
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


UNIT = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative rounding error of each type."""
SAYS_SOMETHING = {torch.float64: 100, torch.float32: 100, torch.float16: 100, torch.bfloat16: 30}
"""How far above its tolerance a result must lie; plain torch's own error in bfloat16 allows no more than 30."""


def check(case: Case, function=kernels) -> None:
    """Assert the criterion for y and every gradient.

    The error is at most twice plain torch's plus a rounding unit, in the mean square and at its largest; the result must
    lie far above that tolerance, and what is zero everywhere must be exactly zero.
    """
    rows = rows_of(case)
    inputs, dy = inputs_of(case, rows), gradient_of(case)
    ours = results(function, case, rows, inputs, dy)
    rough = results(plain, case, rows, inputs, dy)
    exact = results(plain, case, rows, {k: t.double() for k, t in inputs.items()}, dy.double())
    for name, value in exact.items():
        error, allowed, scale = ours[name] - value, rough[name] - value, rms(value)
        if scale == 0:
            assert not ours[name].any(), f"{name} must be exactly zero"
            continue
        # a mean over few elements scatters: one number can be right by luck in plain torch
        unit = UNIT[case.dtype] * (1 + 3 / value.numel() ** 0.5)
        tolerance = 2 * rms(allowed) + unit * scale
        assert rms(error) <= tolerance, f"{name}: error {rms(error):.3g}, tolerance {tolerance:.3g}, value {scale:.3g}"
        most, largest = 2 * allowed.abs().max() + 4 * UNIT[case.dtype] * value.abs().max(), error.abs().max()
        assert largest <= most, f"{name}: largest error {largest:.3g}, allowed {most:.3g}"
        says = SAYS_SOMETHING[case.dtype] * tolerance <= scale
        assert says, f"{name}: a tolerance of {tolerance:.3g} for a result of {scale:.3g} says little"

"""The layers that scripts/gpu_check times beside ours: same rows, same products, other dataflows.

`ARMS[name](shape, inputs)` takes the arguments of moe_triton.ffn.expert_ffn and gives (layer, its own arguments): weights are
brought into the layer's own layout there, outside what is timed. An arm that is not installed raises ImportError.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_triton.ffn import expert_ffn
from moe_triton.roofline import Shape

Inputs = dict[str, Any]
Arm = tuple[Callable[..., Tensor], Inputs]


def _ours(shape: Shape, inputs: Inputs) -> Arm:
    return expert_ffn, inputs


def _ours_recompute(shape: Shape, inputs: Inputs) -> Arm:
    return expert_ffn, {**inputs, "recompute": "hidden"}


def grouped_mm_layer(
    x_TD: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_R: Tensor,
    expert_R: Tensor,
    weight_R: Tensor,
    token_offsets: Tensor,
    num_experts: int,
) -> Tensor:
    """torch's grouped product and eager operators, as most trainers write it: sort, gather, three products, weighted sum."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    order = torch.argsort(expert_R, stable=True)
    token_P = token_R[order]
    ends_E = torch.bincount(expert_R, minlength=num_experts).cumsum(0).to(torch.int32)
    rows = x_TD[token_P]
    hidden = silu(product(rows, w_gate_EDF, offs=ends_E)) * product(rows, w_up_EDF, offs=ends_E)
    out = product(hidden, w_down_EFD, offs=ends_E) * weight_R[order].to(x_TD.dtype).unsqueeze(1)
    return torch.zeros_like(x_TD).index_add(0, token_P, out)


def _grouped_mm(shape: Shape, inputs: Inputs) -> Arm:
    return grouped_mm_layer, inputs


def dense_layer(x_TD: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """A dense SwiGLU, gate and up in one product."""
    gate, up = (x_TD @ w_up).chunk(2, dim=-1)
    return (silu(gate) * up) @ w_down


def _dense(shape: Shape, inputs: Inputs) -> Arm:
    """K·F hidden columns for every token: equal active FLOPs."""
    x_TD, hidden = inputs["x_TD"], round(shape.K * shape.F)
    options = {"device": x_TD.device, "dtype": x_TD.dtype}
    w_up = (torch.randn(shape.D, 2 * hidden, **options) * shape.D**-0.5).requires_grad_()
    w_down = (torch.randn(hidden, shape.D, **options) * hidden**-0.5).requires_grad_()
    return dense_layer, {"x_TD": x_TD, "w_up": w_up, "w_down": w_down}


def _leaf(*parts: Tensor, transpose: bool) -> Tensor:
    joined = torch.cat([part.detach() for part in parts], dim=2)
    return (joined.transpose(1, 2) if transpose else joined).contiguous().requires_grad_()


def _liger(shape: Shape, inputs: Inputs) -> Arm:
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    arguments = {
        "x": inputs["x_TD"],
        "w_up": _leaf(inputs["w_gate_EDF"], inputs["w_up_EDF"], transpose=True),
        "w_down": _leaf(inputs["w_down_EFD"], transpose=True),
        "expert_TK": inputs["expert_R"].view(shape.T, -1).to(torch.int32),
        "weight_TK": inputs["weight_R"].detach().view(shape.T, -1).requires_grad_(),
    }
    return lambda **named: function.apply(*named.values()), arguments


def _scattermoe(shape: Shape, inputs: Inputs) -> Arm:
    module = import_module("scattermoe.parallel_experts")
    K, E = round(shape.K), shape.E

    def layer(x: Tensor, w_up: Tensor, w_down: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        order = module.flatten_sort_count(expert_TK, num_experts=E)
        gate, up = module.parallel_linear(x, w_up, K, *order, grouped_out=True).chunk(2, dim=-1)
        return module.parallel_linear(silu(gate) * up, w_down, 1, *order, grouped_in=True, gates=weight_TK)

    return layer, {
        "x": inputs["x_TD"],
        "w_up": _leaf(inputs["w_gate_EDF"], inputs["w_up_EDF"], transpose=False),
        "w_down": inputs["w_down_EFD"],
        "expert_TK": inputs["expert_R"].view(shape.T, K),
        "weight_TK": inputs["weight_R"].detach().to(inputs["x_TD"].dtype).view(shape.T, K).requires_grad_(),
    }


def _megablocks(shape: Shape, inputs: Inputs) -> Arm:
    """Its dropless GLU layer on grouped products, with weights of its own."""
    arguments = import_module("megablocks.layers.arguments").Arguments(
        hidden_size=shape.D,
        ffn_hidden_size=shape.F,
        moe_num_experts=shape.E,
        moe_top_k=round(shape.K),
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=inputs["x_TD"].device,
    )
    module = import_module("megablocks.layers.dmoe").ParallelDroplessMLP(arguments)

    def layer(x: Tensor, expert_TK: Tensor, weight_TK: Tensor, **_: Tensor) -> Tensor:
        out = module(x.unsqueeze(1), None, weight_TK, expert_TK)
        return (out[0] if isinstance(out, tuple) else out).squeeze(1)

    return layer, {
        "x": inputs["x_TD"],
        "expert_TK": inputs["expert_R"].view(shape.T, -1),
        "weight_TK": inputs["weight_R"].detach().to(inputs["x_TD"].dtype).view(shape.T, -1).requires_grad_(),
        **dict(module.named_parameters()),
    }


ARMS: dict[str, Callable[[Shape, Inputs], Arm]] = {
    "ours": _ours,
    "ours_recompute": _ours_recompute,
    "grouped_mm": _grouped_mm,
    "dense": _dense,
    "liger": _liger,
    "scattermoe": _scattermoe,
    "megablocks": _megablocks,
}
"""The last three follow other projects' interfaces of 2026; where those have moved, the failure is reported, not repaired."""


def step_of(arm: Arm, dy_TD: Tensor, *, backward: bool) -> Callable[[], object]:
    """A function that runs a layer once, and its backward; gradients are dropped."""
    layer, inputs = arm
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]

    def forward_only() -> None:
        with torch.no_grad():
            layer(**inputs)

    return (lambda: torch.autograd.grad(layer(**inputs), leaves, dy_TD)) if backward else forward_only

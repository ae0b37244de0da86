"""Plain torch references: the specification of every kernel, without triton.

Computed in float32 (float64 stays float64) with ordinary autograd, one expert at a time, and cast back to the input's type.
"""

import torch
from torch import Tensor


def expert_ffn(
    x_TD: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    *,
    weight_on: str = "output",
) -> Tensor:
    """y_t = Σ over rows p of token t: weight_p · FFN_e(x_t), with FFN_e(x) = (silu(x W_gate) · (x W_up)) W_down.

    Args: x_TD [T, D]; expert weights [E, D, F], [E, D, F], [E, F, D]; rows in expert order: token_P [P] int64, weight_P [P]
    float; rows of expert e are offsets_E1[e] : offsets_E1[e+1], and rows past the last offset go nowhere.
    weight_on "input" multiplies x_t by the weight before the expert instead of its output after. Returns y_TD, x_TD's type.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x, w_gate, w_up, w_down, weight = (t.to(dtype) for t in (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_P))
    y_TD = torch.zeros_like(x)
    bounds = offsets_E1.tolist()  # host sync: the reference loops over experts
    for expert, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        token = token_P[start:end]
        scale = weight[start:end].unsqueeze(1)
        rows = x.index_select(0, token)
        if weight_on == "input":
            rows = rows * scale
        hidden = torch.nn.functional.silu(rows @ w_gate[expert]) * (rows @ w_up[expert])
        out = hidden @ w_down[expert]
        y_TD = y_TD.index_add(0, token, out if weight_on == "input" else out * scale)
    return y_TD.to(x_TD.dtype)

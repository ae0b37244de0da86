"""Plain torch references: the specification of every kernel, without triton.

Computed in float32 (float64 stays float64) with ordinary autograd, one expert at a time, and cast back to the input's type.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu, softplus

ACTIVATIONS: dict[str, Callable[[Tensor | None, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: silu(_given(gate)) * up,
    "geglu": lambda gate, up: gelu(_given(gate)) * up,
    "relu2": lambda gate, up: relu(up).square(),
    "gelu": lambda gate, up: gelu(up),
    "silu": lambda gate, up: silu(up),
}
"""Hidden value from the products with W_gate and W_up; the last three have no W_gate."""


def _given(gate: Tensor | None) -> Tensor:
    assert gate is not None, "this activation has a gate"
    return gate


def expert_ffn(
    x_TD: Tensor,
    w_gate_EDF: Tensor | None,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    *,
    weight_on: str = "output",
    activation: str = "swiglu",
    b_gate_EF: Tensor | None = None,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
) -> Tensor:
    """y_t = Σ over rows p of token t: weight_p · FFN_e(x_t), with FFN_e(x) = (silu(x W_gate) · (x W_up)) W_down.

    Args: x_TD [T, D]; expert weights [E, D, F], [E, D, F], [E, F, D], biases [E, F], [E, F], [E, D]; rows in expert order:
    token_P [P] int64, weight_P [P] float; rows of expert e are offsets_E1[e] : offsets_E1[e+1], and rows past the last offset
    go nowhere. weight_on "input" multiplies x_t by the weight before the expert instead of its output after. Other
    activations: ACTIVATIONS. Returns y_TD, x_TD's type.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x, w_up, w_down, weight = (t.to(dtype) for t in (x_TD, w_up_EDF, w_down_EFD, weight_P))
    y_TD = torch.zeros_like(x)
    bounds = offsets_E1.tolist()  # host sync: the reference loops over experts
    for expert, (start, end) in enumerate(pairwise(bounds)):
        token = token_P[start:end]
        scale = weight[start:end].unsqueeze(1)
        rows = x.index_select(0, token)
        if weight_on == "input":
            rows = rows * scale
        gate = None if w_gate_EDF is None else _affine(rows, w_gate_EDF[expert].to(dtype), b_gate_EF, expert)
        hidden = ACTIVATIONS[activation](gate, _affine(rows, w_up[expert], b_up_EF, expert))
        out = _affine(hidden, w_down[expert], b_down_ED, expert)
        y_TD = y_TD.index_add(0, token, out if weight_on == "input" else out * scale)
    return y_TD.to(x_TD.dtype)


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    out = rows @ weight
    return out if bias is None else out + bias[expert].to(out.dtype)


def routing_plan(
    token_R: Tensor, expert_R: Tensor, *, num_experts: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """(token_P, row_P, reverse_R, offsets_E1, tiles) of rows ordered by expert, stably; rows that go nowhere are last.

    token_R, expert_R [R] int64; an index that is no expert goes nowhere. Row p of the order is row row_P[p] of the routing
    and reverse_R is the inverse; tiles are the (expert, first row) of every `tile_rows` rows of one expert, in order.
    """
    inside = (expert_R >= 0) & (expert_R < num_experts)
    row_P = torch.where(inside, expert_R, num_experts).argsort(stable=True)
    reverse_R = torch.empty_like(row_P)
    reverse_R[row_P] = torch.arange(len(row_P), device=row_P.device)
    counts_E = torch.bincount(expert_R[inside], minlength=num_experts)
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    bounds = offsets_E1.tolist()  # host sync: the reference loops over experts
    spans = enumerate(pairwise(bounds))
    tiles = [(expert, row) for expert, (start, end) in spans for row in range(start, end, tile_rows)]
    return token_R[row_P], row_P, reverse_R, offsets_E1, tiles


def drop_beyond_capacity(
    token_R: Tensor, expert_R: Tensor, *, num_experts: int, capacity: int, tokens_per_group: int
) -> Tensor:
    """expert_R with E for a row that `capacity` rows of its expert precede in its group, of tokens_per_group tokens each."""
    rows: dict[tuple[int, int], int] = {}
    kept = []
    for token, expert in zip(token_R.tolist(), expert_R.tolist(), strict=True):  # host sync: one row after the other
        key = token // tokens_per_group, expert
        rows[key] = rows.get(key, 0) + 1
        kept.append(expert if 0 <= expert < num_experts and rows[key] <= capacity else num_experts)
    return torch.tensor(kept, dtype=expert_R.dtype, device=expert_R.device)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrt_softplus": lambda logits: softplus(logits).sqrt(),
}
"""Scores of the experts [T, E] from logits [T, E]."""


def score_topk(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    normalize: bool = False,
    scaling_factor: float = 1.0,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight_TK, expert_TK, score_TE): the k experts of the largest logits, or of the largest score + bias, and their weights.

    logits_TE [T, E], computed in float32 (float64 stays). Of equals the lower expert comes first; NaN ranks above all. The
    weights are the chosen scores, divided by their sum (at least 1e-20) if `normalize`, times scaling_factor. bias_E is in
    no weight and has no gradient.
    """
    logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    score_TE = SCORES[score](logits)
    key_TE = logits if bias_E is None else score_TE + bias_E.to(score_TE.dtype)
    expert_TK = key_TE.detach().argsort(dim=1, descending=True, stable=True)[:, :k]
    weight_TK = score_TE.gather(1, expert_TK)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=1e-20)
    return weight_TK * scaling_factor, expert_TK, score_TE

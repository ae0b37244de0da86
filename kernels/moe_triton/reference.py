"""Plain torch references: the specification of every kernel, without triton.

Computed in float32 (float64 stays float64) with ordinary autograd, one expert at a time, and cast back to the input's type.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu, softplus

ALPHA, LIMIT = 1.702, 7.0
"""Of swiglu_oai, as gpt-oss has them."""


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float = ALPHA, limit: float = LIMIT) -> Tensor:
    """(u + 1)·g·sigmoid(alpha·g), with g = min(gate, limit) and u = up clamped to ±limit (gpt-oss, arXiv 2508.10925)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * (alpha * gate).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor | None, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: silu(_given(gate)) * up,
    "geglu": lambda gate, up: gelu(_given(gate)) * up,
    "swiglu_oai": lambda gate, up: swiglu_oai(_given(gate), up),
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
    alpha: float = ALPHA,
    limit: float = LIMIT,
    b_gate_EF: Tensor | None = None,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    precision: str = "native",
) -> Tensor:
    """y_t = Σ over rows p of token t: weight_p · FFN_e(x_t), with FFN_e(x) = (silu(x W_gate) · (x W_up)) W_down.

    Args: x_TD [T, D]; expert weights [E, D, F], [E, D, F], [E, F, D], biases [E, F], [E, F], [E, D]; rows in expert order:
    token_P [P] int64, weight_P [P] float; rows of expert e are offsets_E1[e] : offsets_E1[e+1], and rows past the last offset
    go nowhere. weight_on "input" multiplies x_t by the weight before the expert instead of its output after. Other
    activations: ACTIVATIONS; alpha and limit are of swiglu_oai. precision "fp8_row" or "fp8_block" rounds the operands of
    the products, and of those of the rows' gradients, to what e4m3 and its scales can say (`rounded`). Returns y_TD, x_TD's
    type.
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
        w_gate = [] if w_gate_EDF is None else [w_gate_EDF[expert].to(dtype)]
        *gates, up = _products(rows, [*w_gate, w_up[expert]], precision)
        gate, up = _biased(gates[0], b_gate_EF, expert) if gates else None, _biased(up, b_up_EF, expert)
        if activation == "swiglu_oai":
            hidden = swiglu_oai(_given(gate), up, alpha, limit)
        else:
            hidden = ACTIVATIONS[activation](gate, up)
        # Rounded products take s·a for s·(a·W): the same, as scales absorb s, and the gradient of s is <dA, a> with dA rounded
        early = precision != "native" and weight_on == "output"
        (out,) = _products(hidden * scale if early else hidden, [w_down[expert]], precision)
        if b_down_ED is not None:
            bias = b_down_ED[expert].to(dtype)
            out = out + (scale * bias if early else bias)
        y_TD = y_TD.index_add(0, token, out if early or weight_on == "input" else out * scale)
    return y_TD.to(x_TD.dtype)


def _biased(out: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return out if bias is None else out + bias[expert].to(out.dtype)


def _products(rows: Tensor, weights: list[Tensor], precision: str) -> tuple[Tensor, ...]:
    """rows @ weight for each weight [K, N]."""
    if precision == "native":
        return tuple(rows @ weight for weight in weights)
    return _RoundedProducts.apply(rows, precision, *weights)  # pyright: ignore[reportReturnType]


class _RoundedProducts(torch.autograd.Function):
    """Products of rounded operands; so is the rows' gradient, and the weights' gradients are of operands as they are."""

    @staticmethod
    def forward(ctx, rows: Tensor, precision: str, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, *weights)
        ctx.precision = precision
        (x,) = rounded([rows], precision)
        return tuple(x @ rounded([weight.t()], precision, weight=True)[0].t() for weight in weights)

    @staticmethod
    def backward(ctx, *dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, *weights = ctx.saved_tensors
        d, w = rounded(list(dout), ctx.precision), rounded(weights, ctx.precision, weight=True)
        drows = sum(part @ weight.t() for part, weight in zip(d, w, strict=True))
        return (drows, None, *(rows.t() @ part for part in dout))


def rounded(parts: list[Tensor], precision: str, *, weight: bool = False, dtype: torch.dtype = torch.float8_e4m3fn):
    """Operands [rows, K] through `dtype` and back, scaled so that the largest of every group of elements is its largest.

    A group is a row of all parts together (fp8_row), or 128 elements of a row of one part, and 128 × 128 of a `weight`
    (fp8_block). All zeros stay zeros.
    """
    if precision == "fp8_row":
        sizes = [part.shape[1] for part in parts]
        joined = torch.cat(parts, dim=1)
        return _through(joined, joined.abs().amax(1, keepdim=True), dtype).split(sizes, dim=1)
    assert precision == "fp8_block", precision
    return [_through(part, _block_maxima(part, 128 if weight else 1), dtype) for part in parts]


def _through(x: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    scale = torch.where(largest > 0, largest / limit, 1.0)
    return (x / scale).clamp(-limit, limit).to(dtype).to(x.dtype) * scale


def _block_maxima(x: Tensor, rows: int) -> Tensor:
    """At each element, the largest magnitude within its `rows` × 128 elements."""
    M, K = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -K % 128, 0, -M % rows))
    blocks = padded.view(-(-M // rows), rows, -(-K // 128), 128)
    return blocks.amax((1, 3), keepdim=True).expand_as(blocks).flatten(2, 3).flatten(0, 1)[:M, :K]


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """One product per group: 2d×3d, 3d×2d and 2d×2d with offs [G], the ends of the groups along the ragged dimension; 3d×3d.

    a [M, K] or [G, M, K], b [K, N] or [G, K, N]. Returns [M, N] if one operand is 2d, else [G, M, N], of out_dtype or a's
    type; zero past the last offset.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    x, y = a.to(dtype), b.to(dtype)
    bounds = [0] if offs is None else [0, *offs.tolist()]  # host sync: the reference loops over groups
    spans = list(enumerate(pairwise(bounds)))
    if offs is None:
        out = x @ y
    elif a.dim() == b.dim():
        parts = [x[:, start:end] @ y[start:end] for _, (start, end) in spans]
        out = torch.stack(parts) if parts else x.new_zeros(0, x.shape[0], y.shape[1])
    elif a.dim() == 2:
        rest = x.new_zeros(x.shape[0] - bounds[-1], y.shape[2])
        out = torch.cat([*(x[start:end] @ y[g] for g, (start, end) in spans), rest])
    else:
        rest = x.new_zeros(x.shape[1], y.shape[1] - bounds[-1])
        out = torch.cat([*(x[g] @ y[:, start:end] for g, (start, end) in spans), rest], dim=1)
    return out.to(out_dtype or a.dtype)


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

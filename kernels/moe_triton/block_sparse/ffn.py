"""The expert FFN for experts of different widths: y_t = Σ w · (silu(x_t W_gate) · (x_t W_up)) W_down over the rows of t.

No grouped product takes experts of unequal width. Here the hidden activations of all rows are one block-sparse matrix,
expert e's rows × expert e's columns, its topology made on the device from the routing: SDD with gathered tokens up,
SwiGLU on the blocks, DSD down, segmented sum. Saved for backward: x, the two pre-activations (in whole blocks), indices.
The hidden values are recomputed, the gradient of a row's weight is <dO·W_downᵀ, hidden>, and expert outputs are never kept.

Launches: 5 forward (3 products), 9 backward (6 products), without the topology's index arithmetic. num_blocks is the
host's bound over all routings, so the blocks saved are those of the fullest: exact for equal widths and more where rows
could all go to the widest expert.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_triton.block_sparse import torch_path
from moe_triton.block_sparse.products import Backend, path, resolve_backend
from moe_triton.block_sparse.topology import PackedExperts, Topology, from_routing
from moe_triton.compile_case import CompileCase


def variable_width_ffn(
    x_TD: Tensor,
    w_gate_DF: Tensor,
    w_up_DF: Tensor,
    w_down_FD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    packed: PackedExperts,
    *,
    weight_on: Literal["output", "input"] = "output",
    backend: Backend = "auto",
) -> Tensor:
    """Apply experts whose hidden columns lie side by side along F = sum(packed.widths), and sum per token: y_TD.

    x_TD [T, D]; weights of x's dtype, any strides; rows in expert order: token_P [P] int, weight_P [P] float,
    rows of expert e are offsets_E1[e] : offsets_E1[e+1], and rows past the last offset go nowhere. `packed` is made once,
    on x's device. Differentiable in x, the weights and weight_P; no host synchronisation. Raises ValueError if shapes do not fit.
    """
    D, F = x_TD.shape[1], sum(packed.widths)
    if (w_gate_DF.shape, w_up_DF.shape, w_down_FD.shape) != ((D, F), (D, F), (F, D)):
        raise ValueError(
            f"weights have shapes {tuple(w_gate_DF.shape)}, {tuple(w_up_DF.shape)}, {tuple(w_down_FD.shape)}: for x of "
            f"{D} columns and widths that sum to {F} they must be ({D}, {F}), ({D}, {F}) and ({F}, {D})"
        )
    if {w.dtype for w in (w_gate_DF, w_up_DF, w_down_FD)} != {x_TD.dtype}:
        raise ValueError(f"x is {x_TD.dtype} and the weights are {w_up_DF.dtype}: cast the weights to the type of x")
    if weight_on not in ("output", "input"):
        raise ValueError(f"weight_on is '{weight_on}': use 'output' or 'input'")
    topology = from_routing(offsets_E1, token_P.shape[0], packed)
    home = _home(token_P, offsets_E1, x_TD.shape[0])
    weights = (w_gate_DF, w_up_DF, w_down_FD)
    backend_name = resolve_backend(backend, x_TD)
    return _forward(x_TD, *weights, token_P, weight_P, home, *topology.flat(), weight_on == "input", backend_name)[0]


def _home(token_P: Tensor, offsets_E1: Tensor, num_tokens: int) -> list[Tensor]:
    """What the segmented sum needs: places of rows in token order, offsets per token, offsets per expert."""
    token_R, place_R = token_P.sort(stable=True)
    tokens = torch.arange(num_tokens + 1, dtype=token_R.dtype, device=token_R.device)
    return [place_R, torch.searchsorted(token_R, tokens), offsets_E1]


def _sum_home(
    rows_PD: Tensor, weight_P: Tensor | None, token_P: Tensor, home: Sequence[Tensor], backend: str
) -> Tensor:
    """Sum each token's rows, weighted or not, in float32 and in a fixed order."""
    place_R, token_offsets, offsets_E1 = home
    if backend == "torch":
        dtype = torch.promote_types(rows_PD.dtype, torch.float32)
        rows = rows_PD.to(dtype) if weight_P is None else rows_PD.to(dtype) * weight_P.to(dtype).unsqueeze(1)
        total_TD = rows.new_zeros(token_offsets.shape[0] - 1, rows.shape[1])
        return total_TD.index_add_(0, token_P, rows).to(rows_PD.dtype)
    from moe_triton.combine import combine
    from moe_triton.plan import RoutingPlan

    plan = RoutingPlan(
        token_P=token_P,
        row_P=token_P,
        reverse_R=place_R,
        offsets_E1=offsets_E1,
        token_offsets=token_offsets,
        schedule=offsets_E1,
        tile_rows=0,
    )
    return combine(rows_PD, None if weight_P is None else weight_P.index_select(0, place_R), plan)


def _glu(backend: str):
    """The module with `forward` and `backward` of the activation."""
    if backend == "torch":
        return _TorchGlu
    from moe_triton.block_sparse import glu_kernels

    return glu_kernels


class _TorchGlu:
    """`glu_kernels` in plain torch."""

    @staticmethod
    def forward(gate_NBB: Tensor, up_NBB: Tensor, weight_P: Tensor, topology: Topology, *, on_input: bool) -> Tensor:
        gate, up = _wide(gate_NBB), _wide(up_NBB)
        if on_input:
            weight = _rows_of_blocks(weight_P.to(gate.dtype), topology)
            gate, up = gate * weight, up * weight
        return torch.nn.functional.silu(gate).mul_(up).to(gate_NBB.dtype)

    @staticmethod
    def backward(
        gate_NBB: Tensor, up_NBB: Tensor, dhidden_NBB: Tensor, weight_P: Tensor, topology: Topology, *, on_input: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate, up, dhidden = _wide(gate_NBB), _wide(up_NBB), _wide(dhidden_NBB)
        weight = _rows_of_blocks(weight_P.to(gate.dtype), topology)
        g, u = (gate * weight, up * weight) if on_input else (gate, up)
        sigmoid = g.sigmoid()
        value = g * sigmoid
        hidden = value * u
        dgate, dup = dhidden * u * (sigmoid + value * (1 - sigmoid)), dhidden * value
        products = dgate * gate + dup * up if on_input else dhidden * hidden
        dweight_tiles = gate.new_zeros(topology.num_block_rows + 1, topology.block)
        dweight_tiles.index_add_(0, topology.row_index, products.sum(2))
        inside = torch_path.slots(topology.row_bounds, topology.block)[1]
        dweight_P = dweight_tiles[:-1][inside].to(weight_P.dtype)
        hidden = hidden if on_input else hidden * weight
        dtype = gate_NBB.dtype
        return hidden.to(dtype), (dgate * weight).to(dtype), (dup * weight).to(dtype), dweight_P


def _rows_of_blocks(weight_P: Tensor, topology: Topology) -> Tensor:
    """The weight of each row of each block [num_blocks, block, 1]; 0 where there is no row."""
    tiles = torch_path.tiles(weight_P.unsqueeze(1), topology.row_bounds, topology.block)
    tiles = torch.cat([tiles, tiles.new_zeros(1, *tiles.shape[1:])])  # of blocks without a row
    return tiles.index_select(0, topology.row_index)


def _rows_along_F(w_DF: Tensor) -> bool:
    """Whether a weight is the transposed view of [F, D]: its gradient then is too, so that adding it up moves nothing."""
    return w_DF.t().is_contiguous() and not w_DF.is_contiguous()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.library.custom_op("moe_triton::variable_width_ffn", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate_DF: Tensor,
    w_up_DF: Tensor,
    w_down_FD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    home: Sequence[Tensor],
    indices: Sequence[Tensor],
    sizes: Sequence[int],
    on_input: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    topology, products = Topology.of_flat(indices, sizes), path(backend)
    gate_NBB = products.sdd(x_TD, w_gate_DF, topology, token_P)
    up_NBB = products.sdd(x_TD, w_up_DF, topology, token_P)
    hidden_NBB = _glu(backend).forward(gate_NBB, up_NBB, weight_P, topology, on_input=on_input)
    rows_PD = products.dsd(hidden_NBB, w_down_FD, topology, transpose=False, transpose_out=False)
    return _sum_home(rows_PD, None if on_input else weight_P, token_P, home, backend), gate_NBB, up_NBB


@_forward.register_fake
def _(x_TD, w_gate_DF, w_up_DF, w_down_FD, token_P, weight_P, home, indices, sizes, on_input, backend):
    topology = Topology.of_flat(indices, sizes)
    values = (topology.num_blocks, topology.block, topology.block)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(values), x_TD.new_empty(values)


@torch.library.custom_op("moe_triton::variable_width_ffn_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_NBB: Tensor,
    up_NBB: Tensor,
    w_gate_DF: Tensor,
    w_up_DF: Tensor,
    w_down_FD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    home: Sequence[Tensor],
    indices: Sequence[Tensor],
    sizes: Sequence[int],
    on_input: bool,
    needs_x: bool,
    needs_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    topology, products = Topology.of_flat(indices, sizes), path(backend)
    dhidden_NBB = products.sdd(dy_TD, w_down_FD.t(), topology, token_P)
    hidden_NBB, dgate_NBB, dup_NBB, dweight_P = _glu(backend).backward(
        gate_NBB, up_NBB, dhidden_NBB, weight_P, topology, on_input=on_input
    )
    dx_TD, dw_gate, dw_up, dw_down = (x_TD.new_empty(0, 0) for _ in range(4))
    if needs_weights:
        by_token = {"transpose": True, "dense_row_K": token_P}
        dw_down = products.dsd(hidden_NBB, dy_TD, topology, transpose_out=False, **by_token)
        dw_gate, dw_up = (
            products.dsd(d_NBB, x_TD, topology, transpose_out=False, **by_token).t()
            if _rows_along_F(w_DF)
            else products.dsd(d_NBB, x_TD, topology, transpose_out=True, **by_token)
            for w_DF, d_NBB in ((w_gate_DF, dgate_NBB), (w_up_DF, dup_NBB))
        )
    if needs_x:
        dx_PD = products.dsd(dgate_NBB, w_gate_DF.t(), topology, transpose=False, transpose_out=False)
        dx_PD += products.dsd(dup_NBB, w_up_DF.t(), topology, transpose=False, transpose_out=False)
        dx_TD = _sum_home(dx_PD, None, token_P, home, backend)
    return dx_TD, dw_gate, dw_up, dw_down, dweight_P


@_backward.register_fake
def _(
    dy_TD,
    x_TD,
    gate_NBB,
    up_NBB,
    w_gate_DF,
    w_up_DF,
    w_down_FD,
    token_P,
    weight_P,
    home,
    indices,
    sizes,
    on_input,
    needs_x,
    needs_weights,
    backend,
):
    dx_TD = x_TD.new_empty(x_TD.shape if needs_x else (0, 0))
    dweight_P = weight_P.new_empty(weight_P.shape)
    if not needs_weights:
        return dx_TD, *(w.new_empty(0, 0) for w in (w_gate_DF, w_up_DF, w_down_FD)), dweight_P
    dw_gate, dw_up = (
        w.new_empty(w.t().shape).t() if _rows_along_F(w) else w.new_empty(w.shape) for w in (w_gate_DF, w_up_DF)
    )
    return dx_TD, dw_gate, dw_up, w_down_FD.new_empty(w_down_FD.shape), dweight_P


def _saves(ctx, inputs, output) -> None:
    x_TD, w_gate, w_up, w_down, token_P, weight_P, home, indices, ctx.sizes, ctx.on_input, ctx.backend = inputs
    _, gate_NBB, up_NBB = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, gate_NBB, up_NBB, w_gate, w_up, w_down, token_P, weight_P, *home, *indices)
    ctx.num_home, ctx.num_indices = len(home), len(indices)


def _gradients(ctx, dy_TD, _dgate, _dup):
    dense, lists = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    home, indices = lists[: ctx.num_home], lists[ctx.num_home :]
    nothing = ([None] * len(home), [None] * len(indices), None, None, None)
    if dy_TD is None:
        return None, None, None, None, None, None, *nothing
    needs_x, *needs_weights = ctx.needs_input_grad[:4]
    flags = (ctx.on_input, needs_x, any(needs_weights))
    dx_TD, *dweights, dweight_P = _backward(dy_TD.contiguous(), *dense, home, indices, ctx.sizes, *flags, ctx.backend)
    wanted = [dw if need else None for dw, need in zip(dweights, needs_weights, strict=True)]
    return dx_TD if needs_x else None, *wanted, None, dweight_P, *nothing


_forward.register_autograd(_gradients, setup_context=_saves)


def compile_cases() -> list[CompileCase]:
    """Forward and backward with equal and with odd widths, the weight on either side, W_gate and W_up in either layout."""

    def case(block: int, widths: list[int], weight_on: Literal["output", "input"], *, rows_along_F: bool = False):
        def run(dtype: torch.dtype, D: int, F: int) -> None:
            packed = PackedExperts.of([F, *widths], block)
            x, w_gate, w_up, w_down, weight = (
                torch.randn(*shape, dtype=kind, requires_grad=True)
                for shape, kind in (
                    ((32, D), dtype),
                    ((D, F + sum(widths)), dtype),
                    ((D, F + sum(widths)), dtype),
                    ((F + sum(widths), D), dtype),
                    ((64,), torch.float32),
                )
            )
            if rows_along_F:
                w_gate, w_up = (w.detach().t().contiguous().requires_grad_().t() for w in (w_gate, w_up))
            token, offsets = torch.arange(64) // 2, torch.linspace(0, 60, len(widths) + 2).long()
            y = variable_width_ffn(
                x, w_gate, w_up, w_down, token, weight, offsets, packed, weight_on=weight_on, backend="triton"
            )
            y.sum().backward()

        return run

    return [
        CompileCase("equal_widths", True, case(128, [], "output")),
        CompileCase("odd_widths", True, case(64, [0, 100], "input")),
        CompileCase("rows_along_F", True, case(128, [256, 64], "output", rows_along_F=True)),
    ]

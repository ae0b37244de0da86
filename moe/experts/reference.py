"""The `reference` backend: `moe_triton.reference`, the float32 specification."""

from torch import Tensor

from moe.routing import Dispatch
from moe_triton import reference
from moe_triton.block_sparse import PackedExperts
from moe_triton.block_sparse.reference import variable_width_ffn


def expert_ffn(
    x_TD: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dispatch: Dispatch,
    packed: PackedExperts | None = None,
    precision: str = "native",
) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type. Weights stacked or packed.

    Another precision rounds the products' operands as 8-bit products do.
    """
    rows = (dispatch.token_P, dispatch.weight_P, dispatch.offsets_E1)
    if w_up.ndim == 3:
        weights = (w_gate, w_up, w_down)
        return reference.expert_ffn(x_TD, *weights, *rows, weight_on=dispatch.weight_on, precision=precision)
    assert packed is not None, "packed weights need their widths"
    return variable_width_ffn(x_TD, w_gate.t(), w_up.t(), w_down, *rows, packed.widths, weight_on=dispatch.weight_on)

"""The `block_sparse` backend: experts of any width as block-sparse products of moe_triton, on a GPU or under the interpreter.

No grouped product takes experts of different widths. Here the hidden values of all routed rows are one block-sparse
matrix, expert e's rows × expert e's columns, whose topology is made on the device from the routing.
"""

from torch import Tensor

from moe.experts.triton_backend import require_device
from moe.routing import Dispatch
from moe_triton.block_sparse.topology import PackedExperts


def expert_ffn(
    x_TD: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dispatch: Dispatch, packed: PackedExperts | None = None
) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type.

    Weights packed [F, D] each, or stacked [E, D, F], [E, D, F], [E, F, D]: then gate and up are copied into the packed order.
    """
    from moe_triton.block_sparse.ffn import variable_width_ffn  # late: most runs never need it

    assert packed is not None, "this backend needs the experts' blocks"
    require_device("block_sparse", x_TD)
    if w_up.ndim == 3:
        w_gate, w_up = (w.transpose(1, 2).flatten(0, 1) for w in (w_gate, w_up))
        w_down = w_down.flatten(0, 1)
    return variable_width_ffn(
        x_TD,
        w_gate.t(),
        w_up.t(),
        w_down,
        dispatch.token_P,
        dispatch.weight_P,
        dispatch.offsets_E1,
        packed,
        weight_on=dispatch.weight_on,
        backend="triton",
    )

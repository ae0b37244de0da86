"""The `reference` backend: `moe_triton.reference`, the float32 specification."""

from torch import Tensor

from moe.routing import Dispatch
from moe_triton import reference


def expert_ffn(x_TD: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor, dispatch: Dispatch) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type."""
    return reference.expert_ffn(
        x_TD,
        w_gate_EDF,
        w_up_EDF,
        w_down_EFD,
        dispatch.token_P,
        dispatch.weight_P,
        dispatch.offsets_E1,
        weight_on=dispatch.weight_on,
    )
